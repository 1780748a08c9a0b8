"""A real server under load: how much it can take, and how long people wait at less.

Closed loop: a number of clients, each of which sends its next request once the last is answered. It tells the most that
a server does. Open loop: requests arrive at random moments (Poisson), whether or not the earlier ones are answered, as
people's do. Latency counts from the moment at which a request was due, so that a slow server cannot hide its queue by
slowing its clients down.

The other sides are the same engines behind what a user would pick instead, see
:mod:`~staindiffuser.benchmarks.rivals`.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from staindiffuser.benchmarks.measuring import Machine
from staindiffuser.benchmarks.rivals import RIVALS, Rival
from staindiffuser.benchmarks.rivals.pipeline import BINARY, encode, output_names
from staindiffuser.errors import DependencyError
from staindiffuser.export.manifest import Manifest, verify
from staindiffuser.export.wire import ENSEMBLE
from staindiffuser.serving.metrics import read_metrics
from staindiffuser.serving.runtime import find_runtime
from staindiffuser.serving.server import TritonServer
from staindiffuser.triton_models.noise import philox
from staindiffuser.triton_models.shared.meters import SECONDS

__all__ = ["LoadReport", "OpenLoop", "bench_load", "open_loop"]

Arrays = dict[str, np.ndarray[Any, Any]]
Call = Callable[[Arrays], Arrays]
TRITON = "Triton"
_PATIENCE = 120.0
"""Seconds that a server may take to answer its first request."""
_MESSAGE_BYTES = 1 << 30
_MOST_WAITING = 512
_METERS = 2 * SECONDS
"""After which the server has told what it has done."""


@dataclass(frozen=True, kw_only=True)
class OpenLoop:
    """Requests that arrived at random."""

    share: float
    """Of what this server can take."""
    offered: float
    answered: float
    """Requests a second, until the last was answered."""
    requests: int
    failed: int
    p50: float | None
    p95: float | None
    p99: float | None
    """Milliseconds from when a request was due; None if none was answered."""


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What was measured."""

    machine: Machine
    model_name: str
    model_version: str
    target: str
    tile: int
    batch: int
    threads: int
    seconds: float
    clients: tuple[int, ...]
    closed: Mapping[str, tuple[float, ...]]
    """Requests a second by server, for each number of clients."""
    open: Mapping[str, tuple[OpenLoop, ...]]
    triton_ms: Mapping[str, Mapping[str, float]]
    """The server's own account of a request, by model: ``queue``, ``compute``; of Triton also ``input``, ``output``."""
    same_bytes: bool
    absent: Mapping[str, str] = field(default_factory=dict)
    """Servers that are not installed or did not start here, and why."""


_RIVALS = tuple(rival.name for rival in RIVALS)


def bench_load(
    repository: Path,
    *,
    batch: int = 1,
    clients: Sequence[int] = (1, 16),
    shares: Sequence[float] = (0.25, 0.5, 0.75),
    seconds: float = 10.0,
    threads: int | None = None,
    rivals: Sequence[str] = _RIVALS,
    progress: Callable[[str], None] = lambda message: None,
) -> LoadReport:
    """Measure a model repository behind Triton, and behind what a user would write.

    Args:
        repository: what ``export build`` wrote.
        batch: tiles a request.
        clients: of the closed loop; the last number saturates.
        shares: of the saturated throughput, at which requests arrive in the open loop.
        seconds: of each measurement.
        threads: of each engine; the repository's by default.
        rivals: names of :data:`~staindiffuser.benchmarks.rivals.RIVALS` to measure as well.
        progress: called with one line per step.

    Raises:
        VerificationError, ServerError, DependencyError: as the server does.
    """
    manifest = verify(repository)
    threads = manifest.threads if threads is None else threads
    batches = [_random_batch(manifest, batch, seed) for seed in range(4)]
    closed: dict[str, tuple[float, ...]] = {}
    opened: dict[str, tuple[OpenLoop, ...]] = {}
    answers: list[Arrays] = []
    statistics: Mapping[str, Mapping[str, float]] = {}
    absent: dict[str, str] = {}
    wanted = [rival for rival in RIVALS if rival.name in rivals]
    for name, rival in [(TRITON, None), *((rival.name, rival) for rival in wanted)]:
        if rival is not None and rival.absent:
            absent[name] = rival.absent
            progress(f"{name}: {rival.absent}")
            continue
        serve = (
            _triton(repository, manifest, threads) if rival is None else _started(rival, repository, manifest, threads)
        )
        with contextlib.ExitStack() as stack:
            try:
                call, account = stack.enter_context(serve)
            except DependencyError as error:
                if rival is None:
                    raise
                absent[name] = str(error)
                progress(str(error))
                continue
            answers.append(call(batches[0]))
            _closed_loop(call, batches, clients[-1], seconds / 4)  # until threads, connections and memory are there
            rates = []
            for count in clients:
                rates.append(_closed_loop(call, batches, count, seconds))
                progress(f"{name}: {rates[-1]:.2f} requests/s with {count} clients")
            closed[name] = tuple(rates)
            loops = []
            for share in shares:
                loops.append(open_loop(call, batches, share, rates[-1], seconds))
                last = loops[-1]
                progress(f"{name} at {share:.0%}: {last.requests} requests, {last.failed} refused")
            opened[name] = tuple(loops)
            statistics = statistics or account()
    return LoadReport(
        machine=Machine.here(),
        model_name=manifest.model_name,
        model_version=manifest.model_version,
        target=manifest.target,
        tile=manifest.tile,
        batch=batch,
        threads=threads,
        seconds=seconds,
        clients=tuple(clients),
        closed=closed,
        open=opened,
        triton_ms=statistics,
        same_bytes=all(np.array_equal(a[name], answers[0][name]) for a in answers for name in output_names(manifest)),
        absent=absent,
    )


def _closed_loop(call: Call, batches: Sequence[Arrays], clients: int, seconds: float) -> float:
    """Requests a second."""
    begin = time.perf_counter()
    end = begin + seconds
    done = [0] * clients

    def client(index: int) -> None:
        while time.perf_counter() < end:
            call(batches[done[index] % len(batches)])
            done[index] += 1

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    return sum(done) / (time.perf_counter() - begin)  # the last requests end after the time is up


def open_loop(call: Call, batches: Sequence[Arrays], share: float, saturated: float, seconds: float) -> OpenLoop:
    rate = share * saturated
    generator = np.random.default_rng(round(1e3 * share))
    due = np.cumsum(generator.exponential(1 / rate, max(8, int(rate * seconds))))
    latencies: list[float] = []
    failed = 0
    lock = threading.Lock()
    begin = time.perf_counter()

    def send(index: int) -> None:
        nonlocal failed
        try:
            call(batches[index % len(batches)])
        except Exception:  # a refusal under load is a result: it is counted
            with lock:
                failed += 1
            return
        with lock:
            latencies.append((time.perf_counter() - begin - due[index]) * 1e3)

    with ThreadPoolExecutor(min(_MOST_WAITING, len(due))) as pool:
        for index, moment in enumerate(due):
            time.sleep(max(0.0, begin + moment - time.perf_counter()))
            pool.submit(send, index)
    elapsed = time.perf_counter() - begin
    p50, p95, p99 = np.percentile(latencies, [50, 95, 99]).tolist() if latencies else (None, None, None)
    return OpenLoop(
        share=share,
        offered=rate,
        answered=len(latencies) / elapsed,
        requests=len(due),
        failed=failed,
        p50=p50,
        p95=p95,
        p99=p99,
    )


Account = Callable[[], Mapping[str, Mapping[str, float]]]
"""A server's own account of what took how long."""


@contextlib.contextmanager
def _triton(repository: Path, manifest: Manifest, threads: int) -> Iterator[tuple[Call, Account]]:
    with TritonServer(repository, threads=threads) as server, _grpc(server.url, manifest) as (client, call):

        def account() -> Mapping[str, Mapping[str, float]]:
            if manifest.flavour == "single":  # keeps its requests itself: to Triton they are done when they have come
                time.sleep(_METERS)
                told = read_metrics(server.metrics_url)
                requests = max(1, told["staindiffuser_requests_total"])
                parts = {part: told[f"staindiffuser_{part}_seconds_total"] for part in ("queue", "compute")}
                return {ENSEMBLE: {part: 1e3 * seconds / requests for part, seconds in parts.items()}}
            found = {}
            for model in client.get_inference_statistics().model_stats:
                stats, count = model.inference_stats, max(1, int(model.inference_stats.success.count))
                by_part = {
                    "queue": stats.queue,
                    "input": stats.compute_input,
                    "compute": stats.compute_infer,
                    "output": stats.compute_output,
                }
                found[model.name] = {name: int(part.ns) / 1e6 / count for name, part in by_part.items()}
            return found

        yield call, account


@contextlib.contextmanager
def _grpc(url: str, manifest: Manifest) -> Iterator[tuple[Any, Call]]:
    """A client of Triton's, and what sends a request through it."""
    import tritonclient.grpc as triton

    names = output_names(manifest)
    options = [
        ("grpc.enable_http_proxy", 0),
        ("grpc.max_send_message_length", _MESSAGE_BYTES),
        ("grpc.max_receive_message_length", _MESSAGE_BYTES),
    ]
    client = triton.InferenceServerClient(url, channel_args=options)

    def call(inputs: Arrays) -> Arrays:
        tensors = []
        for name, dtype in (("HE", "UINT8"), ("ORIGIN", "INT64"), ("SEED", "INT64")):
            tensor = triton.InferInput(name, inputs[name].shape, dtype)
            tensors.append(tensor.set_data_from_numpy(inputs[name]))
        asked = [triton.InferRequestedOutput(name) for name in names]
        result = client.infer(ENSEMBLE, tensors, outputs=asked)
        return {name: result.as_numpy(name) for name in names}

    try:
        yield client, call
    finally:
        client.close()


@contextlib.contextmanager
def _started(rival: Rival, repository: Path, manifest: Manifest, threads: int) -> Iterator[tuple[Call, Account]]:
    """A rival in processes of its own, once it answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    module = f"staindiffuser.benchmarks.rivals.{rival.module}"
    command = [sys.executable, "-m", module, os.fspath(repository), str(threads), str(port)]
    # PyTriton leaves it to chance which libpython it finds.
    environment = find_runtime().environment(os.environ) if rival.grpc else dict(os.environ)
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log, contextlib.ExitStack() as stack:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        stack.callback(_end, process)
        connect = _grpc(f"127.0.0.1:{port}", manifest) if rival.grpc else _http(port, manifest)
        _, call = stack.enter_context(connect)
        request = _random_batch(manifest, 1, 0)
        until = time.monotonic() + _PATIENCE
        while True:
            try:
                call(request)
                break
            except Exception as error:  # it has not opened its port yet, or never will
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    said = (log.read().strip().splitlines() or [str(error)])[-1]
                    raise DependencyError(f"{rival.name} did not start: {said}: leave it out") from error
                time.sleep(0.2)
        yield call, dict


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop a server with all processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def _http(port: int, manifest: Manifest) -> Iterator[tuple[None, Call]]:
    """What sends a request's raw bytes, over connections that stay open."""
    names = output_names(manifest)
    idle: list[http.client.HTTPConnection] = []
    with contextlib.ExitStack() as stack:

        def send(body: bytes, connection: http.client.HTTPConnection) -> http.client.HTTPResponse:
            connection.request("POST", "/", body, {"Content-Type": BINARY})
            return connection.getresponse()

        def call(inputs: Arrays) -> Arrays:
            request = encode(inputs)
            try:
                connection = idle.pop()
                response = send(request, connection)
            except (IndexError, ConnectionError):  # none is idle, or the server had closed it meanwhile
                connection = http.client.HTTPConnection("127.0.0.1", port)
                stack.callback(connection.close)
                response = send(request, connection)
            body = response.read()
            if response.status != http.HTTPStatus.OK:
                raise RuntimeError(f"{response.status}: {body[:200]!r}")
            idle.append(connection)
            return _outputs(body, names, len(inputs["HE"]), manifest.tile)

        yield None, call


def _outputs(body: bytes, names: Sequence[str], batch: int, tile: int) -> Arrays:
    outputs = {}
    first = 0
    for name in names:
        channels = 3 if name.startswith("STAIN_") else 1
        last = first + batch * tile * tile * channels
        outputs[name] = np.frombuffer(body[first:last], np.uint8).reshape(batch, tile, tile, channels)
        first = last
    return outputs


def _random_batch(manifest: Manifest, batch: int, seed: int) -> Arrays:
    generator = np.random.default_rng(seed)
    return {
        "HE": generator.integers(0, 256, (batch, manifest.tile, manifest.tile, 3), dtype=np.uint8),
        "ORIGIN": generator.integers(-64, 64, (batch, 2)) * philox.ORIGIN_MULTIPLE,
        "SEED": generator.integers(0, 2**40, (batch, 1)),
    }
