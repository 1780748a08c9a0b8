"""An embedded Triton server for one or several model repositories, with gRPC and metrics on loopback only.

The server in the ``nvidia-pytriton`` wheel is old and its HTTP front end can be crashed remotely, so it is never
exposed: HTTP is off, gRPC and metrics listen on 127.0.0.1, models cannot be loaded or unloaded, the repository,
shared-memory, trace and logging protocols are refused, and the response cache is off.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import psutil

from staindiffuser.errors import ServerLostError, UsageError
from staindiffuser.export.manifest import Manifest, verify
from staindiffuser.serving import supervisor
from staindiffuser.serving.arguments import LOOPBACK, traces_endpoint, triton_arguments
from staindiffuser.serving.drain import drain, open_gate
from staindiffuser.serving.errors import PortInUseError, ServerMissingError, ServerStartError
from staindiffuser.serving.model_links import ServedModel, link_models, named
from staindiffuser.serving.ports import PortClaim
from staindiffuser.serving.preflight import SHARED_MEMORY, require_shared_memory
from staindiffuser.serving.readiness import require_answer, wait_until_ready
from staindiffuser.serving.runtime import TritonRuntime, find_runtime
from staindiffuser.serving.triton_log import likely_reason, start_error
from staindiffuser.triton_models.shared import gate, request_log

__all__ = ["TritonServer"]

POLL_SECONDS = 0.2


class TritonServer:
    """A running Triton server; use it as a context manager.

    >>> with TritonServer(Path("models")) as server:  # doctest: +SKIP
    ...     print(server.url)
    127.0.0.1:8001
    """

    def __init__(
        self,
        *repositories: Path,
        grpc_port: int | None = None,
        metrics_port: int | None = None,
        log: Path | None = None,
        threads: int | None = None,
        checkpoints: Sequence[Path] = (),
        requests: Path | None = None,
    ) -> None:
        """Configure a server; entering the context starts it.

        Args:
            repositories: model repositories from ``export build``; of several, clients choose one by its model's name.
            grpc_port: for clients, on 127.0.0.1; a free port by default.
            metrics_port: for Prometheus, on 127.0.0.1; a free port by default.
            log: file to append Triton's log to; by default the log is kept only while the server runs.
            threads: threads of each CPU engine, overriding the repository; 0 for all cores.
            checkpoints: checkpoint folder that the engines of each repository must come from; empty: from any.
            requests: file to append one line of JSON per request to, of the flavour ``single``; None for none.
        """
        if not repositories:
            raise ValueError("name a model repository")
        if checkpoints and len(checkpoints) != len(repositories):
            raise UsageError(f"--checkpoint: name one for each of the {len(repositories)} repositories, in their order")
        self.repositories = tuple(repository.resolve() for repository in repositories)
        self._ports = (grpc_port, metrics_port)
        self._log = log
        self._threads = threads
        self._checkpoints = tuple(checkpoints)
        self._requests = requests
        self._folder: Path | None = None
        self._supervisor: subprocess.Popen[bytes] | None = None
        self._models: tuple[ServedModel, ...] = ()
        self._claims: list[PortClaim] = []
        self._grpc_port = self._metrics_port = self._pid = self._log_start = 0
        self._identity = ""
        self._processes: list[psutil.Process] = []
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
        """Random identity of this start of the server; clients read it as the ensembles' parameter ``server_id``."""
        return self._identity

    @property
    def models(self) -> tuple[ServedModel, ...]:
        """What is served, in the order of the repositories."""
        if not self._models:
            raise ServerLostError("the server was not started")
        return self._models

    @property
    def manifest(self) -> Manifest:
        """Manifest of the first repository."""
        return self.models[0].manifest

    @property
    def alive(self) -> bool:
        """Whether tritonserver is running."""
        return self._supervisor is not None and self._supervisor.poll() is None

    def __enter__(self) -> TritonServer:
        """Verify the repositories, start the server and wait until every model is ready.

        Raises:
            VerificationError: files, builder or device do not match the manifest.
            PortInUseError: a requested port is in use.
            UsageError: a flavour cannot log its requests, or two repositories hold the same model.
            ServerMissingError: no tritonserver on this machine, or too little shared memory.
            ServerStartError: the server did not become ready; quotes its log.
        """
        try:
            self._claim_ports()
            self._launch()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop the server and everything it started, and release its ports; does nothing if it is not running."""
        self._end()
        while self._claims:
            self._claims.pop().close()

    def restart(self) -> None:
        """Replace the server by a new process on the same ports.

        Raises:
            VerificationError, ServerMissingError, ServerStartError: as when it was started first.
        """
        if self.alive and self._pid:  # it is broken, and may not react to a gentler signal
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
        self._end()
        try:
            self._launch()
        except BaseException:
            self._end()
            raise

    def drain(self, timeout: float) -> bool:
        """Refuse new requests and wait until those in progress are finished.

        Args:
            timeout: seconds.

        Returns:
            False if requests were still in progress when the time was up.
        """
        if self._folder is None or not self.alive:
            return True
        return drain(self._folder / "gate", self.metrics_url, timeout)

    def wait(self, seconds: float) -> None:
        """Wait for at most ``seconds`` while the server is running.

        Raises:
            ServerLostError: it has ended, or one of its backend processes has: Triton then still says that it is ready,
                but fails every request.
        """
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if self._supervisor is None:
                raise ServerLostError("the server was not started")
            ended = [process for process in self._processes if not _runs(process)]
            if self._supervisor.poll() is not None or self._processes[0] in ended:
                raise ServerLostError(self._ending(self._supervisor.wait()))
            if ended:
                raise ServerLostError(f"an engine's process (id {ended[0].pid}) has ended: out of memory?")
            time.sleep(min(POLL_SECONDS, left))

    def probe(self, timeout: float) -> None:
        """Check with a tile per model that every engine still works.

        Args:
            timeout: seconds.

        Raises:
            ServerLostError: an engine fails, or is stuck.
        """
        for model in self.models:
            require_answer(self.url, self.metrics_url, model, timeout)

    def _claim_ports(self) -> None:
        if self._ports[0] is not None and self._ports[0] == self._ports[1]:
            raise PortInUseError(f"--grpc-port and --metrics-port are both {self._ports[0]}: choose two ports")
        for port, option in zip(self._ports, ("--grpc-port", "--metrics-port"), strict=True):
            self._claims.append(PortClaim(port, option=option))
        self._grpc_port, self._metrics_port = (claim.port for claim in self._claims)

    def _launch(self) -> None:
        runtime = self._check()
        try:
            self._start(runtime)
        except OSError as error:
            place = error.filename or tempfile.gettempdir()
            raise ServerStartError(f"Triton could not be started: {place}: {error.strerror}") from error
        wait_until_ready(self.url, self.models, identity=self._identity, require_alive=self._require_started)
        triton = psutil.Process(self._pid)
        self._processes = [triton, *triton.children(recursive=True)]

    def _check(self) -> TritonRuntime:
        """Verify the repositories and this machine."""
        checkpoints = self._checkpoints or [None] * len(self.repositories)
        pairs = zip(self.repositories, checkpoints, strict=True)
        self._models = named([(repository, verify(repository, checkpoint=given)) for repository, given in pairs])
        runtime = find_runtime()
        for model in self._models:
            flavour = model.manifest.flavour
            if flavour == "native" and not runtime.backends:
                raise ServerMissingError(
                    f"{model.repository} needs Triton's TensorRT backend, which the embedded server lacks: serve it in "
                    "the container, or build it with --flavour python or single"
                )
            if self._requests is not None and flavour != "single":
                raise UsageError(
                    f"--requests: no process of the flavour {flavour} sees a whole request; build {model.repository} "
                    "with --flavour single, or read the proxy's log"
                )
        require_shared_memory([model.manifest for model in self._models])
        return runtime

    def _end(self) -> None:
        """End the process and remove its files."""
        left, self._processes = self._processes, []
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
        self._clear(left)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _clear(self, processes: Sequence[psutil.Process]) -> None:
        """What a supervisor that was killed itself could not: nothing of it holds the ports of the next one."""
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        deadline = time.monotonic() + 5
        while any(map(_runs, processes)) and time.monotonic() < deadline:
            time.sleep(0.05)
        for path in SHARED_MEMORY.glob(f"{self._prefix}*"):
            path.unlink(missing_ok=True)

    def _start(self, runtime: TritonRuntime) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="staindiffuser-server-"))
        backends = runtime.prepare_backends(self._folder / "backends")
        self._identity = secrets.token_hex(16)
        models = link_models(self.models, self._folder / "models", identity=self._identity)
        arguments = triton_arguments(
            [model.manifest for model in self.models],
            models,
            backends,
            grpc_port=self._grpc_port,
            metrics_port=self._metrics_port,
            shm_prefix=self._prefix,
            traces=traces_endpoint(os.environ),
        )
        command = [str(runtime.server), *arguments]
        environment = runtime.environment(os.environ)
        environment[gate.ENVIRONMENT] = str(open_gate(self._folder / "gate"))
        if self._requests is not None:
            environment[request_log.ENVIRONMENT] = str(self._requests.absolute())
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

    def _require_started(self) -> None:
        assert self._supervisor is not None
        status = self._supervisor.poll()
        if status is not None:
            raise start_error(self._last_words() or self._ending(status))

    def _ending(self, status: int) -> str:
        """How Triton ended."""
        if status < 0:
            return f"Triton's supervisor was ended by {signal.Signals(-status).name}"
        if status == supervisor.ENGINE_ENDED:
            return "an engine's process has ended: out of memory?"
        if status > supervisor.SIGNALLED:
            name = signal.Signals(status - supervisor.SIGNALLED).name
            return f"Triton was ended by {name}" + (": out of memory?" if name == "SIGKILL" else "")
        return f"Triton ended by itself (status {status}): {self._last_words() or 'its log is empty'}"

    def _last_words(self) -> str:
        return likely_reason(self._log_path(), self._log_start)


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
