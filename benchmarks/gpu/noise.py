"""Step ``noise``: compares the GPU's noise with NumPy's, bit for bit, and times it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from staindiffuser.benchmarks.gpu.options import GpuOptions, StepResult
from staindiffuser.triton_models.noise import philox
from staindiffuser.triton_models.noise.philox_gpu import GpuNoise

__all__ = ["run"]

STEPS = (1, 2, 4)
SEEDS = np.array([[0], [-7], [2**40 + 3]])
ORIGINS = np.array([[-48, 16], [2**32 - 16, -(2**33)], [4096, 8192]])
"""Including negative origins and origins beyond 32 bits."""


def run(options: GpuOptions, result: StepResult) -> None:
    """Compare and time; in a rehearsal on a CPU, NumPy takes the GPU's place."""
    maker = None if options.device == "cpu" else result.attempt("CuPy", GpuNoise)
    if options.device == "cuda" and maker is None:
        return
    make: Callable[..., Any] = maker.tile_noise if maker else philox.tile_noise
    result.data["maker"] = "CuPy" if maker else "NumPy (rehearsal)"
    same: dict[str, bool] = {}
    milliseconds: dict[str, float] = {}
    result.data.update(bit_for_bit=same, milliseconds_a_tile=milliseconds)
    for steps in STEPS:
        same.update(result.attempt(f"{steps} steps", _compare, make, steps, options.tile) or {})
    result.errors += [f"{what} differ from NumPy's" for what, equal in same.items() if not equal]
    for batch in options.batches:
        spent = result.attempt(f"time at batch {batch}", _time, make, batch, options)
        if spent is not None:
            milliseconds[str(batch)] = spent
    result.data["numpy_milliseconds_a_tile"] = _time(philox.tile_noise, 1, options)


def _compare(make: Callable[..., Any], steps: int, tile: int) -> dict[str, bool]:
    same = {}
    for cells in (True, False):
        found = make(SEEDS, ORIGINS, steps=steps, height=tile, width=tile, cells=cells)
        wanted = philox.tile_noise(SEEDS, ORIGINS, steps=steps, height=tile, width=tile, cells=cells)
        for name, a, b in zip(("images", "cells"), found, wanted, strict=True):
            if b is not None:
                array = a.get() if hasattr(a, "get") else a
                # By their bits: -0 and 0 are not the same noise.
                label = f"{name}, {steps} steps{'' if cells else ', without cells'}"
                same[label] = bool(np.array_equal(array.view(np.uint16), b.view(np.uint16)))
    return same


def _time(make: Callable[..., Any], batch: int, options: GpuOptions) -> float:
    """Milliseconds per tile for one step; wall-clock time, since the noise is complete on return."""
    seeds, origins = np.arange(batch)[:, None], np.arange(2 * batch).reshape(batch, 2) * philox.ORIGIN_MULTIPLE
    arguments: dict[str, Any] = {"steps": 1, "height": options.tile, "width": options.tile}
    make(seeds, origins, **arguments)
    count, began = 0, time.perf_counter()
    while count < 3 or time.perf_counter() - began < options.seconds_each:
        make(seeds, origins, **arguments)
        count += 1
    return (time.perf_counter() - began) * 1e3 / count / batch
