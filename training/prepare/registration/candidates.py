"""Candidate registrations: every rotation is tried, and its shift found by masked cross-correlation.

Padfield, "Masked object registration in the Fourier domain", IEEE TIP 21 (2012): the normalised cross-correlation of
two images for every shift at once, counting only pixels that lie in both masks. A torn or missing part of a section
does not count against the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
from scipy import fft

from staindiffuser.imaging.arrays import FloatArray
from staindiffuser.training.prepare.registration.features import Structure, band_passed
from staindiffuser.training.prepare.registration.resampling import reduced, rotated

__all__ = ["Candidate", "find_candidates"]

Affine = npt.NDArray[np.float64]

SIDE = 256
"""Long side of the images compared, pixels."""
ANGLE_STEP = 5.0
"""Degrees between the rotations tried."""
LEAST_OVERLAP = 0.3
"""Share of the smaller tissue area that must overlap tissue of the other section."""
DISTINCT_ANGLE = 12.0
"""Candidates closer than this, degrees, count as one."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A rotation and a shift."""

    matrix: Affine
    """[2, 3], pixels of the fixed image to pixels of the moving one."""
    angle: float
    """Rotation, degrees."""
    peak: float
    """Masked correlation times the share of overlap."""


def find_candidates(fixed: Structure, moving: Structure, *, count: int = 3) -> list[Candidate]:
    """The most promising rotations and shifts, best first.

    Args:
        fixed, moving: at the same pixel size.
        count: how many at most.
    """
    scale = min(1.0, SIDE / max(fixed.tissue.shape + moving.tissue.shape))
    still = _Fixed(*_small(fixed, scale), largest=_diagonal(moving, scale))
    image, mask = _small(moving, scale)
    height, width = mask.shape
    side = _diagonal(moving, scale)
    found = []
    for angle in np.arange(0.0, 360.0, ANGLE_STEP):
        centre = ((width - 1) / 2, (height - 1) / 2)
        rotation = np.asarray(cv2.getRotationMatrix2D(centre, float(angle), 1.0), np.float64)
        rotation[:, 2] += (side - width) / 2, (side - height) / 2
        there = (rotated(mask, rotation, side) > 0.5).astype(np.float32)
        peak, shift = still.best_shift(rotated(image, rotation, side), there)
        rotation[:, 2] += shift
        found.append(Candidate(matrix=_full_size(rotation, scale), angle=float(angle), peak=peak))
    found.sort(key=lambda candidate: -candidate.peak)
    chosen: list[Candidate] = []
    for candidate in found:
        if all(abs((candidate.angle - other.angle + 180) % 360 - 180) >= DISTINCT_ANGLE for other in chosen):
            chosen.append(candidate)
        if len(chosen) == count:
            break
    return chosen


class _Fixed:
    """The Fourier transforms of the fixed image, used for every rotation."""

    def __init__(self, image: FloatArray, mask: FloatArray, *, largest: int) -> None:
        self._size = image.shape
        side = fft.next_fast_len(max(image.shape) + largest, real=True)
        self._shape = (side, side)
        self._area = float(mask.sum())
        self._mask, self._sum, self._squares = (
            fft.rfft2(values, self._shape) for values in (mask, image * mask, image * image * mask)
        )

    def best_shift(self, image: FloatArray, mask: FloatArray) -> tuple[float, tuple[int, int]]:
        """Highest masked correlation times overlap, and the shift (x, y) that takes the moving image there."""
        moved_mask, moved_sum, moved_squares = (
            np.conj(fft.rfft2(values, self._shape)) for values in (mask, image * mask, image * image * mask)
        )

        def inverse(product: npt.NDArray[np.complex64]) -> FloatArray:
            result: FloatArray = fft.irfft2(product, self._shape)
            return result

        count = np.maximum(inverse(self._mask * moved_mask), 1e-3)
        sum_fixed, sum_moving = inverse(self._sum * moved_mask), inverse(self._mask * moved_sum)
        covariance = inverse(self._sum * moved_sum) - sum_fixed * sum_moving / count
        variance_fixed = np.maximum(inverse(self._squares * moved_mask) - sum_fixed**2 / count, 0)
        variance_moving = np.maximum(inverse(self._mask * moved_squares) - sum_moving**2 / count, 0)
        spread = np.sqrt(variance_fixed * variance_moving)
        smaller = max(1.0, min(self._area, float(mask.sum())))
        overlap = count / smaller
        # Where little overlaps or nothing varies, the quotient is noise.
        counted = (overlap > LEAST_OVERLAP) & (spread > 1e-6 * float(spread.max()))
        value = np.where(counted, covariance / np.maximum(spread, 1e-12), 0) * np.minimum(1, overlap)
        row, column = np.unravel_index(int(value.argmax()), value.shape)
        shift_y, shift_x = (
            int(index) - self._shape[0] if index >= size else int(index)
            for index, size in ((row, self._size[0]), (column, self._size[1]))
        )
        return float(value.max()), (shift_x, shift_y)


def _small(image: Structure, scale: float) -> tuple[FloatArray, FloatArray]:
    """Band-passed hematoxylin and the mask, reduced."""
    height, width = image.tissue.shape
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    mask = reduced(image.tissue.astype(np.float32), size)
    return band_passed(reduced(image.hematoxylin, size), 1, 6), (mask > 0.5).astype(np.float32)


def _diagonal(image: Structure, scale: float) -> int:
    height, width = image.tissue.shape
    return int(np.ceil(np.hypot(max(1, round(width * scale)), max(1, round(height * scale)))))


def _full_size(rotation: Affine, scale: float) -> Affine:
    """Moving-to-fixed at the reduced size, to fixed-to-moving at full size; 0 is the centre of the first pixel."""
    shrink = np.array([[scale, 0, (scale - 1) / 2], [0, scale, (scale - 1) / 2], [0, 0, 1]])
    inverse = np.linalg.inv(np.vstack([rotation, [0, 0, 1]]))
    result: Affine = (np.linalg.inv(shrink) @ inverse @ shrink)[:2]
    return result
