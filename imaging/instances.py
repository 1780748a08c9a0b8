"""Cells as instances: their middles by watershed, and how many of two sets of them are the same cells.

The recipe is the one by which the client finds the cells that it writes as GeoJSON, so the score speaks of those.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching
from scipy.spatial.distance import cdist
from skimage.feature import peak_local_max
from skimage.segmentation import watershed

__all__ = ["MATCH_UM", "cell_centroids", "count_matches"]

MATCH_UM = 6.0
"""Two middles at most this far apart may be the same cell (DESIGN, "The mathematics")."""
PROBABILITY = 128
"""Of 255, from which a pixel belongs to a cell."""
SMALLEST_UM2 = 12.0
"""A lymphocyte's nucleus has about 30 µm²; below this it is a speck."""
APART_UM = 3.0
"""Two cells' middles are at least this far apart."""


def cell_centroids(map_HW: NDArray[np.uint8], mpp: float) -> NDArray[np.float64]:
    """The centroids of a map's cells: watershed of the distance to the edge, from its peaks.

    Args:
        map_HW: cell map or coarse mask; from 128 on a pixel belongs to a cell.
        mpp: pixel size, µm.

    Returns:
        [N, 2] row and column, µm.
    """
    positive = map_HW >= PROBABILITY
    if not positive.any():
        return np.zeros((0, 2))
    distance = ndimage.gaussian_filter(ndimage.distance_transform_edt(positive).astype(np.float32), 1.0)
    apart = max(1, round(APART_UM / mpp))
    peaks_N2 = peak_local_max(distance, min_distance=apart, labels=positive.astype(np.int32), exclude_border=False)
    markers = np.zeros(map_HW.shape, dtype=np.int32)
    markers[tuple(peaks_N2[np.lexsort((peaks_N2[:, 1], peaks_N2[:, 0]))].T)] = np.arange(1, len(peaks_N2) + 1)
    labels = watershed(-distance, markers, mask=positive)
    rows, columns = np.nonzero(labels)
    label = labels[rows, columns]
    areas = np.bincount(label, minlength=len(peaks_N2) + 1)
    keep = areas * mpp**2 >= SMALLEST_UM2
    sums = np.stack([np.bincount(label, place, minlength=len(areas)) for place in (rows, columns)], axis=1)
    middles: NDArray[np.float64] = sums[keep] / areas[keep, None] * mpp
    return middles


def count_matches(a_N2: NDArray[np.float64], b_M2: NDArray[np.float64], *, within: float = MATCH_UM) -> int:
    """The largest number of pairs, each point used once, that are at most ``within`` apart (Hopcroft and Karp 1973)."""
    if not len(a_N2) or not len(b_M2):
        return 0
    near = csr_array(cdist(a_N2, b_M2) <= within)
    return int((maximum_bipartite_matching(near, perm_type="column") >= 0).sum())
