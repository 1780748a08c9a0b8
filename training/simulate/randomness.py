"""Random numbers that belong to a position: the same whatever is drawn before, after, or by whom.

A world's parameters come from NumPy's Philox, keyed by (seed, world). What lies at a lattice cell (a gland, a nucleus)
comes from an integer hash of (key, salt, cell): it is vectorised over cells, and exact on every machine.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from staindiffuser.imaging.arrays import FloatArray

__all__ = ["jittered", "stream", "uniforms"]

IntArray = npt.NDArray[np.int64]


def stream(*key: int) -> np.random.Generator:
    """A generator keyed by non-negative integers, independent of every other key's."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Finaliser of SplitMix64 (Steele, Lea and Flood 2014): every input bit flips every output bit half the time."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(key: int, salt: int, ix: npt.NDArray[Any], iy: npt.NDArray[Any], count: int) -> FloatArray:
    """Uniform numbers of lattice cells.

    Args:
        key: the world's, 64 bits.
        salt: which layer of the world.
        ix: column of each cell, int [N].
        iy: row of each cell, int [N].
        count: numbers per cell.

    Returns:
        float32 [count, N] in [0, 1).
    """
    with np.errstate(over="ignore"):
        cell = _mix(
            ix.astype(np.int64).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key & (2**64 - 1))
        )
        cell = _mix(cell ^ (iy.astype(np.int64).astype(np.uint64) * np.uint64(0xC2B2AE3D27D4EB4F) + np.uint64(salt)))
        steps = np.arange(1, count + 1, dtype=np.uint64)[:, None] * np.uint64(0x9E3779B97F4A7C15)
        numbers = _mix(cell[None, :] + steps)
    return ((numbers >> np.uint64(40)).astype(np.float32)) * np.float32(2.0**-24)


def jittered(
    key: int, salt: int, spacing: float, box: tuple[float, float, float, float], *, jitter: float = 1.0, count: int = 6
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Points of a jittered lattice inside a box.

    Args:
        key: the world's.
        salt: which layer.
        spacing: of the lattice, pixels.
        box: x0, y0, x1, y1; every point whose lattice cell touches the box is given.
        jitter: share of its lattice cell over which a point is spread.
        count: further uniform numbers per point.

    Returns:
        x [N], y [N] in world pixels, and uniform numbers [count, N].
    """
    x0, y0, x1, y1 = box
    columns = np.arange(int(np.floor(x0 / spacing)) - 1, int(np.floor(x1 / spacing)) + 2)
    rows = np.arange(int(np.floor(y0 / spacing)) - 1, int(np.floor(y1 / spacing)) + 2)
    iy, ix = (a.ravel() for a in np.meshgrid(rows, columns, indexing="ij"))
    numbers = uniforms(key, salt, ix, iy, count + 2)
    x = ((ix + 0.5) + (numbers[0] - 0.5) * jitter) * spacing
    y = ((iy + 0.5) + (numbers[1] - 0.5) * jitter) * spacing
    return x.astype(np.float32), y.astype(np.float32), numbers[2:]
