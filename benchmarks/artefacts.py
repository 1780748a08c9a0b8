"""What happens to slides, made on purpose: tiles that a model should be told not to be judged by.

All numbers are ours, chosen so that a person sees at once what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage

from staindiffuser.imaging.arrays import UInt8Array

__all__ = ["ARTEFACTS", "at_an_edge", "blurred", "broken_colours", "grey", "other_scanner", "penned"]

INKS = ((40, 60, 160), (30, 30, 35), (30, 120, 60), (190, 30, 40))
"""Blue, black, green and red marker on white."""


def penned(he: UInt8Array, rng: np.random.Generator) -> UInt8Array:
    """One to three strokes of a marker, 30 to 90 pixels wide, that let some of the tissue through."""
    height, width = he.shape[:2]
    mask = Image.new("L", (width, height), 0)
    draw = ImageDraw.Draw(mask)
    for _ in range(rng.integers(1, 4)):
        points = [(float(x), float(y)) for x, y in rng.uniform(0, (width, height), (3, 2))]
        draw.line(points, fill=255, width=int(rng.uniform(30, 90)), joint="curve")
    cover = np.asarray(mask.filter(ImageFilter.GaussianBlur(2)), np.float64)[..., None] / 255
    ink = np.array(INKS[rng.integers(len(INKS))]) / 245
    return _bytes(he * ink ** (rng.uniform(0.6, 1.0) * cover))


def blurred(he: UInt8Array, rng: np.random.Generator) -> UInt8Array:
    """Out of focus: a Gaussian of 2 to 5 pixels."""
    sigma = rng.uniform(2, 5)
    return _bytes(ndimage.gaussian_filter(he.astype(np.float64), (sigma, sigma, 0)))


def broken_colours(he: UInt8Array, rng: np.random.Generator) -> UInt8Array:
    """Channels in another order, a negative, or a white balance that is far off."""
    choice = rng.integers(4)
    if choice < 2:
        return np.ascontiguousarray(he[..., [2, 1, 0] if choice else [1, 0, 2]])
    if choice == 2:
        return np.asarray(255 - he, np.uint8)
    casts = ((0.6, 1.0, 1.25), (1.25, 1.0, 0.55), (1.0, 0.65, 1.2))
    return _bytes(he * np.array(casts[rng.integers(len(casts))]))


def grey(he: UInt8Array, rng: np.random.Generator) -> UInt8Array:
    """Without colour."""
    return np.repeat(he.mean(axis=-1, keepdims=True).astype(np.uint8), 3, axis=-1)


def other_scanner(he: UInt8Array, rng: np.random.Generator) -> UInt8Array:
    """A mild change of contrast and white balance, as between scanners: the model should cope with it."""
    return _bytes(255 * (he / 255) ** rng.uniform(0.75, 1.3) * rng.uniform(0.92, 1.06, 3))


def at_an_edge(he: UInt8Array, rng: np.random.Generator) -> UInt8Array:
    """Glass over 40 to 92 % of the field, behind a wavy edge: the model should cope with it."""
    yy, xx = np.mgrid[: he.shape[0], : he.shape[1]]
    angle = rng.uniform(0, 2 * np.pi)
    depth = np.cos(angle) * xx + np.sin(angle) * yy + 12 * np.sin(yy / 23 + xx / 31)
    glass = depth > np.quantile(depth, rng.uniform(0.08, 0.6))
    empty = rng.normal(243, 1.5, (*he.shape[:2], 1)) + rng.normal(0, 0.7, he.shape)
    return _bytes(np.where(glass[..., None], empty, he))


ARTEFACTS: Mapping[str, Callable[[UInt8Array, np.random.Generator], UInt8Array]] = {
    "pen": penned,
    "blur": blurred,
    "broken colours": broken_colours,
    "grey": grey,
    "other scanner": other_scanner,
    "edge of tissue": at_an_edge,
}


def _bytes(values: NDArray[Any]) -> UInt8Array:
    clipped: UInt8Array = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return clipped
