"""How the cells of a slide are distributed: a map of their density, and how it varies."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from staindiffuser.viewer.cell_index import CellIndex

__all__ = ["DensityMap", "density_maps"]

SQUARES = 48
"""Squares along the longer side of a slide, at most."""
LEAST_UM = 100.0
"""Side of a square at least, µm: smaller ones would hold single cells."""


@dataclass(frozen=True, kw_only=True)
class DensityMap:
    """Cells of one class per mm², in squares."""

    per_mm2: NDArray[np.float64]
    """[rows, columns]."""
    side_um: float
    """Side of a square, µm."""

    def quantiles(self) -> tuple[float, float, float]:
        """Tenth percentile, median and ninetieth of the squares that hold cells; zeros if none do."""
        held = self.per_mm2[self.per_mm2 > 0]
        if not len(held):
            return 0.0, 0.0, 0.0
        low, middle, high = np.percentile(held, (10, 50, 90))
        return float(low), float(middle), float(high)

    def png(self, colour: str, most: float) -> bytes:
        """The map, one pixel per square: from white to ``colour`` at ``most`` cells per mm²."""
        rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        strength = np.clip(self.per_mm2 / max(most, 1e-9), 0, 1)[..., None]
        pixels = np.rint(255 + strength * (rgb - 255)).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()


def density_maps(index: CellIndex, size: tuple[int, int], mpp: tuple[float, float]) -> dict[str, DensityMap]:
    """The maps of all classes, by name.

    Args:
        index: the cells.
        size: width and height of the slide, level-0 pixels.
        mpp: µm per level-0 pixel.
    """
    side = max(max(size) / SQUARES, LEAST_UM / float(np.sqrt(mpp[0] * mpp[1])))
    columns, rows = int(np.ceil(size[0] / side)), int(np.ceil(size[1] / side))
    kind, _, centroid = index.within(-1e9, -1e9, 1e9, 1e9)
    place = np.clip((centroid // side).astype(np.int64), 0, [columns - 1, rows - 1])
    flat = (kind.astype(np.int64) * rows + place[:, 1]) * columns + place[:, 0]
    counts = np.bincount(flat, minlength=len(index.classes) * rows * columns).reshape(-1, rows, columns)
    area = side * side * mpp[0] * mpp[1] / 1e6
    side_um = side * float(np.sqrt(mpp[0] * mpp[1]))
    return {
        one.name: DensityMap(per_mm2=counts[number] / area, side_um=side_um) for number, one in enumerate(index.classes)
    }
