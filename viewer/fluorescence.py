"""Stains as colours on black: how brown a pixel is becomes how bright it is, so that several stains fit in one view."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.optical_density import dab_density, hematoxylin_density
from staindiffuser.imaging.palette import NUCLEI_COLOUR, colours_of

__all__ = ["NUCLEI", "NUCLEI_COLOUR", "colours_of", "fluorescent"]

FULL = 0.9
"""Optical density that is shown at full brightness (ours)."""
NUCLEI = "nuclei"
"""What stands for the counterstain among the names of stains."""


def fluorescent(stains: Sequence[tuple[UInt8Array, str]], counterstained_HW3: UInt8Array | None = None) -> UInt8Array:
    """Stains as light on black, uint8 [H, W, 3]; where several shine, their light adds up.

    Args:
        stains: images [H, W, 3], with the colour in which the brown of each shines.
        counterstained_HW3: the image whose hematoxylin, which is paler, shines in :data:`NUCLEI_COLOUR`.
    """
    strengths = [((dab_density(pixels) - 0.075) / FULL, colour) for pixels, colour in stains]
    if counterstained_HW3 is not None:
        strengths.append(((hematoxylin_density(counterstained_HW3) - 0.05) / 0.6, NUCLEI_COLOUR))
    light = np.zeros((*strengths[0][0].shape, 3), np.float32)
    for strength, colour in strengths:
        shown = np.clip(strength, 0, 1)
        for channel, at in enumerate((1, 3, 5)):
            if value := int(colour[at : at + 2], 16):
                light[..., channel] += value * shown
    lit: UInt8Array = np.minimum(light, 255).astype(np.uint8)
    return lit
