"""The colour of a slide's glass, estimated from the image itself.

Constants are ours, chosen on the slides and crops of ``tests/`` and simulated ones.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from staindiffuser.imaging.arrays import FloatArray, UInt8Array

__all__ = ["UNSCANNED", "glass_colour", "texture"]

UNSCANNED = 254
"""Scanners fill what they did not scan with white: no channel below this. Scanned glass is darker."""
BRIGHT, COLOURLESS = 200, 20
"""Glass has no channel below the first, and its channels differ by less than the second, grey levels."""
SMOOTH = 2.0
"""Glass has a lower :func:`texture` than this."""
DEFAULT = 245.0
"""Grey level of glass where an image shows hardly any."""


def glass_colour(rgb: UInt8Array) -> FloatArray:
    """Colour of the glass: the commonest bright, colourless grey level; 245 where there is hardly any.

    Args:
        rgb: uint8 [H, W, 3].

    Returns:
        float32 [3].
    """
    darkest, brightest = rgb.min(axis=-1), rgb.max(axis=-1)
    bright = (darkest > BRIGHT) & (brightest - darkest < COLOURLESS)
    scanned = bright & (darkest < UNSCANNED) & (texture(rgb.astype(np.float32)) < SMOOTH)
    if scanned.mean() >= 0.01:
        bright = scanned
    if bright.mean() < 0.002:
        return np.full(3, DEFAULT, dtype=np.float32)
    commonest = int(np.bincount(darkest[bright], minlength=256).argmax())
    peak = rgb[bright & (np.abs(darkest.astype(np.int16) - commonest) <= 2)]
    colour: FloatArray = peak.mean(axis=0, dtype=np.float64).astype(np.float32)
    # Pale tissue can be commoner than glass in a crop: glass is as bright as the brightest of them.
    high = np.percentile(rgb[bright], 90, axis=0)
    return np.maximum(colour, high - 8).astype(np.float32)


def texture(rgb: FloatArray) -> FloatArray:
    """Standard deviation of the grey level in 3 × 3 pixels: float32 [H, W, 3] to [H, W]."""
    grey = rgb.mean(axis=-1)
    mean = ndimage.uniform_filter(grey, 3)
    deviation: FloatArray = np.sqrt(np.maximum(ndimage.uniform_filter(grey * grey, 3) - mean * mean, 0))
    return deviation
