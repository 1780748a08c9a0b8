"""What watersheds of cells and nuclei start from: distances, smoothed heights, and their peaks.

The definitions are those of SciPy's and scikit-image's functions (tested), several times as fast.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from staindiffuser.imaging.arrays import BoolArray, FloatArray, UInt8Array
from staindiffuser.imaging.cell_loops import connected_regions, flood, without_twins

__all__ = ["dealt_to_peaks", "distances_to_edge", "local_peaks", "smoothed"]


def distances_to_edge(mask: UInt8Array) -> FloatArray:
    """Euclidean distance of each pixel of a mask, uint8 [H, W], to the nearest that is 0; the frame is no edge."""
    distance: FloatArray = cv2.distanceTransform(np.ascontiguousarray(mask), cv2.DIST_L2, cv2.DIST_MASK_PRECISE).astype(
        np.float32, copy=False
    )
    return distance


def smoothed(values: FloatArray, sigma: float) -> FloatArray:
    """Gaussian of ``sigma`` pixels, cut at four of them, reflected at the frame: float32 [H, W] to the same."""
    side = 2 * int(4 * sigma + 0.5) + 1
    blurred: FloatArray = cv2.GaussianBlur(values, (side, side), sigma, borderType=cv2.BORDER_REFLECT).astype(
        np.float32, copy=False
    )
    return blurred


def local_peaks(height: FloatArray, apart: int) -> NDArray[np.intp]:
    """The pixels above 0 that no other within ``apart`` exceeds, by rows and columns.

    Of equal ones that are nearer than ``apart`` to one another, the first in reading order stays.

    Args:
        height: float32 [H, W], 0 where there shall be no peak.
        apart: pixels.

    Returns:
        Flat indices, in reading order.
    """
    window = np.ones((2 * apart + 1, 2 * apart + 1), np.uint8)
    highest = cv2.dilate(height, window, borderType=cv2.BORDER_CONSTANT, borderValue=(0,))
    flat = height.ravel()
    peaks = np.flatnonzero((height == highest).ravel() & (flat > 0))
    return without_twins(peaks, height.shape, apart)


def dealt_to_peaks(mask: BoolArray, height: FloatArray, peaks_N: NDArray[np.intp]) -> NDArray[np.int32]:
    """The watershed of a mask [H, W] from its peaks.

    Args:
        mask: what is parted.
        height: float32 [H, W], not negative inside.
        peaks_N: flat indices inside the mask.

    Returns:
        int32 [H, W]; n + 1 around the n-th peak, 0 outside the mask and where a connected part has no peak.
    """
    padded = np.pad(height, 1)
    row, column = np.divmod(peaks_N, mask.shape[1])
    regions = connected_regions(np.pad(mask, 1))
    flood(padded, regions, (row + 1) * padded.shape[1] + column + 1)
    return np.ascontiguousarray(regions.labels[1:-1, 1:-1])
