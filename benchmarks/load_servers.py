"""The servers that ``bench load`` compares, ours and its rivals: each started, and behind one function to call."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from staindiffuser.benchmarks.rivals import Rival
from staindiffuser.benchmarks.rivals.pipeline import BINARY, encode, output_names
from staindiffuser.errors import DependencyError
from staindiffuser.export.manifest import Manifest
from staindiffuser.export.wire import ENSEMBLE
from staindiffuser.serving.metrics import read_metrics
from staindiffuser.serving.runtime import find_runtime
from staindiffuser.serving.server import TritonServer
from staindiffuser.triton_models.noise import philox
from staindiffuser.triton_models.shared.meters import SECONDS

__all__ = ["Account", "Arrays", "Call", "Side", "random_batch", "rival_side", "triton_side"]

Arrays = dict[str, np.ndarray[Any, Any]]
Call = Callable[[Arrays], Arrays]
Account = Callable[[], Mapping[str, Mapping[str, float]]]
"""A server's own account of what took how long."""
Side = tuple[Call, Account]
_PATIENCE = 120.0
"""Seconds that a server may take to answer its first request."""
_MESSAGE_BYTES = 1 << 30
_METERS = 2 * SECONDS
"""After which the server has told what it has done."""


@contextlib.contextmanager
def triton_side(repository: Path, manifest: Manifest, threads: int) -> Iterator[Side]:
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
def rival_side(rival: Rival, repository: Path, manifest: Manifest, threads: int) -> Iterator[Side]:
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
        request = random_batch(manifest, 1, 0)
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


def random_batch(manifest: Manifest, batch: int, seed: int) -> Arrays:
    generator = np.random.default_rng(seed)
    return {
        "HE": generator.integers(0, 256, (batch, manifest.tile, manifest.tile, 3), dtype=np.uint8),
        "ORIGIN": generator.integers(-64, 64, (batch, 2)) * philox.ORIGIN_MULTIPLE,
        "SEED": generator.integers(0, 2**40, (batch, 1)),
    }
