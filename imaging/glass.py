"""The colour of a slide's glass, estimated from the image itself.

Constants are ours, chosen on the slides and crops of ``tests/`` and simulated ones.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from staindiffuser.imaging.arrays import BoolArray, FloatArray, UInt8Array
from staindiffuser.imaging.optical_density import optical_density

__all__ = ["UNSCANNED", "bare_glass", "glass_colour", "glass_field", "glass_percentile", "texture"]

UNSCANNED = 254
"""Scanners fill what they did not scan with white: no channel below this. Scanned glass is darker."""
BRIGHT, COLOURLESS = 200, 20
"""Glass has no channel below the first, and its channels differ by less than the second, grey levels."""
DARKEST_FIELD = 0.45
"""Density (natural logarithm) by which light may fall off towards the corners."""
SMOOTH = 2.0
"""Glass has a lower :func:`texture` than this."""
TINTED_DARKEST, TINTED_SHARE = 120, 0.04
"""Grey or yellow glass has no channel below the first, grey levels, and is at least this share of the image."""
DEFAULT = 245.0
"""Grey level of glass where an image shows hardly any."""
BARE = (0.025, 0.05)
"""Optical density beyond the glass's up to which a pixel is bare for sure, and from which it surely is not."""
_REACH = 1.5
"""Standard deviation of the Gaussian before that, pixels: the scanner's grain is no tissue."""


def glass_colour(rgb: UInt8Array) -> FloatArray:
    """Colour of the glass: the commonest bright, colourless grey level; 245 where there is hardly any.

    Where there is none such, but much that is smooth and of one colour, grey or yellow: that colour.

    Args:
        rgb: uint8 [H, W, 3].

    Returns:
        float32 [3].
    """
    smooth = texture(rgb.astype(np.float32)) < SMOOTH
    bright = _bright(rgb, smooth)
    if bright is None or (bright & smooth).mean() < TINTED_SHARE:
        tinted = _tinted(rgb, smooth)
        if tinted is not None:
            return tinted
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


def _tinted(rgb: UInt8Array, smooth: BoolArray) -> FloatArray | None:
    """The commonest colour of what is smooth and not pink; None if it is less than a small share of the image."""
    red, green, blue = np.moveaxis(rgb.astype(np.int16), -1, 0)
    glassy = smooth & (rgb.min(axis=-1) > TINTED_DARKEST) & (2 * green >= red + blue - 8) & (red >= blue - 12)
    glassy &= rgb.min(axis=-1) < UNSCANNED
    if glassy.mean() < TINTED_SHARE:
        return None
    commonest = int(np.bincount(green[glassy], minlength=256).argmax())
    peak = rgb[glassy & (np.abs(green - commonest) <= 3)]
    if len(peak) < TINTED_SHARE * green.size:
        return None
    colour: FloatArray = np.median(peak, axis=0).astype(np.float32)
    return colour


def glass_field(image_HW3: FloatArray, glass_3: FloatArray, usable_HW: BoolArray) -> FloatArray:
    """Colour of the glass at each pixel: vignettes and uneven light make it a smooth function of the place.

    A quadratic surface is fitted to the density of what is smooth, colourless and not much darker than glass, and what
    does not lie on it is left out step by step. Without enough of it, the colour is the same everywhere.

    Args:
        image_HW3: grey levels.
        glass_3: of the glass, see :func:`glass_colour`.
        usable_HW: false on what is neither glass nor tissue.

    Returns:
        float32 [H, W, 3].
    """
    height, width = image_HW3.shape[:2]
    density = np.log((glass_3 + 1) / (image_HW3 + 1))
    mean = density.mean(axis=-1)
    glassy = usable_HW & (np.ptp(density, axis=-1) < 0.06) & (mean < DARKEST_FIELD) & (texture(image_HW3) < SMOOTH)
    rows, columns = np.nonzero(glassy)
    flat = np.broadcast_to(glass_3.astype(np.float32), image_HW3.shape)
    if len(rows) < max(200, 0.02 * mean.size):
        return flat
    step = max(1, len(rows) // 40_000)
    rows, columns = rows[::step], columns[::step]
    values = mean[rows, columns]
    basis = _quadratic(rows / height * 2 - 1, columns / width * 2 - 1)
    inside = np.ones(len(values), dtype=bool)
    weights = np.zeros(basis.shape[1])
    for tolerance in (0.2, 0.1, 0.05, 0.03, 0.02, 0.015):
        weights = np.linalg.lstsq(basis[inside], values[inside], rcond=None)[0]
        inside = np.abs(values - basis @ weights) < tolerance
        if inside.mean() < 0.5:
            return flat
    fitted = basis[inside] @ weights
    grid = _quadratic(
        np.repeat(np.arange(height) / height * 2 - 1, width), np.tile(np.arange(width) / width * 2 - 1, height)
    )
    surface = np.clip((grid @ weights).reshape(height, width), fitted.min(), fitted.max())
    field: FloatArray = (flat * np.exp(-surface)[..., None]).astype(np.float32)
    return field


def _quadratic(y: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=-1)


def texture(rgb: FloatArray) -> FloatArray:
    """Standard deviation of the grey level in 3 × 3 pixels: float32 [H, W, 3] to [H, W]."""
    grey = rgb.mean(axis=-1)
    mean = ndimage.uniform_filter(grey, 3)
    deviation: FloatArray = np.sqrt(np.maximum(ndimage.uniform_filter(grey * grey, 3) - mean * mean, 0))
    return deviation
