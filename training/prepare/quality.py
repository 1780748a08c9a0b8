"""Which tiles may be trained on, and why the others not."""

from __future__ import annotations

from enum import StrEnum

import cv2
import numpy as np
from scipy import ndimage

from staindiffuser.imaging.arrays import BoolArray, FloatArray, UInt8Array
from staindiffuser.training.prepare.registration.features import Structure, band_passed

__all__ = ["LEAST_SHARPNESS", "Fit", "Reason", "fit_of", "present", "sharpness"]


LEAST_SHARPNESS = 0.2
"""Tiles less sharp than this are blurred: slides and crops at 0.5 µm measure 0.30 to 0.75, and at most 0.21 after a
Gaussian of 3 px (ours)."""
LEAST_FIT = 0.1
"""Correlation of band-passed hematoxylin around a tile below which it is misregistered. Ours: on next sections, nine in
ten places are below it when moved by 16 pixels of the registration, and one in ten is where it is right."""
LARGEST_SHIFT = 4.0
"""Distance, pixels of the registration, from which a tile that would fit better elsewhere is misregistered (ours)."""
_REACH = 12
"""How far around a tile to look for a better place, pixels of the registration."""
_WINDOW = 96
"""Smallest side of what is compared, pixels of the registration."""
_FIT_BAND = (1.5, 12.0)
_BETTER = 0.1
"""By how much the correlation must be higher elsewhere: chance peaks are not."""
_PRESENT = 0.7
"""Share of a tile's tissue that the IHC must have too."""
_NEAR = 8
"""Tissue as near as this, pixels of the registration, is there: sections do not share every thread of fat or lung."""


class Reason(StrEnum):
    """Why a tile is dropped."""

    blank = "blank"
    """Hardly any tissue in the H&E."""
    ihc_missing = "ihc_missing"
    """Tissue in the H&E that the IHC has not: torn, folded away, or off its slide."""
    blurred = "blurred"
    """Either image is out of focus."""
    misregistered = "misregistered"
    """The two do not fit there, or fit better elsewhere."""


def sharpness(rgb: UInt8Array) -> float:
    """Contrast of details of 1 to 2 pixels against those of 2 to 6: uint8 [H, W, 3] to 0 (blurred) … 1."""
    grey = rgb.mean(axis=-1, dtype=np.float32)
    fine, coarse = band_passed(grey, 1, 2), band_passed(grey, 2, 6)
    return float(fine.std() / (coarse.std() + 1.0))


def present(he_tissue: BoolArray, ihc_tissue: BoolArray) -> bool:
    """Whether the IHC has the tissue that the H&E has; both [H, W]."""
    near = ndimage.binary_dilation(ihc_tissue, iterations=_NEAR)
    return int((he_tissue & near).sum()) >= _PRESENT * int(he_tissue.sum())


class Fit:
    """How well a registered IHC region fits its H&E, tile by tile."""

    def __init__(self, he: Structure, ihc: Structure) -> None:
        """Prepare a region.

        Args:
            he, ihc: on one grid.
        """
        self._images = tuple(band_passed(part.hematoxylin, *_FIT_BAND) for part in (he, ihc))

    def at(self, x: int, y: int, side: int) -> tuple[float, float, float]:
        """See :func:`fit_of`; the window is the tile and half of it around, or as much as it takes to tell."""
        margin = max(side // 2, (_WINDOW - side) // 2)
        height, width = self._images[0].shape
        x0, y0 = max(0, x - margin), max(0, y - margin)
        x1, y1 = min(width, x + side + margin), min(height, y + side + margin)
        return fit_of(*(image[y0:y1, x0:x1] for image in self._images))

    def misregistered(self, x: int, y: int, side: int) -> bool:
        """Whether the tile at (x, y) does not fit."""
        here, best, distance = self.at(x, y, side)
        return here < LEAST_FIT or (distance > LARGEST_SHIFT and best > here + _BETTER)


def fit_of(he: FloatArray, ihc: FloatArray) -> tuple[float, float, float]:
    """How two band-passed images [H, W] of one place fit.

    Returns:
        Their correlation, the best one when the H&E is moved by up to 12 pixels, and the distance moved for it, pixels.
        0 where the image is too small to move.
    """
    height, width = he.shape
    if min(height, width) <= 2 * _REACH + 8:
        return 0.0, 0.0, 0.0
    inner = np.ascontiguousarray(he[_REACH : height - _REACH, _REACH : width - _REACH])
    likeness = cv2.matchTemplate(np.ascontiguousarray(ihc), inner, cv2.TM_CCOEFF_NORMED)
    _, best, _, (column, row) = cv2.minMaxLoc(likeness)
    return float(likeness[_REACH, _REACH]), float(best), float(np.hypot(column - _REACH, row - _REACH))
