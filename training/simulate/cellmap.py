"""Cells drawn into pixels: which cell is nearest, and how far its nucleus' edge is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from staindiffuser.imaging.arrays import FloatArray
from staindiffuser.training.simulate.cells import Cells, Kind

__all__ = ["AROUND", "OUTSIDE", "CellMap", "draw_cells", "draw_discs"]

OUTSIDE = np.float32(30.0)
"""Distance where no nucleus is near, pixels."""
AROUND = 8
"""How far around the nucleus of an epithelial cell or a macrophage the cell is drawn, pixels."""
_AROUND_OTHERS = 5
_PATCHES = (16, 20, 24, 28, 32, 40, 48, 64)


@dataclass(frozen=True)
class CellMap:
    """Of a box of pixels [H, W]."""

    cell: npt.NDArray[np.int32]
    """Index of the cell whose nucleus is nearest; the number of cells where none is near."""
    edge: FloatArray
    """Distance to its nucleus' edge, pixels: negative inside."""


def draw_cells(cells: Cells, box: tuple[int, int, int, int]) -> CellMap:
    """Draw the nuclei of ``cells`` into a box of world pixels (x0, y0, x1, y1)."""
    x0, y0, x1, y1 = box
    pad = _PATCHES[-1]
    shape = (y1 - y0 + 2 * pad, x1 - x0 + 2 * pad)
    edge = np.full(shape, OUTSIDE, np.float32)
    cell = np.full(shape, len(cells), np.int32)
    column = np.floor(cells.x).astype(np.int64) - x0 + pad
    row = np.floor(cells.y).astype(np.int64) - y0 + pad
    wide = (cells.kind <= Kind.SQUAMOUS) | (cells.kind == Kind.MACROPHAGE)
    around = np.where(wide, AROUND, _AROUND_OTHERS)
    half = np.ceil(cells.length + around).astype(np.int64)
    touches = (
        (column + half > pad) & (row + half > pad) & (column - half < shape[1] - pad) & (row - half < shape[0] - pad)
    )
    size = np.array(_PATCHES)[np.minimum(np.searchsorted(_PATCHES, 2 * half), len(_PATCHES) - 1)]
    for patch in _PATCHES:
        chosen = np.flatnonzero(touches & (size == patch))
        if not len(chosen):
            continue
        distances = _nuclei(cells, chosen, patch, around[chosen])
        tops, lefts = (row[chosen] - patch // 2).tolist(), (column[chosen] - patch // 2).tolist()
        for index, top, left, distance in zip(chosen.tolist(), tops, lefts, distances, strict=True):
            view = edge[top : top + patch, left : left + patch]
            nearer = distance < view
            np.copyto(view, distance, where=nearer)
            np.copyto(cell[top : top + patch, left : left + patch], index, where=nearer)
    return CellMap(cell=cell[pad:-pad, pad:-pad], edge=edge[pad:-pad, pad:-pad])


def _nuclei(cells: Cells, chosen: npt.NDArray[np.int64], patch: int, around: npt.NDArray[np.int64]) -> FloatArray:
    """Distances to the edges of some nuclei, float32 [n, patch, patch]."""
    grid = np.arange(patch, dtype=np.float32) - patch // 2 + 0.5
    dx = grid[None, None, :] - (cells.x[chosen] % 1)[:, None, None]
    dy = grid[None, :, None] - (cells.y[chosen] % 1)[:, None, None]
    cos, sin = (f(cells.angle[chosen])[:, None, None].astype(np.float32) for f in (np.cos, np.sin))
    a, b = cells.length[chosen][:, None, None], cells.width[chosen][:, None, None]
    ua = (dx * cos + dy * sin) / a
    vb = (dy * cos - dx * sin) / b
    # Curved like a bean, and thicker at one end.
    curvature, taper = ((cells.numbers[i][chosen] - np.float32(0.5))[:, None, None] for i in (0, 3))
    vb += curvature * np.float32(0.45) * (ua * ua - np.float32(0.4))
    vb *= 1 + np.float32(0.3) * taper * ua
    ua *= ua
    vb *= vb
    square = ua + vb
    r = np.sqrt(square)
    # First-order distance to the level set r = 1: (r² - 1) / 2 over the slope of r² / 2 (Taubin 1991).
    ua /= a * a
    vb /= b * b
    ua += vb
    np.sqrt(ua, out=ua)
    outside = r * (r - 1) / (ua + np.float32(1e-6))
    distance: FloatArray = np.where(square < 1, (r - 1) * b, outside)
    distance[distance > around[:, None, None]] = OUTSIDE
    return distance


def draw_discs(x: FloatArray, y: FloatArray, radius: FloatArray, box: tuple[int, int, int, int]) -> FloatArray:
    """Distance into the nearest of some discs, pixels, float32 [H, W]; -30 where none is near."""
    x0, y0, x1, y1 = box
    inner = np.full((y1 - y0, x1 - x0), -OUTSIDE, np.float32)
    for cx, cy, r in zip((x - x0).tolist(), (y - y0).tolist(), radius.tolist(), strict=True):
        reach = int(r) + 3
        left, top = max(int(cx) - reach, 0), max(int(cy) - reach, 0)
        right, bottom = min(int(cx) + reach + 1, x1 - x0), min(int(cy) + reach + 1, y1 - y0)
        if left >= right or top >= bottom:
            continue
        dx = np.arange(left, right, dtype=np.float32) + np.float32(0.5 - cx)
        dy = np.arange(top, bottom, dtype=np.float32) + np.float32(0.5 - cy)
        view = inner[top:bottom, left:right]
        np.maximum(view, np.float32(r) - np.sqrt(dx[None] ** 2 + dy[:, None] ** 2), out=view)
    return inner
