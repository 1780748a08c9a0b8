"""What two differently stained sections have in common: hematoxylin, and the presence of tissue.

H&E and IHC share the hematoxylin of their nuclei and the outlines of glands, vessels and lumens; eosin and DAB belong
to one of them only. Registration uses nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import ndimage

from staindiffuser.imaging.arrays import BoolArray, FloatArray, UInt8Array
from staindiffuser.imaging.optical_density import HE_MATRIX, STAIN_MATRIX

__all__ = ["Structure", "band_passed", "correlation", "structure"]

Staining = Literal["he", "ihc"]

_HEMATOXYLIN: dict[Staining, FloatArray] = {
    "he": np.linalg.inv(HE_MATRIX)[:, 0].astype(np.float32),
    "ihc": np.linalg.inv(STAIN_MATRIX)[:, 0].astype(np.float32),
}
SATURATION = 0.25
"""Optical density scale on which ``presence`` saturates: tissue is tissue, however strongly it is stained."""
TISSUE_DENSITY = 0.05
"""Smoothed optical density of the strongest channel from which a pixel is tissue."""
TISSUE_SIGMA = 3.0
"""Standard deviation of that smoothing, pixels."""


@dataclass(frozen=True, kw_only=True)
class Structure:
    """What registration uses of a section's image; all [H, W]."""

    hematoxylin: FloatArray
    """Hematoxylin's optical density."""
    presence: FloatArray
    """0 on glass to 1 in tissue, whatever its colour: tanh(density / 0.25)."""
    tissue: BoolArray
    """Where there is tissue, including lumens of a few pixels."""


def structure(rgb: UInt8Array, stain: Staining, glass: FloatArray) -> Structure:
    """What registration uses of an image.

    Args:
        rgb: uint8 [H, W, 3].
        stain: H&E or IHC.
        glass: colour of the glass, float32 [3].
    """
    values = np.arange(256, dtype=np.float32)[:, None]
    table = np.maximum(0.0, np.log10((glass + 1) / (values + 1))).astype(np.float32)
    density = np.stack([table[rgb[..., channel], channel] for channel in range(3)], axis=-1)
    strongest = density.max(axis=-1)
    return Structure(
        hematoxylin=density @ _HEMATOXYLIN[stain],
        presence=np.tanh(strongest / SATURATION),
        tissue=ndimage.gaussian_filter(strongest, TISSUE_SIGMA) > TISSUE_DENSITY,
    )


def band_passed(image: FloatArray, low: float, high: float) -> FloatArray:
    """Difference of Gaussians of ``low`` and ``high`` pixels: detail of the sizes between them."""
    result: FloatArray = ndimage.gaussian_filter(image, low) - ndimage.gaussian_filter(image, high)
    return result


def correlation(a: FloatArray, b: FloatArray) -> float:
    """Pearson's correlation; 0 where either is constant."""
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a * a).mean() * (b * b).mean()))
    return float((a * b).mean()) / scale if scale > 1e-9 else 0.0
