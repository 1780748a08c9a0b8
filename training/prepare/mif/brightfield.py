"""Fluorescence drawn as the IHC image that a chromogen would have given, by Beer–Lambert.

DAB from the marker; hematoxylin from the H&E's own nuclei rather than from DAPI, so that the counterstain fits the H&E
to the pixel.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from staindiffuser.imaging.arrays import FloatArray, UInt8Array
from staindiffuser.imaging.optical_density import STAIN_MATRIX, he_densities, image_of_density

__all__ = ["brightfield"]

GLASS_DENSITY = 0.02
"""Of hematoxylin everywhere: real counterstained sections are not white between their nuclei."""
EOSIN_LEAK = 0.12
"""What unmixing takes for hematoxylin where there is eosin alone."""
COUNTERSTAIN, LARGEST_COUNTERSTAIN = 0.9, 0.7
"""Of the H&E's hematoxylin density: IHC is counterstained more lightly."""
HIDDEN = 0.35
"""Share of the hematoxylin that DAB of density 1 hides."""
SMOOTHING = 0.5
"""Standard deviation of a Gaussian, pixels: about what a scanner's optics do."""


def brightfield(he: UInt8Array, dab: FloatArray) -> UInt8Array:
    """An IHC image of the place.

    Args:
        he: uint8 [H, W, 3].
        dab: float32 [H, W], optical density of DAB.

    Returns:
        uint8 [H, W, 3].
    """
    nuclei = ndimage.gaussian_filter(he_densities(he)[..., 0], SMOOTHING)
    brown = ndimage.gaussian_filter(np.asarray(dab, np.float32), SMOOTHING)
    blue = np.clip(COUNTERSTAIN * (nuclei - EOSIN_LEAK), 0.0, LARGEST_COUNTERSTAIN)
    blue = blue * (1.0 - HIDDEN * np.clip(brown, 0.0, 1.0)) + GLASS_DENSITY
    density = blue[..., None] * STAIN_MATRIX[0] + brown[..., None] * STAIN_MATRIX[1]
    return image_of_density(density)
