"""What every rival serves: the engines of a repository in one process, and requests as raw bytes."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from staindiffuser.export import builders
from staindiffuser.export.loading import load_engines
from staindiffuser.export.manifest import Manifest, verify
from staindiffuser.export.parity import run_pipeline
from staindiffuser.triton_models.shared.cpus import available_cpus

__all__ = ["arguments", "decode", "encode", "load_answers", "load_pipeline", "output_names"]

Arrays = dict[str, np.ndarray]  # type: ignore[type-arg]
BINARY = "application/octet-stream"


def arguments() -> tuple[Path, int, int]:
    """Repository, threads and port of the command line."""
    repository, threads, port = sys.argv[1:]
    return Path(repository), int(threads), int(port)


def output_names(manifest: Manifest) -> list[str]:
    """The outputs in the order of the answer."""
    return [f"{kind}_{stain.name}".upper() for stain in manifest.stains for kind in ("stain", "cells")]


def encode(inputs: Arrays) -> bytes:
    """A request's body: ``HE``, ``ORIGIN`` and ``SEED`` one after another."""
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


def load_answers(repository: Path, threads: int) -> Callable[[bytes], bytes]:
    """From a request's body to the raw bytes of all outputs; may be called from several threads."""
    manifest = verify(repository)
    run, names = load_pipeline(manifest, repository, threads), output_names(manifest)

    def answer(body: bytes) -> bytes:
        outputs = run(decode(body, manifest.tile))
        return b"".join(outputs[name].tobytes() for name in names)

    return answer
