"""Cells as instances: the cells of a map by watershed, and how many cells two sets share.

What the client writes as GeoJSON and what evaluation scores are the same cells. Coordinates follow the convention of
slides: pixel 0 spans [0, 1), so its centre lies at 0.5.

Most of a map is no cell: the loops of :mod:`staindiffuser.imaging.cell_loops` visit only the pixels that are, and the
watershed only the regions that hold several peaks.

Shapes: H, W of a map; N peaks or cells.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from staindiffuser.imaging.arrays import BoolArray, FloatArray, UInt8Array
from staindiffuser.imaging.cell_loops import (
    Regions,
    connected_regions,
    distances_inside,
    flood,
    measure,
    peaks_inside,
    smooth_inside,
    without_twins,
)
from staindiffuser.imaging.outlines import Outlines, follow_outlines
from staindiffuser.imaging.peaks import distances_to_edge

__all__ = ["HALF", "MATCH_UM", "Cells", "cell_centroids", "count_matches", "find_cells", "lowest_grey"]

MATCH_UM = 6.0
"""Two centroids at most this far apart may be the same cell (docs, "The mathematics")."""
HALF = 0.5
"""Probability from which on a pixel belongs to a cell, unless the model says another one for its stain."""
SMALLEST_UM2 = 12.0
"""A lymphocyte's nucleus has about 30 µm²; what is smaller than this is a speck."""
APART_UM = 3.0
"""The peaks of two cells are at least this far apart."""
_REACH = 24
"""Pixels from which a region may still change the peaks of another: the Gaussian's four, and what they are apart."""
_DENSE = 0.4
"""Share of a map that the boxes of its regions cover from which on distances are computed everywhere at once."""
_GAUSSIAN = np.exp(-0.5 * np.arange(5.0) ** 2)
_WEIGHTS = tuple((_GAUSSIAN / (_GAUSSIAN[0] + 2 * _GAUSSIAN[1:].sum())).astype(np.float32))
"""Of a Gaussian of one pixel, cut at four, from the middle outwards."""


@dataclass(frozen=True, kw_only=True)
class Cells:
    """The cells of a map, from top to bottom by their innermost pixels."""

    centroids: NDArray[np.float64]
    """[N, 2] x, y, pixels; a pixel's centre is at + 0.5."""
    areas: NDArray[np.int64]
    """[N], pixels."""
    probabilities: NDArray[np.float64]
    """[N], mean of the map over the cell, 0 … 1."""
    outlines: Outlines
    """Of each cell, if they were asked for; else none."""

    @classmethod
    def none(cls) -> Cells:
        """No cells."""
        nothing = np.zeros(0)
        return cls(
            centroids=np.zeros((0, 2)), areas=nothing.astype(np.int64), probabilities=nothing, outlines=Outlines.none()
        )

    def __len__(self) -> int:
        return len(self.areas)


def lowest_grey(threshold: float) -> int:
    """The grey level, of 255, from which on a pixel of a cell map belongs to a cell: 128 for one half."""
    return math.ceil(255 * threshold)


def find_cells(
    map_HW: UInt8Array,
    mpp: float,
    within: tuple[int, int, int, int] | None = None,
    *,
    outlines: bool = True,
    threshold: float = HALF,
) -> Cells:
    """Split a map into cells: watershed of the distance to the edge, from its peaks.

    Args:
        map_HW: probability × 255, or a coarse mask.
        mpp: pixel size, µm.
        within: x0, y0, x1, y1; only cells whose centroid has x0 ≤ x < x1 and y0 ≤ y < y1.
        outlines: also follow their outlines.
        threshold: probability from which on a pixel belongs to a cell.
    """
    map_HW = _framed(map_HW)
    positive = map_HW >= lowest_grey(threshold)
    if not positive.any():
        return Cells.none()
    regions = connected_regions(positive, None if within is None else _near(within))
    distance = _distances(positive) if _is_dense(regions) else distances_inside(positive, regions)
    height = smooth_inside(distance, _WEIGHTS, regions)
    apart = max(1, round(APART_UM / mpp))
    peaks = without_twins(peaks_inside(height, regions, apart), height.shape, apart)
    flood(height, regions, peaks)
    areas, means, first = measure(map_HW, regions, len(peaks))
    centroids, probabilities = means[:, :2] + 0.5, means[:, 2] / 255
    keep = areas * mpp * mpp >= SMALLEST_UM2
    if within is not None:
        x, y = centroids.T
        keep &= (x >= within[0]) & (x < within[2]) & (y >= within[1]) & (y < within[3])
    kept = np.flatnonzero(keep)
    return Cells(
        centroids=centroids[kept],
        areas=areas[kept],
        probabilities=probabilities[kept],
        outlines=follow_outlines(regions.labels, kept.astype(np.int32) + 1, first[kept], areas[kept])
        if outlines
        else Outlines.none(),
    )


def cell_centroids(map_HW: UInt8Array, mpp: float, *, threshold: float = HALF) -> NDArray[np.float64]:
    """The centroids of a map's cells; see :func:`find_cells`.

    Returns:
        [N, 2] x, y, µm.
    """
    centroids: NDArray[np.float64] = find_cells(map_HW, mpp, outlines=False, threshold=threshold).centroids * mpp
    return centroids


def count_matches(a_N2: NDArray[np.float64], b_M2: NDArray[np.float64], *, within: float = MATCH_UM) -> int:
    """The largest number of pairs, each point used once, that are at most ``within`` apart (Hopcroft and Karp 1973)."""
    # Only evaluation counts; these take 30 MiB of a client's memory.
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import maximum_bipartite_matching
    from scipy.spatial.distance import cdist

    if not len(a_N2) or not len(b_M2):
        return 0
    near = csr_array(cdist(a_N2, b_M2) <= within)
    return int((maximum_bipartite_matching(near, perm_type="column") >= 0).sum())


def _near(within: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """What may hold or change a cell there: y0, x0, y1, x1 of the framed map."""
    x0, y0, x1, y1 = within
    return y0 + 1 - _REACH, x0 + 1 - _REACH, y1 + 1 + _REACH, x1 + 1 + _REACH


def _framed(map_HW: UInt8Array) -> UInt8Array:
    height, width = map_HW.shape
    framed = np.zeros((height + 2, width + 2), np.uint8)
    framed[1:-1, 1:-1] = map_HW
    return framed


def _is_dense(regions: Regions) -> bool:
    """Regions are large or lie in one another's boxes, or all the map is one."""
    height, width = regions.labels.shape
    y0, x0, y1, x1 = regions.boxes.T
    whole = int(regions.sizes.sum()) == (height - 2) * (width - 2)
    return whole or int(((y1 - y0) * (x1 - x0)).sum()) > _DENSE * height * width


def _distances(positive: BoolArray) -> FloatArray:
    """As :func:`distances_inside`, everywhere at once."""
    inside = positive[1:-1, 1:-1].view(np.uint8)
    # Without any edge the frame has to be one.
    whole = distances_to_edge(positive.view(np.uint8))[1:-1, 1:-1] if inside.all() else distances_to_edge(inside)
    return np.pad(whole, 1)
