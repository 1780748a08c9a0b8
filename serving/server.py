"""An embedded Triton server for one model repository: gRPC and metrics on loopback, nothing else.

The server of the ``nvidia-pytriton`` wheel is old and its HTTP front end can be crashed from outside, so it is never
exposed: HTTP is off, gRPC and metrics listen on 127.0.0.1, models cannot be loaded or unloaded, the protocols for
repository, shared memory, tracing and logging are refused, and the response cache is off.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from staindiffuser.errors import ServerLostError
from staindiffuser.export.manifest import Manifest, verify
from staindiffuser.serving import supervisor
from staindiffuser.serving.errors import PortInUseError, ServerMissingError, ServerStartError
from staindiffuser.serving.runtime import TritonRuntime, find_runtime

__all__ = ["TritonServer"]

LOOPBACK = "127.0.0.1"
START_TIMEOUT = 180.0
RESTRICTED = ("model-repository", "shared-memory", "trace", "logging")
_SHARED_MEMORY = Path("/dev/shm")


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
        """Describe a server; entering the context starts it.

        Args:
            repository: what ``export build`` wrote.
            grpc_port: for clients, on 127.0.0.1; a free one by default.
            metrics_port: for Prometheus, on 127.0.0.1; a free one by default.
            log: where Triton's log is appended; by default it is kept only while the server runs.
            threads: threads of each CPU engine instead of what the repository says; 0 for all.
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
        self._grpc_port = self._metrics_port = self._pid = self._log_start = 0
        self._prefix = f"staindiffuser_{os.getpid()}_{secrets.token_hex(4)}_"

    @property
    def url(self) -> str:
        """Host and port for gRPC clients."""
        return f"{LOOPBACK}:{self._grpc_port}"

    @property
    def metrics_url(self) -> str:
        """Where Prometheus scrapes."""
        return f"http://{LOOPBACK}:{self._metrics_port}/metrics"

    @property
    def pid(self) -> int:
        """Process id of tritonserver."""
        return self._pid

    @property
    def manifest(self) -> Manifest:
        """What is served."""
        if self._manifest is None:
            raise ServerLostError("the server was not started")
        return self._manifest

    @property
    def alive(self) -> bool:
        """Whether tritonserver still runs."""
        return self._supervisor is not None and self._supervisor.poll() is None

    def __enter__(self) -> TritonServer:
        """Verify the repository, start the server and wait until it is ready.

        Raises:
            VerificationError: files, builder or device differ from the manifest.
            PortInUseError: a port that was asked for is taken.
            ServerMissingError: there is no tritonserver here, or too little shared memory.
            ServerStartError: it did not become ready; quotes its log.
        """
        self._manifest = verify(self.repository, checkpoint=self._checkpoint)
        if self._manifest.flavour != "python":
            raise ServerMissingError(
                f"{self.repository} is for Triton's TensorRT backend, which the embedded server lacks: serve it in the "
                "container, or build it with --flavour python"
            )
        runtime = find_runtime()
        _require_shared_memory(self._manifest)
        for port in self._ports:
            if port is not None:
                _require_free(port)
        try:
            self._start(runtime)
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the server and everything it started; does nothing if it does not run."""
        if self._supervisor is not None:
            assert self._supervisor.stdin is not None
            with contextlib.suppress(OSError):
                self._supervisor.stdin.close()  # the supervisor takes this as the order to stop
            try:
                self._supervisor.wait(supervisor.GRACE_SECONDS + 5)
            except subprocess.TimeoutExpired:
                self._supervisor.kill()
                self._supervisor.wait()
            assert self._supervisor.stdout is not None
            self._supervisor.stdout.close()
            self._supervisor = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def wait(self, seconds: float) -> None:
        """Wait while the server runs.

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
        models = _link_models(self.repository, self.manifest, self._folder / "models")
        reserved = [_reserve(port) for port in self._ports]
        self._grpc_port, self._metrics_port = (port for _, port in reserved)
        command = [str(runtime.server), *self._arguments(models, backends)]
        environment = runtime.environment(os.environ)
        if self._threads is not None:
            environment["STAINDIFFUSER_THREADS"] = str(self._threads)
        for held, _ in reserved:
            held.close()
        with self._log_path().open("ab") as log:
            self._log_start = log.tell()
            self._supervisor = subprocess.Popen(
                [sys.executable, "-I", supervisor.__file__, self._prefix, str(self._folder), *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                start_new_session=True,
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
            "disable-auto-complete-config": "",  # a configuration is complete or refused
            "strict-readiness": "true",
            "exit-on-error": "true",
            "exit-timeout-secs": "5",
            "allow-http": "false",
            "grpc-address": LOOPBACK,
            "grpc-port": str(self._grpc_port),
            "metrics-address": LOOPBACK,
            "metrics-port": str(self._metrics_port),
            "allow-metrics": "true",
            "log-format": "ISO8601",
            # Nobody knows this key, not even we: these protocols are closed, not protected by a secret.
            "grpc-restricted-protocol": f"{','.join(RESTRICTED)}:closed={secrets.token_hex(32)}",
            "backend-config": f"python,shm-region-prefix-name={self._prefix}",
        }
        if self.manifest.engines["he_encoder"].device.kind == "cpu":
            arguments["pinned-memory-pool-byte-size"] = "0"
            arguments["allow-gpu-metrics"] = "false"
        else:
            # The features live here between models; a full pool silently falls back to host memory.
            arguments["cuda-memory-pool-byte-size"] = f"0:{self.manifest.cuda_pool_bytes}"
        return [f"--{name}={value}" if value else f"--{name}" for name, value in arguments.items()]

    def _wait_until_ready(self) -> None:
        import tritonclient.grpc as triton

        deadline = time.monotonic() + START_TIMEOUT
        # gRPC obeys http_proxy even for loopback; hospitals have one.
        with triton.InferenceServerClient(self.url, channel_args=[("grpc.enable_http_proxy", 0)]) as client:
            while time.monotonic() < deadline:
                if not self.alive:
                    raise _start_error(self._reason())
                with contextlib.suppress(triton.InferenceServerException):
                    if client.is_server_ready(client_timeout=5):
                        return
                time.sleep(0.05)
        raise ServerStartError(f"Triton was not ready after {START_TIMEOUT:.0f} s: {self._reason()}")

    def _reason(self) -> str:
        """The line of this run's log that most likely says why it ended."""
        try:
            with self._log_path().open("rb") as log:
                log.seek(self._log_start)
                lines = log.read().decode(errors="replace").splitlines()
        except OSError:
            return "its log cannot be read"
        return _pick(lines) or "its log is empty"


def _link_models(repository: Path, manifest: Manifest, folder: Path) -> Path:
    """A repository of links to the files that were verified, and to no others.

    The Python backend writes compiled files beside its models and would run ones it finds there; this way the
    repository stays as it was built, may be read-only, and nothing unverified is executed.
    """
    for name in manifest.files:
        link = folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(repository / name)
    return folder


def _require_free(port: int) -> None:
    with contextlib.closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except (OSError, OverflowError) as error:
            raise PortInUseError(
                f"port {port} cannot be used on {LOOPBACK} ({error}): choose another with --grpc-port or --metrics-port"
            ) from error


def _reserve(port: int | None) -> tuple[socket.socket, int]:
    """A port that is asked for or free, with a socket that holds a free one until the server is started."""
    held = socket.socket()
    if port is None:
        held.bind((LOOPBACK, 0))
        port = held.getsockname()[1]
    return held, port


def _model_bytes(manifest: Manifest) -> list[int]:
    """Bytes of inputs and outputs of each engine at the largest batch."""
    return [
        manifest.max_batch
        * sum(int(np.prod(t.shape)) * np.dtype(t.dtype).itemsize for t in (*engine.inputs, *engine.outputs))
        for engine in manifest.engines.values()
    ]


def _require_shared_memory(manifest: Manifest) -> None:
    """The Python backend hands tensors over through /dev/shm, which containers make small."""
    if not _SHARED_MEMORY.is_dir():
        raise ServerMissingError(f"{_SHARED_MEMORY} is missing: Triton's Python backend needs it")
    needed = int(1.25 * sum(_model_bytes(manifest))) + (1 << 20) * (len(manifest.engines) + 1)
    free = shutil.disk_usage(_SHARED_MEMORY).free
    if free < needed:
        raise ServerMissingError(
            f"{_SHARED_MEMORY} has {free >> 20} MiB free, this repository needs {needed >> 20} MiB at batch "
            f"{manifest.max_batch}: give the container more (docker run --shm-size) or build with a smaller --max-batch"
        )


def _start_error(reason: str) -> Exception:
    if "error while loading shared libraries: libpython" in reason:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        return ServerMissingError(f"Triton's Python backend needs libpython{version}.so: install libpython{version}")
    return ServerStartError(f"Triton did not start: {reason}")


def _pick(lines: Sequence[str]) -> str:
    patterns = (r"error while loading shared libraries", r"failed to load '.*' version", r"^error: ", r"^\S+Z E ")
    for pattern in patterns:
        for line in lines:
            if re.search(pattern, line):
                return re.sub(r"^\S+Z [EWI] \d+ (\S+:\d+\] )?", "", line).strip(' "')[:500]
    return lines[-1].strip() if lines else ""
