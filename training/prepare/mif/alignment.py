"""Whether H&E and fluorescence show the same nuclei at the same coordinates, and the small shift that is left.

Shapes: H and W an image's height and width in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from scipy import ndimage

from staindiffuser.imaging.arrays import FloatArray

__all__ = ["Alignment", "align", "shifted"]

BLUR_UM = 1.0
"""Standard deviation of the Gaussian before comparing: nuclei, not their texture."""
REACH_UM = 4.0
"""How far the fluorescence may lie off; what lies further off was not registered."""
BETTER = 0.02
"""By how much the correlation must be higher elsewhere for the fluorescence to be moved."""


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """How a tile's fluorescence lies on its H&E."""

    shift: tuple[int, int]
    """(x, y) by which the fluorescence is moved to fit, pixels."""
    correlation: float
    """Of hematoxylin and DAPI after that, −1 to 1; 0 where either is empty."""


def align(hematoxylin: FloatArray, dapi: FloatArray, mpp: float) -> Alignment:
    """Compare hematoxylin's density with DAPI; both float32 [H, W]."""
    reach = round(REACH_UM / mpp)
    fixed, moving = (ndimage.gaussian_filter(np.asarray(v, np.float32), BLUR_UM / mpp) for v in (hematoxylin, dapi))
    if min(fixed.shape) <= 4 * reach or min(float(fixed.std()), float(moving.std())) < 1e-6:
        return Alignment(shift=(0, 0), correlation=0.0)
    inner = np.ascontiguousarray(moving[reach:-reach, reach:-reach])
    found = cv2.matchTemplate(fixed, inner, cv2.TM_CCOEFF_NORMED)
    _, best, _, (x, y) = cv2.minMaxLoc(found)
    here = float(found[reach, reach])
    if best > here + BETTER:
        return Alignment(shift=(x - reach, y - reach), correlation=float(best))
    return Alignment(shift=(0, 0), correlation=here)


def shifted(channels: FloatArray, shift: tuple[int, int]) -> FloatArray:
    """Channels [H, W, C] moved by (x, y) pixels, their edges repeated."""
    x, y = shift
    if not (x or y):
        return channels
    height, width = channels.shape[:2]
    rows, columns = np.clip(np.arange(height) - y, 0, height - 1), np.clip(np.arange(width) - x, 0, width - 1)
    moved: FloatArray = channels[rows[:, None], columns[None]]
    return moved
