"""Stains as colours on black: how brown a pixel is becomes how bright it is, so that several stains fit in one view."""

from __future__ import annotations

import numpy as np

from staindiffuser.imaging.arrays import FloatArray, UInt8Array
from staindiffuser.imaging.optical_density import dab_density, hematoxylin_density
from staindiffuser.imaging.palette import NUCLEI_COLOUR, colours_of

__all__ = ["NUCLEI_COLOUR", "colours_of", "fluorescent"]

FULL = 0.9
"""Optical density that is shown at full brightness (ours)."""


def fluorescent(pixels_HW3: UInt8Array, colour: str, *, nuclei: bool = False) -> UInt8Array:
    """A tile of a stain, brown as ``colour`` on black; with ``nuclei``, its hematoxylin instead, which is paler."""
    strength: FloatArray
    strength = (hematoxylin_density(pixels_HW3) - 0.05) / 0.6 if nuclei else (dab_density(pixels_HW3) - 0.075) / FULL
    strength = np.clip(strength, 0, 1)
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)], np.float32)
    lit: UInt8Array = (strength[..., None] * rgb).astype(np.uint8)
    return lit
