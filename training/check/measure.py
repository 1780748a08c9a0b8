"""What is measured of one tile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from staindiffuser.imaging.arrays import BoolArray, FloatArray, UInt8Array
from staindiffuser.imaging.image_files import read_image
from staindiffuser.imaging.optical_density import (
    dab_density,
    dab_mask,
    he_densities,
    hematoxylin_density,
    optical_density,
)
from staindiffuser.training.prepare.quality import fit_of, sharpness
from staindiffuser.training.prepare.registration.features import band_passed
from staindiffuser.training.tiles.copies import pixel_hash
from staindiffuser.training.tiles.mask_codes import is_positive
from staindiffuser.training.tiles.tile import PairedTile

__all__ = ["ImageMeasures", "StainMeasures", "TileMeasures", "measure"]

_TISSUE_DENSITY = 0.06
"""Mean optical density of the channels, smoothed, from which a pixel of the H&E is tissue."""
_NUCLEI_BAND = (1.5, 12.0)
"""Sizes of detail in which the hematoxylin of H&E and IHC is compared, pixels."""


@dataclass(frozen=True, kw_only=True)
class ImageMeasures:
    """A tile's image of a stain."""

    dab: float
    """Share of the tile with a DAB density of at least 0.15."""
    negative_dab: float
    """Mean DAB density where the tile is not positive."""
    sharpness: float
    correlation: float
    """Of hematoxylin in H&E and IHC as they lie; 0 where the tile is too small to tell."""
    best_correlation: float
    """The same with the best shift of up to 12 pixels."""
    shift: float
    """That shift, pixels."""


@dataclass(frozen=True, kw_only=True)
class StainMeasures:
    """One stain of a tile."""

    positive: float | None
    """Share of the tile that is positive: by its mask, or where it has none by DAB; None without either."""
    image: ImageMeasures | None
    """None where the tile has no image of the stain."""
    mask_dice: float | None
    """Dice of the mask and the DAB-positive area; None where either is missing, or both are empty."""


@dataclass(frozen=True, kw_only=True)
class TileMeasures:
    """A tile."""

    hash: str
    """Of the H&E's pixels."""
    tissue: float
    """Share of the tile that is tissue."""
    colour: tuple[float, float, float]
    """Mean optical density of the tissue, red, green and blue; of all pixels where there is hardly any."""
    rgb: tuple[float, float, float]
    """Mean of the H&E, grey levels."""
    sharpness: float
    stains: Mapping[str, StainMeasures]


def measure(tile: PairedTile) -> TileMeasures:
    """Measure a tile; masks of a stain without a code are left out.

    Raises:
        ImageError: one of its images cannot be read.
    """
    he = read_image(tile.he)
    density, hematoxylin = optical_density(he), np.ascontiguousarray(he_densities(he)[..., 0])
    tissue = ndimage.gaussian_filter(density.mean(axis=-1), 2.0) > _TISSUE_DENSITY
    where = tissue if tissue.mean() > 0.02 else np.ones_like(tissue)
    return TileMeasures(
        hash=pixel_hash(he),
        tissue=float(tissue.mean()),
        colour=_triple(density[where].mean(axis=0)),
        rgb=_triple(he.mean(axis=(0, 1))),
        sharpness=sharpness(he),
        stains={stain: _stain(tile, stain, hematoxylin) for stain in tile.stains},
    )


def _stain(tile: PairedTile, stain: str, he_hematoxylin: FloatArray) -> StainMeasures:
    path, code = tile.masks[stain], tile.mask_codes.get(stain)
    mask = is_positive(read_image(path, mode="L"), code) if path is not None and code is not None else None
    image_path = tile.stains[stain]
    if image_path is None:
        return StainMeasures(positive=None if mask is None else float(mask.mean()), image=None, mask_dice=None)
    image = read_image(image_path)
    dab = dab_mask(image)
    positive = dab if mask is None else mask
    here, best, shift = fit_of(*(band_passed(part, *_NUCLEI_BAND) for part in (he_hematoxylin, _hematoxylin(image))))
    return StainMeasures(
        positive=float(positive.mean()),
        image=ImageMeasures(
            dab=float(dab.mean()),
            negative_dab=0.0 if positive.all() else float(dab_density(image)[~positive].mean()),
            sharpness=sharpness(image),
            correlation=here,
            best_correlation=best,
            shift=shift,
        ),
        mask_dice=None if mask is None else _dice(mask, dab),
    )


def _hematoxylin(ihc: UInt8Array) -> FloatArray:
    return np.ascontiguousarray(hematoxylin_density(ihc))


def _dice(a: BoolArray, b: BoolArray) -> float | None:
    total = int(a.sum()) + int(b.sum())
    return 2 * int((a & b).sum()) / total if total else None


def _triple(values: FloatArray) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
