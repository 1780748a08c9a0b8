"""Where the tissue is: a mask on a low-resolution overview, generous at its edges.

Glass is estimated from the overview itself. Tissue is what absorbs more than glass, or is coloured, or textured (fat is
nearly as bright as glass, but its membranes are not smooth). Constants are ours, chosen on the slides and crops of
``tests/`` and simulated ones.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.artefacts import find_borders, find_pen
from staindiffuser.imaging.glass import UNSCANNED, glass_colour, glass_field, texture
from staindiffuser.imaging.morphology import without_small
from staindiffuser.imaging.pixel_size import PixelSize
from staindiffuser.imaging.slides import Slide

__all__ = ["Overview", "TissueMask", "find_tissue", "mask_image", "read_overview", "restricted"]

OVERVIEW_PIXELS = 4e6
"""Of the overview at most: finding tissue takes about 70 bytes of memory per pixel."""
OVERVIEW_MPP = 8.0
"""Pixel size of the overview, µm, about: a lymphocyte is one pixel."""
ABSORBANCE = 0.06
"""Optical density (natural logarithm) above the glass's from which a channel counts as stained: 14 grey levels."""
COLOUR = 10
"""Grey levels of (largest − smallest channel) above the glass's from which a pixel counts as coloured."""
PINK = 4.0
"""Grey levels by which green lies below the mean of red and blue, in 3 × 3 pixels, from which it counts as eosin."""
WHITE_LEVEL = 245.0
"""Grey level to which glass is balanced."""
TEXTURE = 6.0
"""Standard deviation in 3 × 3 pixels, grey levels, from which it counts as structured."""
BLACK = 12
"""A pixel with no channel above this was not scanned: no tissue is so dark."""
SMALLEST_UM2 = 2500.0
"""Specks below this area are dust."""
CLOSE_UM = 40.0
"""Gaps below twice this are closed: fat and lumens belong to the tissue."""
GROW_UM = 32.0
"""The mask is grown by this: what it decides must not cut epithelium or fat."""
GLASS_UM = 8.0
"""Within this of tissue, glass that a model painted turns white: one pixel of the overview."""


@dataclass(frozen=True, kw_only=True)
class Overview:
    """A whole slide, small."""

    pixels: UInt8Array
    """The image, [H, W, 3]."""
    mpp: PixelSize
    """Its pixel size, µm."""


@dataclass(frozen=True, kw_only=True)
class TissueMask:
    """Tissue on the overview's grid, to be asked in the pixels of another resolution."""

    tissue: NDArray[np.bool_]
    """[H, W], true where there is tissue."""
    shown: NDArray[np.float32]
    """[H, W], 1 on and near tissue, 0 on glass, a soft edge between: how much of the stained image shows."""
    cell: tuple[float, float]
    """Width and height of a mask pixel in the pixels that are asked about."""
    pen: NDArray[np.bool_] | None = None
    """[H, W], true on marker pen, which is left out even over tissue."""
    unscanned: NDArray[np.bool_] | None = None
    """[H, W], true where nothing was scanned."""
    near: NDArray[np.float32] | None = None
    """[H, W], 1 on what absorbs light itself, gaps left out, falling to 0 beside it: how much of the stained image's
    glass shows. None: all of it."""

    @property
    def fraction(self) -> float:
        """Share of the slide that is tissue."""
        return float(self.tissue.mean())

    @property
    def pen_fraction(self) -> float:
        """Share of the slide that is marker pen."""
        return float(self.pen.mean()) if self.pen is not None else 0.0

    @property
    def unscanned_fraction(self) -> float:
        """Share of the slide that was not scanned."""
        return float(self.unscanned.mean()) if self.unscanned is not None else 0.0

    def touches(self, x: int, y: int, width: int, height: int) -> bool:
        """Whether anything in this region will show."""
        x0, x1 = _cells(x, width, self.cell[0], self.shown.shape[1])
        y0, y1 = _cells(y, height, self.cell[1], self.shown.shape[0])
        return bool((self.shown[y0:y1, x0:x1] > 0).any())

    def opacity(self, x: int, y: int, width: int, height: int) -> NDArray[np.uint16] | None:
        """Opacity of a region, uint16 [height, width] of 0 … 256, interpolated; None where all of it is opaque.

        A pixel's value does not depend on the region that is asked for.
        """
        return self._interpolated(self.shown, x, y, width, height)

    def glass_opacity(self, x: int, y: int, width: int, height: int) -> NDArray[np.uint16] | None:
        """The same for what is as bright as glass in the stained image, to be multiplied with :meth:`opacity`."""
        return None if self.near is None else self._interpolated(self.near, x, y, width, height)

    def _interpolated(
        self, mask: NDArray[np.float32], x: int, y: int, width: int, height: int
    ) -> NDArray[np.uint16] | None:
        x0, x1 = _cells(x, width, self.cell[0], mask.shape[1])
        y0, y1 = _cells(y, height, self.cell[1], mask.shape[0])
        if (mask[y0:y1, x0:x1] >= 1).all():
            return None
        rows, row_part = _interpolation(y, height, self.cell[1], mask.shape[0])
        columns, column_part = _interpolation(x, width, self.cell[0], mask.shape[1])
        upper, lower = mask[rows], mask[np.minimum(rows + 1, len(mask) - 1)]
        across = upper + (lower - upper) * row_part[:, None]
        right = np.minimum(columns + 1, mask.shape[1] - 1)
        value: NDArray[np.float32] = across[:, columns] + (across[:, right] - across[:, columns]) * column_part
        opacity: NDArray[np.uint16] = np.rint(value * 256).astype(np.uint16)
        return opacity


def read_overview(slide: Slide, mpp: PixelSize, side: int = 256) -> Overview:
    """The whole slide at about 8 µm per pixel, averaged over areas.

    Finer where that gives fewer than ``side`` pixels, coarser where it gives more than 4 million (256 mm²).

    Raises:
        SlideError: the slide is damaged.
    """
    target = min(OVERVIEW_MPP, max(min(mpp), min(mpp) * max(slide.size) / side))
    area_um2 = slide.size[0] * mpp[0] * slide.size[1] * mpp[1]
    target = max(target, (area_um2 / OVERVIEW_PIXELS) ** 0.5)
    level = 0
    for candidate, (width, _) in enumerate(slide.level_sizes):
        if mpp[0] * slide.size[0] / width <= target:
            level = candidate
    width, height = slide.level_sizes[level]
    factor = max(1, int(target / (mpp[0] * slide.size[0] / width)))
    if width * height > OVERVIEW_PIXELS * factor**2:
        factor = math.ceil((width * height / OVERVIEW_PIXELS) ** 0.5)
    out = np.empty((-(-height // factor), -(-width // factor), 3), dtype=np.uint8)
    step = max(1, 2048 // factor) * factor
    for y in range(0, height, step):
        for x in range(0, width, step):
            region = slide.read(level, x, y, min(step, width - x), min(step, height - y))
            small = np.asarray(Image.fromarray(region).reduce(factor)) if factor > 1 else region
            out[y // factor : y // factor + small.shape[0], x // factor : x // factor + small.shape[1]] = small
    scale = (slide.size[0] / width * factor, slide.size[1] / height * factor)
    return Overview(pixels=out, mpp=(mpp[0] * scale[0], mpp[1] * scale[1]))


def find_tissue(overview: Overview, pixel: PixelSize) -> TissueMask:
    """Find the tissue.

    Args:
        overview: the slide.
        pixel: size in µm of the pixels that the mask will be asked in.
    """
    image = overview.pixels.astype(np.float32)
    mpp = float(np.sqrt(overview.mpp[0] * overview.mpp[1]))
    glass = glass_colour(overview.pixels)
    # What was not scanned is filled with white or black, and its border is no structure: lay glass there.
    unscanned = (image.min(axis=-1) >= UNSCANNED) | (image.max(axis=-1) <= BLACK)
    unscanned = ndimage.binary_dilation(unscanned, np.ones((3, 3))) | find_borders(image, texture(image))
    image[unscanned] = glass
    pen = find_pen(image, glass, mpp)
    image[pen] = glass
    field = glass_field(image, glass, ~(unscanned | pen))
    image[unscanned | pen] = field[unscanned | pen]
    balanced = np.minimum(image / field, 1.2) * WHITE_LEVEL  # glass is one grey level everywhere
    absorbance = np.log((WHITE_LEVEL + 1) / (balanced + 1)).max(axis=-1)
    smooth = ndimage.uniform_filter(balanced, (3, 3, 0))
    pink = (smooth[..., 0] + smooth[..., 2]) / 2 - smooth[..., 1]
    tissue = (absorbance > ABSORBANCE) | (np.ptp(balanced, axis=-1) > COLOUR) | (pink > PINK)
    tissue |= texture(balanced) > TEXTURE
    tissue &= ndimage.uniform_filter(tissue.astype(np.float32), 3) > 2.5 / 9  # single pixels are noise
    tissue = without_small(tissue, min(SMALLEST_UM2, 0.02 * tissue.size * mpp * mpp) / (mpp * mpp), diagonal=True)
    beside = _fading(tissue & ~pen, GLASS_UM / mpp)
    tissue |= ~_near(~_near(tissue, CLOSE_UM / mpp), CLOSE_UM / mpp)
    tissue &= ~pen
    near = _near(tissue, GROW_UM / mpp) & ~pen
    # A soft edge inside what was grown: the step from painted glass to white glass must not draw a line.
    distance = ndimage.distance_transform_edt(near) if not near.all() else np.full(near.shape, np.inf)
    opacity = np.clip(distance * mpp / (GROW_UM / 2), 0, 1).astype(np.float32)
    cell = (overview.mpp[0] / pixel[0], overview.mpp[1] / pixel[1])
    return TissueMask(tissue=tissue, shown=opacity, cell=cell, pen=pen, unscanned=unscanned, near=beside)


def restricted(found: TissueMask, shown: NDArray[np.float32]) -> TissueMask:
    """A mask that shows what ``shown`` says, float32 [H, W] of 0 … 1 on the same grid, pen and all."""
    return dataclasses.replace(found, tissue=found.tissue & (shown > 0.5), shown=shown, near=None)


def mask_image(mask: TissueMask) -> UInt8Array:
    """The mask to look at, uint8 [H, W]: 255 tissue, 170 other that shows, 100 pen, 50 not scanned, 0 glass."""
    image = np.zeros(mask.tissue.shape, np.uint8)
    for part, value in ((mask.unscanned, 50), (mask.pen, 100), (mask.shown > 0.5, 170), (mask.tissue, 255)):
        if part is not None:
            image[part] = value
    return image


def _fading(mask: NDArray[np.bool_], distance: float) -> NDArray[np.float32]:
    """1 on the mask, falling linearly to 0 at ``distance`` pixels from it."""
    if not mask.any():
        return np.zeros(mask.shape, np.float32)
    away = ndimage.distance_transform_edt(~mask)
    faded: NDArray[np.float32] = np.clip(1 - away / max(1.0, distance), 0, 1).astype(np.float32)
    return faded


def _near(mask: NDArray[np.bool_], distance: float) -> NDArray[np.bool_]:
    """Pixels within ``distance`` pixels of the mask."""
    if distance <= 0 or not mask.any() or mask.all():
        return mask
    near: NDArray[np.bool_] = ndimage.distance_transform_edt(~mask) <= distance
    return near


def _cells(start: int, count: int, cell: float, size: int) -> tuple[int, int]:
    """Range of mask pixels that interpolation in [start, start + count) looks at."""
    first = int(np.floor((start + 0.5) / cell - 0.5))
    last = int(np.floor((start + count - 0.5) / cell - 0.5)) + 1
    return min(max(first, 0), size - 1), min(max(last + 1, 1), size)


def _interpolation(start: int, count: int, cell: float, size: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Index of the mask pixel before each pixel's centre, and the fraction of the way to the next."""
    position = np.clip((np.arange(start, start + count) + 0.5) / cell - 0.5, 0, size - 1)
    index = np.floor(position).astype(np.int64)
    return index, (position - index).astype(np.float32)
