"""A region of a registered pair, at the tiles' pixel size: warped, realigned, judged tile by tile.

No whole slide is ever in memory at full resolution: about 2,000 pixels of the H&E are read, then the part of the IHC
slide that the registration maps there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from staindiffuser.imaging.arrays import FloatArray, UInt8Array
from staindiffuser.imaging.optical_density import coarse_mask, dab_mask
from staindiffuser.training.prepare.quality import LEAST_SHARPNESS, Fit, Reason, present, sharpness
from staindiffuser.training.prepare.registration.features import Structure, structure
from staindiffuser.training.prepare.registration.register import realign
from staindiffuser.training.prepare.registration.resampling import WHITE, enlarged, reduced, sampled
from staindiffuser.training.prepare.registration.warp import Warp, remapped
from staindiffuser.training.prepare.sections import Section, SectionImage

__all__ = ["REGION", "Grid", "Region", "RegionReader", "Tile"]

REGION = 2048
"""Side of a region, pixels, about."""
MARGIN = 32
"""Margin read around a region, pixels of the registration: tiles at its edge need their surroundings too."""
FACTOR = 4
"""Factor by which regions are reduced to be aligned."""
_SPARE = 48
"""Margin read around the IHC, pixels of the registration, within which realigning can move it."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The tiles of a slide, and the regions in which they are made."""

    mpp: float
    """Pixel size of the tiles, µm."""
    tile: int
    """Their side, pixels."""
    columns: int
    rows: int

    @classmethod
    def over(cls, section: Section, *, mpp: float, tile: int) -> Grid:
        """All whole tiles of a slide."""
        width, height = section.size_um
        return cls(mpp=mpp, tile=tile, columns=int(width / mpp) // tile, rows=int(height / mpp) // tile)

    @property
    def side(self) -> int:
        """Tiles along a region."""
        return max(1, REGION // self.tile)

    def regions(self) -> list[tuple[int, int]]:
        """(column, row) of each region's first tile."""
        return [(column, row) for row in range(0, self.rows, self.side) for column in range(0, self.columns, self.side)]

    def extent(self, region: tuple[int, int]) -> tuple[int, int]:
        """Tiles across and down a region."""
        return min(self.side, self.columns - region[0]), min(self.side, self.rows - region[1])


@dataclass(frozen=True, kw_only=True)
class Tile:
    """The images of a tile."""

    column: int
    row: int
    he: UInt8Array
    """uint8 [tile, tile, 3]."""
    ihc: Mapping[str, UInt8Array]
    """Per stain, the same."""
    masks: Mapping[str, UInt8Array]
    """Per stain, its coarse mask, uint8 [tile, tile]."""


@dataclass(frozen=True, kw_only=True)
class Region:
    """The outcome of a region."""

    tiles: Sequence[Tile]
    """The tiles to keep, row by row."""
    dropped: Mapping[tuple[int, int], Reason]
    """By column and row, why the others are dropped."""
    fits: Mapping[str, Sequence[float]]
    """Per stain, each kept tile's correlation of hematoxylin."""


@dataclass(frozen=True, kw_only=True)
class _Aligned:
    """A stain in a region, on the H&E's grid."""

    rgb: UInt8Array
    """[H, W, 3] at the tiles' pixel size."""
    mask: UInt8Array
    """[H, W], coarse."""
    tissue: npt.NDArray[np.bool_]
    """[h, w], at the registration's pixel size."""
    fit: Fit


class RegionReader:
    """Makes regions one by one; safe to use from many threads.

    Args:
        he: the H&E slide.
        ihc: per stain its slide.
        warps: per stain the map from the H&E's coordinates to its slide.
        glass: colour of the glass of the H&E (``he``) and of each stain.
        grid: the tiles.
        refine: per stain whether to realign each region, finer than the registration of the whole slide.
        least_tissue: share of a tile that must be tissue.
    """

    def __init__(
        self,
        *,
        he: Section,
        ihc: Mapping[str, Section],
        warps: Mapping[str, Warp],
        glass: Mapping[str, FloatArray],
        grid: Grid,
        refine: Mapping[str, bool],
        least_tissue: float,
    ) -> None:
        self._he, self._ihc, self._warps, self._glass, self._grid = he, ihc, warps, glass, grid
        self._refine, self._least_tissue = refine, least_tissue
        finest = min(warp.mpp for warp in warps.values())
        # Never coarser than the slides were registered at.
        self._factor = next(factor for factor in (FACTOR, 2, 1) if factor == 1 or factor * grid.mpp <= finest * 1.05)

    def read(self, region: tuple[int, int]) -> Region:
        """A region's tiles.

        Args:
            region: one of the grid's.

        Raises:
            SlideError: a slide is damaged there.
        """
        across, down = self._grid.extent(region)
        tile, mpp, margin = self._grid.tile, self._grid.mpp, MARGIN * self._factor
        he = self._he.read(
            ((region[0] * tile - margin) * mpp, (region[1] * tile - margin) * mpp),
            (across * tile + 2 * margin, down * tile + 2 * margin),
            mpp,
        )
        small = structure(self._reduced(he.rgb), "he", self._glass["he"])
        side = tile // self._factor
        positions = [(column, row) for row in range(down) for column in range(across)]
        boxes = {(column, row): (MARGIN + column * side, MARGIN + row * side, side) for column, row in positions}
        tissue = [
            position for position in positions if small.tissue[_window(*boxes[position])].mean() >= self._least_tissue
        ]
        dropped = {
            (region[0] + column, region[1] + row): Reason.blank
            for column, row in positions
            if (column, row) not in tissue
        }
        fits: dict[str, list[float]] = {stain: [] for stain in self._ihc}
        if not tissue:
            return Region(tiles=(), dropped=dropped, fits=fits)
        stains = {stain: self._aligned(stain, he, small) for stain in self._ihc}
        kept = []
        for column, row in tissue:
            window = _window(margin + column * tile, margin + row * tile, tile)
            box = boxes[column, row]
            reason = _judged(he.rgb[window], small.tissue[_window(*box)], stains.values(), window, box)
            if reason is not None:
                dropped[region[0] + column, region[1] + row] = reason
                continue
            kept.append(
                Tile(
                    column=region[0] + column,
                    row=region[1] + row,
                    he=np.ascontiguousarray(he.rgb[window]),
                    ihc={stain: np.ascontiguousarray(part.rgb[window]) for stain, part in stains.items()},
                    masks={stain: np.ascontiguousarray(part.mask[window]) for stain, part in stains.items()},
                )
            )
            for stain, part in stains.items():
                fits[stain].append(part.fit.at(*box)[0])
        return Region(tiles=kept, dropped=dropped, fits=fits)

    def _aligned(self, stain: str, he: SectionImage, small: Structure) -> _Aligned:
        """The part of a stain's slide that belongs to a region, on the region's grid."""
        warp, factor, mpp = self._warps[stain], self._factor, he.mpp
        coordinates = warp.grid(he.origin, small.tissue.shape, mpp * factor)
        spare = _SPARE * factor * mpp
        low, high = coordinates.min(axis=(0, 1)) - spare, coordinates.max(axis=(0, 1)) + spare
        origin = (float(low[0]), float(low[1]))
        size = [-(-int(np.ceil(extent / mpp)) // factor) * factor for extent in high - low]
        source = self._ihc[stain].read(origin, (size[0], size[1]), mpp)
        shift = None
        if self._refine[stain]:
            moving = structure(self._reduced(source.rgb), "ihc", self._glass[stain])
            left_over = realign(small, remapped(moving, _pixels(coordinates, origin, mpp * factor)))
            shift = enlarged(left_over * np.float32(factor), (he.rgb.shape[1], he.rgb.shape[0]))
        at = _pixels(warp.grid(he.origin, he.rgb.shape[:2], mpp, shift), origin, mpp)
        rgb = sampled(source.rgb, at, cubic=True, beyond=WHITE)
        there = structure(self._reduced(rgb), "ihc", self._glass[stain])
        return _Aligned(rgb=rgb, mask=coarse_mask(dab_mask(rgb)), tissue=there.tissue, fit=Fit(small, there))

    def _reduced(self, rgb: UInt8Array) -> UInt8Array:
        """An image reduced by averaging ``factor`` × ``factor`` pixels."""
        height, width = rgb.shape[:2]
        return reduced(rgb, (width // self._factor, height // self._factor))


def _judged(
    he: UInt8Array,
    tissue: npt.NDArray[np.bool_],
    stains: Collection[_Aligned],
    window: tuple[slice, slice],
    box: tuple[int, int, int],
) -> Reason | None:
    """Why a tile with tissue cannot be used; None where it can."""
    if not all(present(tissue, part.tissue[_window(*box)]) for part in stains):
        return Reason.ihc_missing
    if min(sharpness(image) for image in (he, *(part.rgb[window] for part in stains))) < LEAST_SHARPNESS:
        return Reason.blurred
    return Reason.misregistered if any(part.fit.misregistered(*box) for part in stains) else None


def _window(x: int, y: int, side: int) -> tuple[slice, slice]:
    return slice(y, y + side), slice(x, x + side)


def _pixels(um: FloatArray, origin: tuple[float, float], mpp: float) -> FloatArray:
    """µm to pixel coordinates of a rectangle; 0 is the centre of the first pixel."""
    return (um - np.asarray(origin, np.float32)) / np.float32(mpp) - np.float32(0.5)
