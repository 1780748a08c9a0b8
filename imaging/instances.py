"""Cells as instances: the cells of a map by watershed, and how many cells two sets share.

What the client writes as GeoJSON and what evaluation scores are the same cells. Coordinates follow the convention of
slides: pixel 0 spans [0, 1), so its centre lies at 0.5.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching
from scipy.spatial.distance import cdist
from skimage.feature import peak_local_max
from skimage.segmentation import watershed

from staindiffuser.imaging.arrays import BoolArray, UInt8Array

__all__ = ["MATCH_UM", "Instances", "cell_centroids", "count_matches", "find_instances"]

MATCH_UM = 6.0
"""Two centroids at most this far apart may be the same cell (docs, "The mathematics")."""
PROBABILITY = 128
"""Of 255: from this value on a pixel belongs to a cell."""
SMALLEST_UM2 = 12.0
"""A lymphocyte's nucleus has about 30 µm²; what is smaller than this is a speck."""
APART_UM = 3.0
"""The peaks of two cells are at least this far apart."""


@dataclass(frozen=True, kw_only=True)
class Instances:
    """The regions of a map; each array but ``labels`` has one entry per label, that of label 0 meaning nothing."""

    labels: NDArray[np.int32]
    """[H, W], 0 where there is no cell."""
    centroids: NDArray[np.float64]
    """[N + 1, 2] x, y, pixels; a pixel's centre is at + 0.5."""
    areas: NDArray[np.int64]
    """[N + 1], pixels."""
    probabilities: NDArray[np.float64]
    """[N + 1], mean of the map over the region, 0 … 1."""
    is_cell: BoolArray
    """[N + 1], whether the region is large enough."""


def find_instances(map_HW: UInt8Array, mpp: float) -> Instances:
    """Split a map into cells: watershed of the distance to the edge, from its peaks.

    Args:
        map_HW: probability × 255, or a coarse mask; from 128 on a pixel belongs to a cell.
        mpp: pixel size, µm.

    Returns:
        The regions, labelled from top to bottom by their peaks.
    """
    positive = map_HW >= PROBABILITY
    if not positive.any():
        return Instances(
            labels=np.zeros(map_HW.shape, np.int32),
            centroids=np.zeros((1, 2)),
            areas=np.zeros(1, np.int64),
            probabilities=np.zeros(1),
            is_cell=np.zeros(1, bool),
        )
    distance = ndimage.gaussian_filter(ndimage.distance_transform_edt(positive).astype(np.float32), 1.0)
    apart = max(1, round(APART_UM / mpp))
    peaks_N2 = peak_local_max(distance, min_distance=apart, labels=positive.astype(np.int32), exclude_border=False)
    markers = np.zeros(map_HW.shape, dtype=np.int32)
    # Sorted by position: the labels must not depend on which peak is higher in another part of the map.
    order = np.lexsort((peaks_N2[:, 1], peaks_N2[:, 0]))
    markers[tuple(peaks_N2[order].T)] = np.arange(1, len(peaks_N2) + 1)
    labels: NDArray[np.int32] = watershed(-distance, markers, mask=positive)
    rows, columns = np.nonzero(labels)
    label_P = labels[rows, columns]
    areas = np.bincount(label_P, minlength=len(peaks_N2) + 1)
    x, y, probability = (
        np.bincount(label_P, values, minlength=len(areas)) / np.maximum(1, areas)
        for values in (columns, rows, map_HW[rows, columns])
    )
    return Instances(
        labels=labels,
        centroids=np.stack([x, y], axis=-1) + 0.5,
        areas=areas,
        probabilities=probability / 255,
        is_cell=areas * mpp * mpp >= SMALLEST_UM2,
    )


def cell_centroids(map_HW: UInt8Array, mpp: float) -> NDArray[np.float64]:
    """The centroids of a map's cells; see :func:`find_instances`.

    Returns:
        [N, 2] x, y, µm.
    """
    found = find_instances(map_HW, mpp)
    centroids: NDArray[np.float64] = found.centroids[found.is_cell] * mpp
    return centroids


def count_matches(a_N2: NDArray[np.float64], b_M2: NDArray[np.float64], *, within: float = MATCH_UM) -> int:
    """The largest number of pairs, each point used once, that are at most ``within`` apart (Hopcroft and Karp 1973)."""
    if not len(a_N2) or not len(b_M2):
        return 0
    near = csr_array(cdist(a_N2, b_M2) <= within)
    return int((maximum_bipartite_matching(near, perm_type="column") >= 0).sum())
