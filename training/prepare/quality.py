"""Which tiles are fit for training, and why the others are not."""

from __future__ import annotations

from enum import StrEnum

import cv2
import numpy as np
from scipy import ndimage

from staindiffuser.imaging.arrays import BoolArray, FloatArray, UInt8Array
from staindiffuser.training.prepare.registration.features import Structure, band_passed

__all__ = ["LEAST_SHARPNESS", "Fit", "Reason", "fit_of", "present", "sharpness"]


LEAST_SHARPNESS = 0.2
"""Tiles less sharp than this are blurred. Slides and crops at 0.5 µm measure 0.30 to 0.75, and at most 0.21 after a
Gaussian of 3 px (ours)."""
LEAST_FIT = 0.1
"""Correlation of band-passed hematoxylin around a tile below which it is misregistered. Ours: on consecutive sections
nine in ten tiles fall below it when shifted by 16 pixels of the registration, one in ten when not shifted."""
LARGEST_SHIFT = 4.0
"""Shift of the best fit, pixels of the registration, above which a tile is misregistered (ours)."""
_REACH = 12
"""Largest shift tried for a better fit, pixels of the registration."""
_WINDOW = 96
"""Smallest side of the window compared, pixels of the registration."""
_FIT_BAND = (1.5, 12.0)
_BETTER = 0.1
"""How much higher the correlation must be elsewhere: a chance peak is not."""
_PRESENT = 0.7
"""Share of a tile's tissue that the IHC must show too."""
_NEAR = 8
"""Tissue within this distance counts, pixels of the registration: sections do not share every strand of fat or lung."""


class Reason(StrEnum):
    """Why a tile is dropped."""

    blank = "blank"
    """Hardly any tissue in the H&E."""
    ihc_missing = "ihc_missing"
    """Tissue in the H&E that the IHC lacks: torn, folded away, or off its slide."""
    blurred = "blurred"
    """Either image is out of focus."""
    misregistered = "misregistered"
    """The two do not fit, or fit better when shifted."""


def sharpness(rgb: UInt8Array) -> float:
    """Contrast of details of 1 to 2 pixels against those of 2 to 6: uint8 [H, W, 3] to 0 (blurred) … 1."""
    grey = rgb.mean(axis=-1, dtype=np.float32)
    fine, coarse = band_passed(grey, 1, 2), band_passed(grey, 2, 6)
    return float(fine.std() / (coarse.std() + 1.0))


def present(he_tissue: BoolArray, ihc_tissue: BoolArray) -> bool:
    """Whether the IHC shows the tissue that the H&E shows; both [H, W]."""
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
        """See :func:`fit_of`; the window is the tile and half of its side around it, or at least 96 pixels."""
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
    """How well two band-passed images [H, W] of one region fit.

    Returns:
        Their correlation, the best one when the H&E is shifted by up to 12 pixels, and the length of that shift,
        pixels. All 0 where the image is too small to shift.
    """
    height, width = he.shape
    if min(height, width) <= 2 * _REACH + 8:
        return 0.0, 0.0, 0.0
    inner = np.ascontiguousarray(he[_REACH : height - _REACH, _REACH : width - _REACH])
    similarity = cv2.matchTemplate(np.ascontiguousarray(ihc), inner, cv2.TM_CCOEFF_NORMED)
    _, best, _, (column, row) = cv2.minMaxLoc(similarity)
    return float(similarity[_REACH, _REACH]), float(best), float(np.hypot(column - _REACH, row - _REACH))
