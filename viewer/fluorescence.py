"""Stains as colours on black: how brown a pixel is becomes how bright it is, so that several stains fit in one view."""

from __future__ import annotations

import numpy as np

from staindiffuser.imaging.arrays import FloatArray, UInt8Array
from staindiffuser.imaging.optical_density import dab_density, hematoxylin_density

__all__ = ["NUCLEI_COLOUR", "STAIN_COLOURS", "colours_of", "fluorescent"]

FULL = 0.9
"""Optical density that is shown at full brightness (ours)."""
NUCLEI_COLOUR = "#4b6bff"
STAIN_COLOURS = (
    ("#00e05a", "#00702d"),
    ("#ff4fd8", "#a3007c"),
    ("#ffb000", "#8a5a00"),
    ("#00d8e8", "#00697a"),
    ("#ff5a4f", "#b3261e"),
    ("#c0a0ff", "#5b2ec9"),
)
"""Per stain: on black, and for outlines on white or on tissue (contrast with white at least 4.5)."""


def colours_of(number: int) -> tuple[str, str]:
    """The two colours of a result's stain, by its number."""
    return STAIN_COLOURS[number % len(STAIN_COLOURS)]


def fluorescent(pixels_HW3: UInt8Array, colour: str, *, nuclei: bool = False) -> UInt8Array:
    """A tile of a stain, brown as ``colour`` on black; with ``nuclei``, its hematoxylin instead, which is paler."""
    strength: FloatArray
    strength = (hematoxylin_density(pixels_HW3) - 0.05) / 0.6 if nuclei else (dab_density(pixels_HW3) - 0.075) / FULL
    strength = np.clip(strength, 0, 1)
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)], np.float32)
    lit: UInt8Array = (strength[..., None] * rgb).astype(np.uint8)
    return lit
