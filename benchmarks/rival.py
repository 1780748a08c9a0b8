"""What a user would write instead of Triton: the same engines in one process, behind Starlette and uvicorn.

FastAPI is Starlette with validation, which raw bytes do not need. ``python -m staindiffuser.benchmarks.rival REPOSITORY
THREADS`` prints its port once it answers. ``POST /`` takes ``HE``, ``ORIGIN`` and ``SEED`` one after another as raw
bytes, and answers with the raw bytes of all outputs; noise, encoder and every branch are computed for each request.
"""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from staindiffuser.export import builders
from staindiffuser.export.loading import load_engines
from staindiffuser.export.manifest import Manifest, verify
from staindiffuser.export.parity import run_pipeline
from staindiffuser.triton_models.shared.cpus import available_cpus

if TYPE_CHECKING:
    from starlette.applications import Starlette

__all__ = ["decode", "encode", "load_pipeline", "output_names"]

Arrays = dict[str, np.ndarray]  # type: ignore[type-arg]


def output_names(manifest: Manifest) -> list[str]:
    """The outputs in the order of the answer."""
    return [f"{kind}_{stain.name}".upper() for stain in manifest.stains for kind in ("stain", "cells")]


def encode(inputs: Arrays) -> bytes:
    """A request's body."""
    return b"".join(np.ascontiguousarray(inputs[name]).tobytes() for name in ("HE", "ORIGIN", "SEED"))


def decode(body: bytes, tile: int) -> Arrays:
    """The inputs of a request's body."""
    size = tile * tile * 3
    batch = len(body) // (size + 24)
    he, rest = body[: batch * size], body[batch * size :]
    numbers = np.frombuffer(rest, np.int64)
    return {
        "HE": np.frombuffer(he, np.uint8).reshape(batch, tile, tile, 3),
        "ORIGIN": numbers[: 2 * batch].reshape(batch, 2),
        "SEED": numbers[2 * batch :].reshape(batch, 1),
    }


def load_pipeline(manifest: Manifest, repository: Path, threads: int) -> Callable[[Arrays], Arrays]:
    """What computes all outputs of a batch; may be called from several threads."""
    builder = builders.get(manifest.target)
    files = {name: repository / record.file for name, record in manifest.engines.items()}
    engines = load_engines(builder, files, threads=threads, flavour=manifest.flavour)
    # As many at a time as there are cores for; an OpenVINO engine takes one.
    at_once = max(1, available_cpus() // (threads or available_cpus())) if manifest.target == "onnxruntime" else 1
    slots = threading.Semaphore(at_once)

    def run(inputs: Arrays) -> Arrays:
        with slots:
            return run_pipeline(engines, manifest.engines, steps=manifest.steps, tile=manifest.tile, inputs=inputs)[1]

    return run


def _application(repository: Path, threads: int) -> Starlette:
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    manifest = verify(repository)
    run, names = load_pipeline(manifest, repository, threads), output_names(manifest)

    def compute(body: bytes) -> bytes:
        outputs = run(decode(body, manifest.tile))
        return b"".join(outputs[name].tobytes() for name in names)

    async def stain(request: Request) -> Response:
        answer = await run_in_threadpool(compute, await request.body())
        return Response(answer, media_type="application/octet-stream")

    return Starlette(routes=[Route("/", stain, methods=["POST"])])


def main(repository: Path, threads: int) -> None:
    """Serve until killed."""
    import uvicorn

    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    application = _application(repository, threads)
    sys.stdout.write(f"{listener.getsockname()[1]}\n")
    sys.stdout.flush()
    config = uvicorn.Config(application, log_level="error", access_log=False, lifespan="off")
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
