"""OpenCV's resampling, typed: the result has the type of the input."""

from __future__ import annotations

from typing import TypeVar

import cv2
import numpy as np
import numpy.typing as npt

from staindiffuser.imaging.arrays import FloatArray

__all__ = ["enlarged", "reduced", "rotated", "sampled"]

Pixels = TypeVar("Pixels", npt.NDArray[np.uint8], npt.NDArray[np.float32])
WHITE = 255


def sampled(image: Pixels, coordinates: FloatArray, *, cubic: bool = False, beyond: float | None = 0) -> Pixels:
    """The values of an image at coordinates.

    Args:
        image: [H, W] or [H, W, C].
        coordinates: [h, w, 2] (x, y), pixels; 0 is the centre of the first pixel.
        cubic: cubic instead of linear interpolation, for images that people look at.
        beyond: value off the image; None repeats its edge.
    """
    at = np.ascontiguousarray(coordinates, np.float32)
    edge = cv2.BORDER_REPLICATE if beyond is None else cv2.BORDER_CONSTANT
    fill = (beyond or 0.0,) * 4
    method = cv2.INTER_CUBIC if cubic else cv2.INTER_LINEAR
    return np.asarray(cv2.remap(image, at[..., 0], at[..., 1], method, borderMode=edge, borderValue=fill), image.dtype)


def reduced(image: Pixels, size: tuple[int, int]) -> Pixels:
    """An image reduced to (width, height) by averaging areas."""
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), image.dtype)


def enlarged(image: FloatArray, size: tuple[int, int]) -> FloatArray:
    """A field enlarged to (width, height) by linear interpolation."""
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_LINEAR), np.float32)


def rotated(image: FloatArray, matrix: npt.NDArray[np.float64], side: int) -> FloatArray:
    """An image rotated by a matrix [2, 3] onto a square; 0 beyond its edges."""
    return np.asarray(cv2.warpAffine(image, matrix, (side, side)), np.float32)
