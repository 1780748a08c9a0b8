"""Checks of this machine before a server is started."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from staindiffuser.export.manifest import Manifest
from staindiffuser.export.wire import wire_inputs, wire_outputs
from staindiffuser.serving.errors import ServerMissingError

__all__ = ["SHARED_MEMORY", "require_shared_memory"]

SHARED_MEMORY = Path("/dev/shm")


def _tensor_bytes(manifest: Manifest) -> int:
    """Bytes of all tensors that enter or leave a process, at the largest batch."""
    if manifest.flavour == "single":
        tensors = [*wire_inputs(manifest.tile), *wire_outputs(manifest)]
    else:
        tensors = [t for engine in manifest.engines.values() for t in (*engine.inputs, *engine.outputs)]
    return manifest.max_batch * sum(math.prod(t.shape) * np.dtype(t.dtype).itemsize for t in tensors)


def require_shared_memory(manifests: Sequence[Manifest]) -> None:
    """Check that /dev/shm is large enough: the Python backend passes tensors through it, and containers make it small.

    Args:
        manifests: of the repositories that are to be served together.

    Raises:
        ServerMissingError: there is none, or too little is free.
    """
    if not SHARED_MEMORY.is_dir():
        raise ServerMissingError(f"{SHARED_MEMORY} is missing: Triton's Python backend needs it")
    needed = sum(int(1.25 * _tensor_bytes(m)) + (1 << 20) * (len(m.engines) + 1) for m in manifests)
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < needed:
        raise ServerMissingError(
            f"{SHARED_MEMORY} has {free >> 20} MiB free, but {needed >> 20} MiB are needed at batch "
            f"{max(m.max_batch for m in manifests)}: give the container more (docker run --shm-size) or build with a "
            "smaller --max-batch"
        )
