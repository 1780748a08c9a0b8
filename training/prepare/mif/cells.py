"""Cells from their nuclei, which of them carry a marker, and the coarse mask that the cell branch learns from.

A membrane marker is a ring, and a map of its pixels says 0.3 where the cell is positive. So the mask is of whole cells:
nuclei grown by a ring, positive where enough of the cell's area is.

Shapes: H and W an image's height and width in pixels, N cells.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from staindiffuser.imaging.arrays import BoolArray, FloatArray, UInt8Array
from staindiffuser.imaging.nuclei import Labels, label_means

__all__ = ["POSITIVE_SHARE", "cell_mask", "positive_shares"]

NEGATIVE_SHARE, POSITIVE_SHARE, SURE_SHARE = 0.2, 0.35, 0.5
"""Share of a cell's area above the threshold: up to the first it is surely negative, from the last surely positive;
between them nobody is sure, and the middle one decides for scores."""
NEIGHBOURHOOD_UM = 3.0
CROWDED = 0.42
"""An unsure cell is positive where more than this of its neighbourhood is: nuclei of stained epithelium."""
EDGE = 1.2
"""Standard deviation of the Gaussian that makes the edges' ignore band, pixels."""
UNSURE_NEGATIVE, UNSURE_POSITIVE = 110, 145
"""Values within the ignore band: not learned from, but on the right side of 128 for scores."""


def positive_shares(cells: Labels, positive: BoolArray) -> NDArray[np.float64]:
    """Share of each cell's area that is positive, [N]."""
    return label_means(cells, positive)


def cell_mask(cells: Labels, positive: BoolArray, mpp: float) -> UInt8Array:
    """The coarse mask of a marker.

    Positive cells are 255, negative ones and what lies between cells 0, their edges blurred. Stained cytoplasm between
    cells is positive where most of its neighbourhood is stained; stray signal outside of any cell is nobody's, and
    unsure like the cells between the shares.

    Args:
        cells: int32 [H, W], nuclei grown by a ring.
        positive: bool [H, W], the marker above its threshold.
        mpp: pixel size, µm.

    Returns:
        uint8 [H, W]; ≤ 25 and ≥ 230 are labels, the rest is the ignore band.
    """
    share = np.concatenate([[0.0], positive_shares(cells, positive)])[cells]
    inside = cells > 0
    crowded = ndimage.gaussian_filter(positive.astype(np.float32), NEIGHBOURHOOD_UM / mpp) > CROWDED
    sure = inside & (share >= SURE_SHARE)
    unsure = inside & (share > NEGATIVE_SHARE) & (share < SURE_SHARE)
    whole = sure | (unsure & crowded) | (positive & crowded)
    unsure &= ~whole
    edged: FloatArray = ndimage.gaussian_filter(ndimage.binary_opening(whole).astype(np.float32), EDGE)
    mask = np.rint(edged * 255.0)
    mask = np.where(unsure, np.where(share >= POSITIVE_SHARE, UNSURE_POSITIVE, UNSURE_NEGATIVE), mask)
    stray = positive & ~inside & ~whole
    mask = np.where(stray, np.clip(mask, UNSURE_NEGATIVE, UNSURE_POSITIVE), mask)
    return mask.astype(np.uint8)
