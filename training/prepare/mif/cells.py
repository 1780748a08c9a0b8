"""Cells from their nuclei, which of them carry a marker, and the coarse mask that the cell branch learns from.

A membrane marker is a ring, and a map of its pixels says 0.3 where the cell is positive. So the mask is of whole cells:
nuclei grown by a ring, positive where enough of the cell's area is.

A marker of the cytoplasm is judged by the cytoplasm alone, as image cytometry's compartments are. It is not in the
nucleus, which is most of a cell where nuclei are crowded: by their whole area, cells at the base of a gland would be
negative however strongly the gland is stained.

Shapes: H and W an image's height and width in pixels, N cells.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from staindiffuser.imaging.arrays import BoolArray, FloatArray, UInt8Array
from staindiffuser.imaging.nuclei import Labels, grown, label_means

__all__ = ["cell_mask"]

NEGATIVE_SHARE, POSITIVE_SHARE, SURE_SHARE = 0.2, 0.35, 0.5
"""Share of a cell's area above the threshold: up to the first it is surely negative, from the last surely positive;
between them nobody is sure, and the middle one decides for scores."""
CYTOPLASM_UM = 2.5
"""How far around its nucleus a cell's cytoplasm is looked at. (Ours: a network that knew neither agrees with the masks
of 2.5 and 3.5 µm alike, and less with those of 1.5 µm.)"""
LEAST_CYTOPLASM_UM2 = 5.0
"""A nucleus with less cytoplasm of its own than this is judged by its neighbourhood's."""
NEIGHBOURHOOD_UM = 3.0
CROWDED = 0.42
"""An unsure cell is positive where more than this of its neighbourhood is: nuclei of stained epithelium."""
EDGE = 1.2
"""Standard deviation of the Gaussian that makes the edges' ignore band, pixels."""
UNSURE_NEGATIVE, UNSURE_POSITIVE = 110, 145
"""Values within the ignore band: not learned from, but on the right side of 128 for scores."""


def cell_mask(nuclei: Labels, positive: BoolArray, mpp: float, *, cytoplasmic: bool = False) -> UInt8Array:
    """The coarse mask of a marker.

    Positive cells are 255, negative ones and what lies between cells 0, their edges blurred. Stained cytoplasm between
    cells is positive where most of its neighbourhood is stained; stray signal outside of any cell is nobody's, and
    unsure like the cells between the shares.

    Args:
        nuclei: int32 [H, W].
        positive: bool [H, W], the marker above its threshold.
        mpp: pixel size, µm.
        cytoplasmic: whether the marker is of the cytoplasm, such as a keratin.

    Returns:
        uint8 [H, W]; ≤ 25 and ≥ 230 are labels, the rest is the ignore band.
    """
    cells = grown(nuclei, mpp)
    shares = _cytoplasm_shares(nuclei, positive, mpp) if cytoplasmic else label_means(cells, positive)
    share = np.concatenate([[0.0], shares])[cells]
    inside = cells > 0
    crowded = _neighbourhood(positive, mpp) > CROWDED
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


def _cytoplasm_shares(nuclei: Labels, positive: BoolArray, mpp: float) -> NDArray[np.float64]:
    """Share of the cytoplasm around each nucleus that is positive, [N]."""
    outside = nuclei == 0
    cytoplasm = np.where(outside, grown(nuclei, mpp, ring_um=CYTOPLASM_UM), 0)
    count = int(nuclei.max(initial=0))
    area = np.bincount(cytoplasm.ravel(), minlength=count + 1)[1:]
    stained = np.bincount(cytoplasm.ravel(), weights=positive.ravel(), minlength=count + 1)[1:]
    around = _neighbourhood(positive & outside, mpp) / np.maximum(_neighbourhood(outside, mpp), 1e-3)
    enough = area * mpp**2 >= LEAST_CYTOPLASM_UM2
    shares: NDArray[np.float64] = np.where(enough, stained / np.maximum(area, 1), label_means(nuclei, around))
    return shares


def _neighbourhood(where: BoolArray, mpp: float) -> FloatArray:
    """The share of each pixel's neighbourhood that is."""
    share: FloatArray = ndimage.gaussian_filter(where.astype(np.float32), NEIGHBOURHOOD_UM / mpp)
    return share
