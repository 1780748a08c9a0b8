"""What lies on a slide's overview and is neither tissue nor glass: marker pen, and borders that were not scanned.

Told by optical density against glass, smoothed over a pen's width. Tissue in H&E absorbs green the most, whatever its
stain: in 900,000 pixels of 8 µm from six laboratories the density in red never reached 0.97 of that in green, and the
density in blue 0.7 of it only in a few pixels that were as dark as pen. Green, blue and turquoise pens absorb red the
most, black ones all colours alike, red ones blue nearly as much as green. Constants are ours.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from staindiffuser.imaging.arrays import BoolArray, FloatArray
from staindiffuser.imaging.morphology import without_small

__all__ = ["find_borders", "find_pen"]

SMOOTH_UM = 24.0
"""Colours are averaged over this: nuclei and pigment are smaller, pens are wider."""
BROAD_UM = 72.0
"""A pen fills more than half of a square of this side."""
SMALLEST_PEN_UM2 = 3000.0
REACH_UM = 120.0
"""How far around what is surely pen its paler parts are looked for."""
EDGE_UM = 24.0
"""Left out around a pen: its blurred edge."""
DARK, NEUTRAL = 140.0, 28.0
"""A border has no channel above the first, and channels that differ by less than the second, grey levels."""
BORDER_TEXTURE = 4.0
"""And a lower standard deviation than this in 3 × 3 pixels."""


def find_pen(image_HW3: FloatArray, glass_3: FloatArray, mpp: float) -> BoolArray:
    """Marker pen on glass and over tissue: bool [H, W].

    Ink that marks a margin is too thin to count: it stays part of the tissue.

    Args:
        image_HW3: the overview, grey levels.
        glass_3: the colour of glass.
        mpp: the overview's pixel size, µm.
    """
    side = max(1, round(SMOOTH_UM / mpp))
    smooth = ndimage.uniform_filter(image_HW3, (side, side, 0))
    red, green, blue = np.moveaxis(np.log((glass_3 + 1) / (smooth + 1)), -1, 0)
    brightest, spread = smooth.max(axis=-1), np.ptp(smooth, axis=-1)
    total = (red + green + blue) / 3
    cool = (red > 1.2 * green) & (red > 0.5)
    # Over tissue a blue pen absorbs green as well.
    blue_over_tissue = (red > 0.8 * green) & (blue < 0.6 * green) & (green > 1.5)
    warm = (red < 0.45 * green) & (((blue > 0.7 * green) & (green > 1.2)) | ((blue > 0.88 * green) & (green > 1.0)))
    black = (brightest < 85) & (spread < 22)
    broad = max(1, round(BROAD_UM / mpp))
    sure = np.zeros(red.shape, dtype=bool)
    for colour in (cool | blue_over_tissue, warm, black):
        filled = ndimage.uniform_filter(colour.astype(np.float32), broad) > 0.5
        sure |= colour & filled
    sure = without_small(sure, SMALLEST_PEN_UM2 / (mpp * mpp), diagonal=True)
    if not sure.any():
        return np.zeros(red.shape, dtype=bool)
    neutral = (np.abs(red - green) < 0.2 * total) & (np.abs(blue - green) < 0.25 * total)
    paler = (total > 0.12) & ((red > 1.1 * green) | ((red < 0.45 * green) & (blue > 0.72 * green)) | neutral)
    paler &= ndimage.distance_transform_edt(~sure) * mpp <= REACH_UM
    pen = ndimage.binary_propagation(sure, mask=sure | paler)
    # Holes, where the ink is thin, belong to it; then its blurred edge.
    near = ndimage.distance_transform_edt(~pen) * mpp <= BROAD_UM / 2
    closed = pen | (ndimage.distance_transform_edt(near) * mpp > BROAD_UM / 2)
    grown: BoolArray = ndimage.distance_transform_edt(~closed) * mpp <= EDGE_UM
    return grown


def find_borders(image_HW3: FloatArray, texture_HW: FloatArray) -> BoolArray:
    """Frames that scanners and cameras leave around what they scanned, if dark and without structure: bool [H, W].

    Args:
        image_HW3: the overview, grey levels.
        texture_HW: its :func:`~staindiffuser.imaging.glass.texture`.
    """
    dark = (image_HW3.max(axis=-1) < DARK) & (np.ptp(image_HW3, axis=-1) < NEUTRAL) & (texture_HW < BORDER_TEXTURE)
    dark = ndimage.binary_opening(dark, np.ones((3, 3)))
    labels, count = ndimage.label(dark)
    if not count:
        return np.zeros_like(texture_HW, dtype=bool)
    outside = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    border = np.isin(labels, outside[outside > 0])
    # Its edge is a mixture of border and glass.
    grown: BoolArray = ndimage.binary_dilation(border, np.ones((3, 3)), iterations=3)
    return grown
