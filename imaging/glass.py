"""The colour of a slide's glass, estimated from the image itself.

Constants are ours, chosen on the slides and crops of ``tests/`` and simulated ones.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from staindiffuser.imaging.arrays import BoolArray, FloatArray, UInt8Array
from staindiffuser.imaging.optical_density import optical_density

__all__ = ["UNSCANNED", "bare_glass", "glass_colour", "glass_percentile", "texture"]

UNSCANNED = 254
"""Scanners fill what they did not scan with white: no channel below this. Scanned glass is darker."""
BRIGHT, COLOURLESS = 200, 20
"""Glass has no channel below the first, and its channels differ by less than the second, grey levels."""
SMOOTH = 2.0
"""Glass has a lower :func:`texture` than this."""
DEFAULT = 245.0
"""Grey level of glass where an image shows hardly any."""
BARE = (0.025, 0.05)
"""Optical density beyond the glass's up to which a pixel is bare for sure, and from which it surely is not."""
_REACH = 1.5
"""Standard deviation of the Gaussian before that, pixels: the scanner's grain is no tissue."""


def glass_colour(rgb: UInt8Array) -> FloatArray:
    """Colour of the glass: the commonest bright, colourless grey level; 245 where there is hardly any.

    Args:
        rgb: uint8 [H, W, 3].

    Returns:
        float32 [3].
    """
    bright = _bright(rgb, texture(rgb.astype(np.float32)) < SMOOTH)
    if bright is None:
        return np.full(3, DEFAULT, dtype=np.float32)
    darkest = rgb.min(axis=-1)
    commonest = int(np.bincount(darkest[bright], minlength=256).argmax())
    peak = rgb[bright & (np.abs(darkest.astype(np.int16) - commonest) <= 2)]
    colour: FloatArray = peak.mean(axis=0, dtype=np.float64).astype(np.float32)
    # Pale tissue can be commoner than glass in a crop: glass is as bright as the brightest of them.
    high = np.percentile(rgb[bright], 90, axis=0)
    return np.maximum(colour, high - 8).astype(np.float32)


def glass_percentile(rgb: UInt8Array) -> FloatArray:
    """Colour of the glass as the 75th percentile of what is bright and colourless; 245 where there is hardly any.

    A little brighter than :func:`glass_colour`, so that faint tissue counts. Registration uses it: with the other one
    the gap between the scores of right and wrong pairs is 0.07 instead of 0.10 (``bench registration``; ours).

    Args:
        rgb: uint8 [H, W, 3].

    Returns:
        float32 [3].
    """
    bright = _bright(rgb)
    if bright is None:
        return np.full(3, DEFAULT, dtype=np.float32)
    colour: FloatArray = np.percentile(rgb[bright], 75, axis=0).astype(np.float32)
    return colour


def bare_glass(rgb: UInt8Array) -> FloatArray:
    """How surely each pixel shows bare glass: 1 where nothing is denser than glass, 0 at tissue, between at its edge.

    Args:
        rgb: an H&E, uint8 [H, W, 3], of about 0.5 µm per pixel.

    Returns:
        float32 [H, W].
    """
    density = optical_density(rgb) - np.log10(256 / (glass_colour(rgb) + 1))
    smooth = ndimage.gaussian_filter(density, (*(_REACH,) * 2, 0)).max(axis=-1)
    bare: FloatArray = np.clip((BARE[1] - smooth) / (BARE[1] - BARE[0]), 0, 1).astype(np.float32)
    return bare


def _bright(rgb: UInt8Array, smooth: BoolArray | None = None) -> BoolArray | None:
    """Bright, colourless pixels, of them those that were scanned (and are ``smooth``) if there are some.

    None where there is hardly any glass.
    """
    darkest, brightest = rgb.min(axis=-1), rgb.max(axis=-1)
    bright: BoolArray = (darkest > BRIGHT) & (brightest - darkest < COLOURLESS)
    scanned = bright & (darkest < UNSCANNED)
    if smooth is not None:
        scanned &= smooth
    if scanned.mean() >= 0.01:
        bright = scanned
    return bright if bright.mean() >= 0.002 else None


def texture(rgb: FloatArray) -> FloatArray:
    """Standard deviation of the grey level in 3 × 3 pixels: float32 [H, W, 3] to [H, W]."""
    grey = rgb.mean(axis=-1)
    mean = ndimage.uniform_filter(grey, 3)
    deviation: FloatArray = np.sqrt(np.maximum(ndimage.uniform_filter(grey * grey, 3) - mean * mean, 0))
    return deviation
