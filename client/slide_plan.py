"""Everything about staining a slide that is known before the first request: geometry, tissue, tiles, warnings."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from staindiffuser.client.blending import Rectangle
from staindiffuser.client.contract import ModelContract
from staindiffuser.client.model_view import ModelView
from staindiffuser.client.progress import Stopwatch
from staindiffuser.client.tiling import GridTile, TileGrid
from staindiffuser.errors import InputError
from staindiffuser.imaging.annotations import coverage, read_regions
from staindiffuser.imaging.colour_profile import to_srgb
from staindiffuser.imaging.errors import PixelSizeError
from staindiffuser.imaging.ome_tiff import SIDE
from staindiffuser.imaging.pixel_size import SAME_PIXEL_SIZE, PixelSize
from staindiffuser.imaging.slides import Slide
from staindiffuser.imaging.tissue import Overview, TissueMask, find_tissue, read_overview, restricted

__all__ = ["Estimate", "SlidePlan", "plan_slide"]

PEN_WARNING = 0.002
"""Share of the slide from which pen is worth a word."""
COARSE, UPSAMPLING = 1.5, 2.0
"""Input pixels larger than the model's by the first factor cause a warning, by the second a refusal."""


IMAGE_BYTES, MAP_BYTES, CHANNEL_BYTES, ZARR_BYTES = 0.8, 0.3, 0.5, 2.2
"""Per pixel of an image, a cell map, a channel of ``combined.ome.tiff`` and an image in OME-Zarr, with tissue all over,
generously: 0.3, 0.2, 0.36 and 1.7 were measured (ours)."""
MEMORY_BYTES = 300 * 2**20
"""Of the client without any tiles."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What staining a slide will need, roughly."""

    disk_bytes: int
    """While staining: the result, and the unfinished files of its OME-TIFFs."""
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class SlidePlan:
    """How a slide will be stained."""

    slide: Slide
    mpp: PixelSize
    """Of the slide at level 0, µm per pixel."""
    view: ModelView
    grid: TileGrid
    mask: TissueMask
    tiles: tuple[GridTile, ...]
    """The tiles with tissue, in the grid's order."""
    warnings: tuple[str, ...]

    @property
    def rows(self) -> int:
        """Rows of the result."""
        return -(-self.view.size[1] // SIDE)

    def estimate(self, stains: int, *, cells: bool, combined: bool = False, formats: Collection[str] = ()) -> Estimate:
        """Disk and memory for so many stains, and what else of :class:`StainingOptions` is asked for."""
        pixels = len(self.tiles) * self.grid.stride**2
        channels = (stains + 1) * combined
        disk = 2.0 * pixels * (stains * (IMAGE_BYTES + MAP_BYTES * cells) + channels * CHANNEL_BYTES)
        for _ in {"ome-zarr", "spatialdata"} & set(formats):
            disk += pixels * (stains * (ZARR_BYTES + MAP_BYTES * cells) + channels * CHANNEL_BYTES)
        if "dicom" in formats:
            disk += pixels * stains * IMAGE_BYTES
        # Rows of tiles that wait for the writer and those being stained, and the rows of the slide that they show.
        waiting = self.view.size[0] * (4 * SIDE + self.grid.tile) * (3 + stains * (3 + cells))
        return Estimate(disk_bytes=round(disk), memory_bytes=MEMORY_BYTES + waiting)

    def announcement(self) -> str:
        """One line for the user."""
        slide, view, grid = self.slide, self.view, self.grid
        resampled = f", resampled to {view.size[0]} × {view.size[1]} at {view.mpp[0]:.3f}" if view.resampled else ""
        return (
            f"{slide.path}: {slide.format}, {slide.size[0]} × {slide.size[1]} pixels of {self.mpp[0]:.3f} µm"
            f"{resampled}; {len(self.tiles)} of {grid.rows * grid.columns} tiles show tissue"
        )

    def left_out(self) -> list[Rectangle]:
        """The damaged regions found so far, in pixels of the result, rounded outwards."""
        rectangles = []
        for region in self.slide.damaged:
            width, height = self.slide.level_sizes[region.level]
            x, y = self.view.size[0] / width, self.view.size[1] / height
            right, bottom = region.x + region.width, region.y + region.height
            rectangles.append(
                (math.floor(region.x * x), math.floor(region.y * y), math.ceil(right * x), math.ceil(bottom * y))
            )
        return rectangles


def plan_slide(
    slide: Slide,
    mpp: PixelSize,
    contract: ModelContract,
    watch: Stopwatch,
    mask: str | Path = "auto",
    icc: str = "ignore",
) -> SlidePlan:
    """Find the tissue and choose the tiles.

    Args:
        slide: the slide.
        mpp: its pixel size at level 0, µm per pixel.
        contract: of the model that will stain it.
        watch: times the stage ``tissue``.
        mask: see :class:`~staindiffuser.client.options.StainingOptions`.
        icc: likewise.

    Raises:
        PixelSizeError: the slide's pixels are too large for the model.
        InputError: the file of ``mask`` is not GeoJSON, or its polygons lie outside the slide.
        SlideError: part of the slide is damaged.
    """
    if max(mpp) > UPSAMPLING * contract.mpp * (1 + SAME_PIXEL_SIZE):
        raise PixelSizeError(
            f"{slide.path} has pixels of {max(mpp):.4g} µm, but the model needs {contract.mpp:g} µm and at most "
            f"{UPSAMPLING:g} times that: scan at a higher magnification, or correct the pixel size with --mpp"
        )
    convert = to_srgb(slide.icc_profile, str(slide.path)) if icc == "srgb" and slide.icc_profile else None
    view = ModelView(slide, mpp, contract.mpp, convert)
    grid = TileGrid.for_model(contract, *view.size)
    with watch.stage("tissue"):
        overview = read_overview(slide, mpp)
        found = _shown_by(mask, find_tissue(overview, view.mpp), slide, mpp, overview)
        tiles = tuple(_tiles_with_tissue(grid, found))
    warnings = [f"warning: {note}" for note in slide.notes]
    if max(mpp) > COARSE * contract.mpp:
        warnings.append(
            f"warning: {slide.path.name} has pixels of {max(mpp):.2f} µm, but the model was trained at "
            f"{contract.mpp:g} µm and will lack details that it needs"
        )
    if (pen := found.pen_fraction) > PEN_WARNING and mask == "auto":
        warnings.append(f"warning: marker pen covers {pen:.1%} of {slide.path.name}: it is left out, over tissue too")
    if icc == "srgb" and convert is None:
        warnings.append(f"warning: {slide.path.name} has no ICC profile: its colours are taken as they are")
    if not tiles:
        warnings.append(f"warning: no tissue found on {slide.path.name}: the result is empty")
    return SlidePlan(slide=slide, mpp=mpp, view=view, grid=grid, mask=found, tiles=tiles, warnings=tuple(warnings))


def _shown_by(mask: str | Path, found: TissueMask, slide: Slide, mpp: PixelSize, overview: Overview) -> TissueMask:
    """The mask that a user asks for."""
    if mask == "auto":
        return found
    height, width = found.shown.shape
    if mask == "none":
        return restricted(found, np.ones((height, width), np.float32))
    scale = (overview.mpp[0] / mpp[0], overview.mpp[1] / mpp[1])
    shown = coverage(read_regions(Path(mask)), (width, height), scale)
    if not shown.any():
        raise InputError(f"{mask}: no part of it lies on {slide.path}; coordinates must be its level-0 pixels")
    return restricted(found, shown)


def _tiles_with_tissue(grid: TileGrid, mask: TissueMask) -> list[GridTile]:
    """The tiles of which any part shows in the result, in the grid's order."""
    tiles = []
    for row in range(grid.rows):
        for column in range(grid.columns):
            tile = grid.at(row, column)
            (x0, x1), (y0, y1) = grid.shown(tile.x, grid.width), grid.shown(tile.y, grid.height)
            if x0 < x1 and y0 < y1 and mask.touches(x0, y0, x1 - x0, y1 - y0):
                tiles.append(tile)
    return tiles
