"""OpenCV's resampling with this package's types: whatever goes in comes out with the same type of numbers."""

from __future__ import annotations

from typing import TypeVar

import cv2
import numpy as np
import numpy.typing as npt

from staindiffuser.imaging.arrays import FloatArray

__all__ = ["enlarged", "reduced", "sampled", "turned"]

Pixels = TypeVar("Pixels", npt.NDArray[np.uint8], npt.NDArray[np.float32])
WHITE = 255


def sampled(image: Pixels, places: FloatArray, *, cubic: bool = False, beyond: float | None = 0) -> Pixels:
    """An image's values at places.

    Args:
        image: [H, W] or [H, W, C].
        places: [h, w, 2] (x, y), pixels; 0 is the middle of the first pixel.
        cubic: rather than linear, for images that are looked at.
        beyond: what lies off the image; None repeats its edge.
    """
    at = np.ascontiguousarray(places, np.float32)
    edge = cv2.BORDER_REPLICATE if beyond is None else cv2.BORDER_CONSTANT
    fill = (beyond or 0.0,) * 4
    method = cv2.INTER_CUBIC if cubic else cv2.INTER_LINEAR
    return np.asarray(cv2.remap(image, at[..., 0], at[..., 1], method, borderMode=edge, borderValue=fill), image.dtype)


def reduced(image: Pixels, size: tuple[int, int]) -> Pixels:
    """An image at a smaller (width, height), areas averaged."""
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), image.dtype)


def enlarged(image: FloatArray, size: tuple[int, int]) -> FloatArray:
    """A field at a larger (width, height), linear between its values."""
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_LINEAR), np.float32)


def turned(image: FloatArray, matrix: npt.NDArray[np.float64], side: int) -> FloatArray:
    """An image moved by a matrix [2, 3] onto a square; 0 beyond its edges."""
    return np.asarray(cv2.warpAffine(image, matrix, (side, side)), np.float32)
