"""The non-rigid part of a registration: dense inverse search flow on hematoxylin, smoothed and capped.

OpenCV; Kroeger et al., "Fast optical flow using dense inverse search", ECCV 2016.
"""

from __future__ import annotations

import cv2
import numpy as np
from scipy import ndimage

from staindiffuser.imaging.arrays import FloatArray, UInt8Array
from staindiffuser.training.prepare.registration.features import Structure
from staindiffuser.training.prepare.registration.resampling import enlarged, reduced

__all__ = ["displacement"]

FLOW_CAP = 0.015
"""Largest displacement, as a share of the diagonal: beyond it the tissue is no longer the same."""
_FLOW_SIGMA = 12.0
"""Smoothing of the flow, pixels."""
_FAR = 8
"""Where only one section has tissue, the smoothing is this many times wider."""
_LEAST_FLOW = 32
"""Shortest edge of an image, pixels: below it there is no detail to follow, and the flow cannot be computed."""


def displacement(fixed: Structure, moved: Structure, *, cap: float = FLOW_CAP) -> FloatArray:
    """The non-rigid displacement: where on the moved image each pixel of the fixed one lies, relative to itself.

    Args:
        fixed: the H&E.
        moved: the IHC on the same grid.
        cap: largest displacement, as a share of the diagonal.

    Returns:
        float32 [H, W, 2], (x, y) in pixels.
    """
    shape = fixed.tissue.shape
    both = fixed.tissue & moved.tissue
    if not both.any() or min(shape) < _LEAST_FLOW:
        return np.zeros((*shape, 2), np.float32)
    closed = ndimage.binary_closing(np.pad(both, 8), iterations=6)[8:-8, 8:-8]
    # Faded out where only one has tissue: the flow must not follow the edge of a tear.
    gate = ndimage.gaussian_filter(ndimage.binary_erosion(closed, iterations=3, border_value=1).astype(np.float32), 3.0)
    flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    flow.setPatchSize(16)
    flow.setPatchStride(5)
    flow.setFinestScale(1)
    first, second = (_bytes(ndimage.gaussian_filter(part.hematoxylin, 1) * gate) for part in (fixed, moved))
    raw = np.asarray(flow.calc(first, second, np.zeros((*shape, 2), np.float32)), np.float32)
    near, weight = _smoothed(raw, gate)
    # Where there is nothing to follow, extrapolate from the nearest tissue.
    size = (max(1, shape[1] // _FAR), max(1, shape[0] // _FAR))
    far, _ = _smoothed(np.dstack([reduced(raw[..., axis], size) for axis in (0, 1)]), reduced(gate, size))
    share = np.minimum(1, 2 * weight)[..., None]
    shift: FloatArray = share * near + (1 - share) * enlarged(far, (shape[1], shape[0]))
    length = np.hypot(shift[..., 0], shift[..., 1])
    most = cap * float(np.hypot(shape[0], shape[1]))
    return np.asarray(shift * np.minimum(1, most / np.maximum(length, 1e-6))[..., None], np.float32)


def _smoothed(flow: FloatArray, weight: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Weighted mean of a flow [H, W, 2] around every pixel, and the mean of the weights."""
    total = ndimage.gaussian_filter(weight, _FLOW_SIGMA)
    parts = [ndimage.gaussian_filter(flow[..., axis] * weight, _FLOW_SIGMA) for axis in (0, 1)]
    return np.stack(parts, axis=-1) / (total[..., None] + 1e-6), total


def _bytes(values: FloatArray) -> UInt8Array:
    """Scaled to 8 bits by the 99.5th percentile."""
    top = max(1e-3, float(np.percentile(values, 99.5)))
    scaled: UInt8Array = np.clip(values * (255 / top), 0, 255).astype(np.uint8)
    return scaled
