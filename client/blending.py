"""Composes tiles into one image, blending neighbours with linear ramps.

Weights are integers and sums are exact: a pixel does not depend on the order in which tiles arrive, the region that is
composed, or the number of threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from staindiffuser.client.tiling import GridTile, TileGrid
from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.tissue import TissueMask

__all__ = ["Mosaic", "OutputImage", "Rectangle", "ramp_weights"]

_GLASS = (216, 236)
"""Grey levels of the darkest channel between which a stained image passes from painted to glass; models' glass has 241
and more (ours)."""
_PAINTED = np.clip(np.round((_GLASS[1] - np.arange(256)) / (_GLASS[1] - _GLASS[0]) * 256), 0, 256).astype(np.uint16)
"""By the darkest channel, 0 … 256."""

Rectangle = tuple[int, int, int, int]
"""x0, y0, x1, y1; pixels of the result."""


@dataclass(frozen=True, kw_only=True)
class OutputImage:
    """An image that is composed from tiles."""

    tensor: str
    """The server's output tensor."""
    channels: int
    """3 for an image, 1 for a cell map."""
    glass: int
    """Pixel value of glass, which is not stained: 255 (white) for an image, 0 (no cell) for a cell map."""


class Mosaic:
    """Holds the tiles that are still needed and composes regions from them; thread-safe."""

    def __init__(
        self,
        grid: TileGrid,
        images: tuple[OutputImage, ...],
        mask: TissueMask | None = None,
        left_out: Callable[[], Sequence[Rectangle]] = tuple,
    ) -> None:
        """Create an empty mosaic.

        Args:
            grid: the grid of tiles.
            images: the images to compose.
            mask: fades the result to glass outside the tissue; without it, everything that was stained shows.
            left_out: the parts known so far to be damaged in the input, which are composed as glass.
        """
        self._grid = grid
        self._images = images
        self._mask = mask
        self._left_out = left_out
        self._weights = ramp_weights(grid)
        self._tiles: dict[tuple[int, int], dict[str, UInt8Array]] = {}
        self._lock = threading.Lock()

    def add(self, tile: GridTile, outputs: Mapping[str, UInt8Array]) -> None:
        """Add a stained tile: per tensor, uint8 [T, T, C]. Its margin is cropped."""
        x0, x1 = self._grid.shown(tile.x, self._grid.width)
        y0, y1 = self._grid.shown(tile.y, self._grid.height)
        if x0 >= x1 or y0 >= y1:
            return
        kept = {
            image.tensor: outputs[image.tensor][y0 - tile.y : y1 - tile.y, x0 - tile.x : x1 - tile.x].copy()
            for image in self._images
        }
        with self._lock:
            self._tiles[tile.row, tile.column] = kept

    def forget_above(self, row: int) -> None:
        """Drop the rows of tiles above ``row``."""
        with self._lock:
            for key in [key for key in self._tiles if key[0] < row]:
                del self._tiles[key]

    def compose(self, image: OutputImage, x: int, y: int, width: int, height: int) -> UInt8Array | None:
        """A region, uint8 [height, width, C]; None if no part of it was stained, so that it is all glass."""
        grid = self._grid
        rows, columns = grid.rows_that_show(y, y + height), grid.columns_that_show(x, x + width)
        with self._lock:
            tiles = {
                (row, column): (grid.at(row, column), self._tiles[row, column][image.tensor])
                for row in rows
                for column in columns
                if (row, column) in self._tiles
            }
        if not tiles:
            return None
        image_HWC = np.full((height, width, image.channels), image.glass, dtype=np.uint8)
        for y0, y1, over in grid.row_segments(y, y + height):
            for x0, x1, beside in grid.column_segments(x, x + width):
                parts = [tiles[row, column] for row in over for column in beside if (row, column) in tiles]
                if parts:
                    blended = self._blend(parts, x0, y0, x1, y1)
                    image_HWC[y0 - y : y1 - y, x0 - x : x1 - x] = blended
        image_HWC = self._faded(image_HWC, image.glass, x, y)
        for x0, y0, x1, y1 in self._left_out():
            image_HWC[max(0, y0 - y) : max(0, y1 - y), max(0, x0 - x) : max(0, x1 - x)] = image.glass
        return image_HWC

    def _blend(self, parts: list[tuple[GridTile, UInt8Array]], x0: int, y0: int, x1: int, y1: int) -> UInt8Array:
        """A region that is covered by all of these tiles, at most four."""
        grid = self._grid
        crops = []
        for tile, pixels_HWC in parts:
            left, top = grid.shown(tile.x, grid.width)[0], grid.shown(tile.y, grid.height)[0]
            crops.append(pixels_HWC[y0 - top : y1 - top, x0 - left : x1 - left])
        if len(parts) == 1:
            return crops[0]
        sums_HWC = np.zeros(crops[0].shape, dtype=np.uint32)
        total_HW1 = np.zeros((y1 - y0, x1 - x0, 1), dtype=np.uint32)
        for (tile, _), crop_HWC in zip(parts, crops, strict=True):
            down, across = self._weights[y0 - tile.y : y1 - tile.y], self._weights[x0 - tile.x : x1 - tile.x]
            weight_HW1 = (down[:, None] * across)[..., None]
            sums_HWC += crop_HWC * weight_HW1
            total_HW1 += weight_HW1
        return ((sums_HWC + (total_HW1 >> np.uint32(1))) // total_HW1).astype(np.uint8)

    def _faded(self, image_HWC: UInt8Array, glass: int, x: int, y: int) -> UInt8Array:
        """The image as the mask shows it, faded to ``glass``."""
        if self._mask is None:
            return image_HWC
        height, width, channels = image_HWC.shape
        opacity_HW = self._mask.opacity(x, y, width, height)
        painted_HW = self._painted(image_HWC, x, y) if channels == 3 else None
        if opacity_HW is None:
            opacity_HW = painted_HW
        elif painted_HW is not None:
            opacity_HW = _product(opacity_HW, painted_HW)
        if opacity_HW is None:
            return image_HWC
        # At most 255 × 256 + 128, which 16 bits hold.
        opacity_HW1 = opacity_HW[..., None]
        faded: NDArray[np.uint16] = image_HWC * opacity_HW1 + glass * (256 - opacity_HW1) + np.uint16(128)
        return (faded >> np.uint16(8)).astype(np.uint8)

    def _painted(self, image_HW3: UInt8Array, x: int, y: int) -> NDArray[np.uint16] | None:
        """Opacity of a stained image by what it shows: a model's glass is not quite white, and would be a halo beside
        the glass that no model saw. What it painted stays."""
        height, width = image_HW3.shape[:2]
        of_glass = None if self._mask is None else self._mask.glass_opacity(x, y, width, height)
        if of_glass is None:
            return None
        painted = _PAINTED[image_HW3.min(axis=-1)]
        opacity: NDArray[np.uint16] = painted + _product(np.uint16(256) - painted, of_glass)
        return opacity


def _product(a: NDArray[np.uint16], b: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """Of two opacities, 0 … 256."""
    product: NDArray[np.uint16] = ((a.astype(np.uint32) * b + 128) >> 8).astype(np.uint16)
    return product


def ramp_weights(grid: TileGrid) -> NDArray[np.uint32]:
    """Weight of each pixel along a tile's side: 0 in the margin, a ramp, a plateau. Neighbours' weights add up to the
    plateau."""
    weights = np.zeros(grid.tile, dtype=np.uint32)
    ramp, margin = grid.ramp, grid.margin
    plateau = max(1, 2 * ramp)
    first, last = margin - ramp // 2, grid.tile - margin + ramp // 2
    weights[first:last] = plateau
    rising = np.arange(1, plateau, 2, dtype=np.uint32)[:ramp]
    weights[first : first + ramp] = rising
    weights[last - ramp : last] = rising[::-1]
    return weights
