"""Operations on binary masks."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from staindiffuser.imaging.arrays import BoolArray

__all__ = ["without_small"]


def without_small(mask: BoolArray, smallest: float, *, diagonal: bool = False) -> BoolArray:
    """Drop the connected parts of a mask that are below ``smallest`` pixels.

    Args:
        mask: bool [H, W].
        smallest: area from which a part is kept, pixels.
        diagonal: whether pixels that touch at a corner are connected.

    Returns:
        bool [H, W].
    """
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)) if diagonal else None)
    if count == 0:
        return mask
    keep = np.bincount(labels.ravel(), minlength=count + 1) >= smallest
    keep[0] = False
    kept: BoolArray = keep[labels]
    return kept
