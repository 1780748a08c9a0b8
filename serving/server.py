"""An embedded Triton server for one model repository, with gRPC and metrics on loopback only.

The server in the ``nvidia-pytriton`` wheel is old and its HTTP front end can be crashed remotely, so it is never
exposed: HTTP is off, gRPC and metrics listen on 127.0.0.1, models cannot be loaded or unloaded, the repository,
shared-memory, trace and logging protocols are refused, and the response cache is off.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from staindiffuser.errors import ServerLostError
from staindiffuser.export.manifest import Manifest, verify
from staindiffuser.export.triton_config import ENSEMBLE
from staindiffuser.serving import supervisor
from staindiffuser.serving.errors import ServerMissingError, ServerStartError
from staindiffuser.serving.model_links import SERVER_ID, link_models
from staindiffuser.serving.ports import PortClaim
from staindiffuser.serving.preflight import require_shared_memory
from staindiffuser.serving.runtime import TritonRuntime, find_runtime
from staindiffuser.serving.triton_log import likely_reason, start_error

__all__ = ["TritonServer", "require_identity"]

LOOPBACK = "127.0.0.1"
START_TIMEOUT = 180.0
RESTRICTED = ("model-repository", "shared-memory", "trace", "logging")


class TritonServer:
    """A running Triton server; use it as a context manager.

    >>> with TritonServer(Path("models")) as server:  # doctest: +SKIP
    ...     print(server.url)
    127.0.0.1:8001
    """

    def __init__(
        self,
        repository: Path,
        *,
        grpc_port: int | None = None,
        metrics_port: int | None = None,
        log: Path | None = None,
        threads: int | None = None,
        checkpoint: Path | None = None,
    ) -> None:
        """Configure a server; entering the context starts it.

        Args:
            repository: model repository from ``export build``.
            grpc_port: for clients, on 127.0.0.1; a free port by default.
            metrics_port: for Prometheus, on 127.0.0.1; a free port by default.
            log: file to append Triton's log to; by default the log is kept only while the server runs.
            threads: threads of each CPU engine, overriding the repository; 0 for all cores.
            checkpoint: checkpoint folder that the engines must come from, or None.
        """
        self.repository = repository.resolve()
        self._ports = (grpc_port, metrics_port)
        self._log = log
        self._threads = threads
        self._checkpoint = checkpoint
        self._folder: Path | None = None
        self._supervisor: subprocess.Popen[bytes] | None = None
        self._manifest: Manifest | None = None
        self._claims: list[PortClaim] = []
        self._grpc_port = self._metrics_port = self._pid = self._log_start = 0
        self._identity = ""
        self._prefix = f"staindiffuser_{os.getpid()}_{secrets.token_hex(4)}_"

    @property
    def url(self) -> str:
        """``HOST:PORT`` for gRPC clients."""
        return f"{LOOPBACK}:{self._grpc_port}"

    @property
    def metrics_url(self) -> str:
        """URL for Prometheus to scrape."""
        return f"http://{LOOPBACK}:{self._metrics_port}/metrics"

    @property
    def pid(self) -> int:
        """Process id of tritonserver."""
        return self._pid

    @property
    def identity(self) -> str:
        """Random identity of this start of the server; clients read it as the ensemble's parameter ``server_id``."""
        return self._identity

    @property
    def manifest(self) -> Manifest:
        """Manifest of the repository being served."""
        if self._manifest is None:
            raise ServerLostError("the server was not started")
        return self._manifest

    @property
    def alive(self) -> bool:
        """Whether tritonserver is running."""
        return self._supervisor is not None and self._supervisor.poll() is None

    def __enter__(self) -> TritonServer:
        """Verify the repository, start the server and wait until it is ready.

        Raises:
            VerificationError: files, builder or device do not match the manifest.
            PortInUseError: a requested port is in use.
            ServerMissingError: no tritonserver on this machine, or too little shared memory.
            ServerStartError: the server did not become ready; quotes its log.
        """
        try:
            self._claim_ports()
            self._start(self._check())
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def _claim_ports(self) -> None:
        for port, option in zip(self._ports, ("--grpc-port", "--metrics-port"), strict=True):
            self._claims.append(PortClaim(port, option=option))
        self._grpc_port, self._metrics_port = (claim.port for claim in self._claims)

    def _check(self) -> TritonRuntime:
        """Verify the repository and this machine."""
        self._manifest = verify(self.repository, checkpoint=self._checkpoint)
        if self._manifest.flavour != "python":
            raise ServerMissingError(
                f"{self.repository} needs Triton's TensorRT backend, which the embedded server lacks: serve it in the "
                "container, or build it with --flavour python"
            )
        runtime = find_runtime()
        require_shared_memory(self._manifest)
        return runtime

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop the server and everything it started; does nothing if it is not running."""
        if self._supervisor is not None:
            assert self._supervisor.stdin is not None
            with contextlib.suppress(OSError):
                self._supervisor.stdin.close()  # tells the supervisor to stop
            try:
                self._supervisor.wait(supervisor.GRACE_SECONDS + 5)
            except subprocess.TimeoutExpired:
                self._supervisor.kill()
                self._supervisor.wait()
            assert self._supervisor.stdout is not None
            self._supervisor.stdout.close()
            self._supervisor = None
        while self._claims:
            self._claims.pop().close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def wait(self, seconds: float) -> None:
        """Wait for at most ``seconds`` while the server is running.

        Raises:
            ServerLostError: it ended by itself.
        """
        if self._supervisor is None:
            raise ServerLostError("the server was not started")
        try:
            status = self._supervisor.wait(seconds)
        except subprocess.TimeoutExpired:
            return
        raise ServerLostError(f"Triton ended by itself (status {status}): {self._reason()}")

    def _start(self, runtime: TritonRuntime) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="staindiffuser-server-"))
        backends = runtime.prepare_backends(self._folder / "backends")
        self._identity = secrets.token_hex(16)
        models = link_models(self.repository, self.manifest, self._folder / "models", identity=self._identity)
        command = [str(runtime.server), *self._arguments(models, backends)]
        environment = runtime.environment(os.environ)
        if self._threads is not None:
            environment["STAINDIFFUSER_THREADS"] = str(self._threads)
        with self._log_path().open("ab") as log:
            self._log_start = log.tell()
            self._supervisor = subprocess.Popen(
                [sys.executable, "-I", supervisor.__file__, self._prefix, str(self._folder), *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                start_new_session=True,
                pass_fds=[claim.fileno() for claim in self._claims],  # held until the supervisor has ended the server
            )
        assert self._supervisor.stdout is not None
        self._pid = int(self._supervisor.stdout.readline() or 0)

    def _log_path(self) -> Path:
        assert self._folder is not None
        return self._log if self._log is not None else self._folder / "triton.log"

    def _arguments(self, models: Path, backends: Path) -> list[str]:
        arguments = {
            "model-repository": str(models),
            "backend-directory": str(backends),
            "model-control-mode": "none",
            "disable-auto-complete-config": "",  # an incomplete configuration is refused
            "strict-readiness": "true",
            "exit-on-error": "true",
            "exit-timeout-secs": "5",
            "allow-http": "false",
            "grpc-address": LOOPBACK,
            "grpc-port": str(self._grpc_port),
            "reuse-grpc-port": "false",
            "metrics-address": LOOPBACK,
            "metrics-port": str(self._metrics_port),
            "allow-metrics": "true",
            "log-format": "ISO8601",
            # The key is thrown away: these protocols are closed, not protected by a secret.
            "grpc-restricted-protocol": f"{','.join(RESTRICTED)}:closed={secrets.token_hex(32)}",
            "backend-config": f"python,shm-region-prefix-name={self._prefix}",
        }
        if self.manifest.engines["he_encoder"].device.kind == "cpu":
            arguments["pinned-memory-pool-byte-size"] = "0"
            arguments["allow-gpu-metrics"] = "false"
        else:
            # Holds the features between models; Triton silently falls back to host memory when it is full.
            arguments["cuda-memory-pool-byte-size"] = f"0:{self.manifest.cuda_pool_bytes}"
        return [f"--{name}={value}" if value else f"--{name}" for name, value in arguments.items()]

    def _wait_until_ready(self) -> None:
        import tritonclient.grpc as triton

        deadline = time.monotonic() + START_TIMEOUT
        # By default gRPC obeys http_proxy even for loopback, and hospitals set it.
        with triton.InferenceServerClient(self.url, channel_args=[("grpc.enable_http_proxy", 0)]) as client:
            while time.monotonic() < deadline:
                if not self.alive:
                    raise start_error(self._reason())
                with contextlib.suppress(triton.InferenceServerException):
                    if client.is_server_ready(client_timeout=5):
                        config = client.get_model_config(ENSEMBLE, client_timeout=5).config
                        require_identity(config, self._identity, self.url)
                        return
                time.sleep(0.05)
        raise ServerStartError(f"Triton was not ready after {START_TIMEOUT:.0f} s: {self._reason()}")

    def _reason(self) -> str:
        return likely_reason(self._log_path(), self._log_start)


def require_identity(config: Any, identity: str, url: str) -> None:
    """Check that the ensemble's configuration comes from the server that was started.

    Raises:
        ServerStartError: another server answers at ``url``.
    """
    if config.parameters[SERVER_ID].string_value != identity:
        raise ServerStartError(
            f"another server answers at {url}, although the port was free: find out which process listens there, and "
            "stop it"
        )
