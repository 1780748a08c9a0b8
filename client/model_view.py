"""A slide at the model's pixel size, read by regions.

Resampling is bicubic, with the kernel widened by the reduction factor so that it does not alias (Pillow's ``resize``
with ``box``). It works on the blocks of a fixed grid, so a pixel does not depend on the region that is read. Beyond
its edges the slide is reflected, to give tiles at the edge their context.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.pixel_size import SAME_PIXEL_SIZE, PixelSize
from staindiffuser.imaging.slides import Slide

__all__ = ["ModelView", "reflected"]

BLOCK = 512
"""Approximate side of a block, pixels at the model's pixel size."""
BICUBIC_SUPPORT = 2

Key = tuple[int, int]


class ModelView:
    """A slide at the model's pixel size; thread-safe.

    A block stays in memory only while tiles announced by :meth:`expect` still need it.
    """

    def __init__(
        self,
        slide: Slide,
        mpp: PixelSize,
        model_mpp: float,
        convert: Callable[[UInt8Array], UInt8Array] | None = None,
    ) -> None:
        """Choose the level to read and the size of the result.

        Args:
            slide: the slide.
            mpp: its pixel size at level 0, µm per pixel.
            model_mpp: the pixel size to produce, µm per pixel.
            convert: applied to the slide's pixels as they are read, before they are resampled.
        """
        self._slide, self._convert = slide, convert
        self.level = _best_level(slide, mpp, model_mpp)
        self._source = slide.level_sizes[self.level]
        level_mpp = [mpp[axis] * slide.size[axis] / self._source[axis] for axis in (0, 1)]
        self.resampled = any(abs(level_mpp[axis] / model_mpp - 1) > SAME_PIXEL_SIZE for axis in (0, 1))
        if self.resampled:
            self.size: tuple[int, int] = (
                max(1, round(slide.size[0] * mpp[0] / model_mpp)),
                max(1, round(slide.size[1] * mpp[1] / model_mpp)),
            )
            self._block: tuple[int, int] = (BLOCK, BLOCK)
        else:
            self.size = self._source
            chunk = slide.chunk
            self._block = (max(1, round(BLOCK / chunk[0])) * chunk[0], max(1, round(BLOCK / chunk[1])) * chunk[1])
        self.mpp: PixelSize = (mpp[0] * slide.size[0] / self.size[0], mpp[1] * slide.size[1] / self.size[1])
        """Pixel size of the result, µm per pixel: the model's, or the slide's own if it is close."""
        self.scale: tuple[float, float] = (slide.size[0] / self.size[0], slide.size[1] / self.size[1])
        """Level-0 pixels of the slide per pixel of the result, in x and y."""
        self._lock = threading.Lock()
        self._blocks: dict[Key, Future[UInt8Array]] = {}
        self._needed: dict[Key, int] = {}

    def read_tile(self, x: int, y: int, side: int) -> UInt8Array:
        """A square region, uint8 [side, side, 3], reflected at the slide's edges.

        Raises:
            SlideError: this part of the slide is damaged.
        """
        columns, rows = reflected(x, side, self.size[0]), reflected(y, side, self.size[1])
        left, top = int(columns.min()), int(rows.min())
        region = self.read(left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top)
        if region.shape[:2] == (side, side) and columns[0] == left and rows[0] == top:
            return region
        return np.ascontiguousarray(region[np.ix_(rows - top, columns - left)])

    def read(self, x: int, y: int, width: int, height: int) -> UInt8Array:
        """A region that lies inside the slide, uint8 [height, width, 3]."""
        region = np.empty((height, width, 3), dtype=np.uint8)
        for key in self._keys(x, y, width, height):
            block = self._get(key)
            left, top = key[0] * self._block[0], key[1] * self._block[1]
            x0, x1 = max(x, left), min(x + width, left + block.shape[1])
            y0, y1 = max(y, top), min(y + height, top + block.shape[0])
            region[y0 - y : y1 - y, x0 - x : x1 - x] = block[y0 - top : y1 - top, x0 - left : x1 - left]
        return region

    def expect(self, tiles: Iterable[tuple[int, int]], side: int) -> None:
        """Announce tiles (x, y) that will each be read once: blocks are kept until the last tile that needs them."""
        for x, y in tiles:
            for key in self._tile_keys(x, y, side):
                self._needed[key] = self._needed.get(key, 0) + 1

    def done(self, x: int, y: int, side: int) -> None:
        """Drop the blocks that no announced tile needs after this one."""
        with self._lock:
            for key in self._tile_keys(x, y, side):
                self._needed[key] -= 1
                if self._needed[key] == 0:
                    del self._needed[key]
                    self._blocks.pop(key, None)

    def _tile_keys(self, x: int, y: int, side: int) -> list[Key]:
        columns, rows = reflected(x, side, self.size[0]), reflected(y, side, self.size[1])
        left, top = int(columns.min()), int(rows.min())
        return self._keys(left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top)

    def _keys(self, x: int, y: int, width: int, height: int) -> list[Key]:
        across = range(x // self._block[0], (x + width - 1) // self._block[0] + 1)
        down = range(y // self._block[1], (y + height - 1) // self._block[1] + 1)
        return [(column, row) for row in down for column in across]

    def _get(self, key: Key) -> UInt8Array:
        with self._lock:
            future = self._blocks.get(key)
            mine = future is None
            if future is None:
                future = Future()
                if key in self._needed:
                    self._blocks[key] = future
        if mine:
            try:
                future.set_result(self._make(key))
            except BaseException as error:
                future.set_exception(error)
        return future.result()

    def _make(self, key: Key) -> UInt8Array:
        """Read or resample one block."""
        x0, y0 = key[0] * self._block[0], key[1] * self._block[1]
        x1, y1 = min(x0 + self._block[0], self.size[0]), min(y0 + self._block[1], self.size[1])
        if not self.resampled:
            return self._read_level(x0, y0, x1 - x0, y1 - y0)
        (left, right, box_x), (top, bottom, box_y) = self._source_span(0, x0, x1), self._source_span(1, y0, y1)
        source = Image.fromarray(self._read_level(left, top, right - left, bottom - top))
        box = (box_x[0], box_y[0], box_x[1], box_y[1])
        return np.asarray(source.resize((x1 - x0, y1 - y0), Image.Resampling.BICUBIC, box=box))

    def _read_level(self, x: int, y: int, width: int, height: int) -> UInt8Array:
        pixels = self._slide.read(self.level, x, y, width, height)
        return pixels if self._convert is None else self._convert(pixels)

    def _source_span(self, axis: int, start: int, stop: int) -> tuple[int, int, tuple[float, float]]:
        """The source pixels needed for [start, stop), kernel support included, and the exact span relative to them."""
        scale = self._source[axis] / self.size[axis]
        support = int(np.ceil(BICUBIC_SUPPORT * max(1.0, scale))) + 2
        first = max(0, int(np.floor(start * scale)) - support)
        last = min(self._source[axis], int(np.ceil(stop * scale)) + support)
        return first, last, (start * scale - first, min(stop * scale - first, float(last - first)))


def reflected(start: int, count: int, size: int) -> NDArray[np.int64]:
    """Indices of ``count`` pixels from ``start``, reflected into [0, size) without repeating the edge pixel."""
    index = np.arange(start, start + count)
    if size == 1:
        return np.zeros_like(index)
    index = np.abs(index) % (2 * (size - 1))
    inside: NDArray[np.int64] = np.minimum(index, 2 * (size - 1) - index)
    return inside


def _best_level(slide: Slide, mpp: PixelSize, model_mpp: float) -> int:
    """The smallest level whose pixels are not larger than the model's."""
    best = 0
    for level in slide.exact_levels:
        width, height = slide.level_sizes[level]
        level_mpp = max(mpp[0] * slide.size[0] / width, mpp[1] * slide.size[1] / height)
        if level_mpp <= model_mpp * (1 + SAME_PIXEL_SIZE) and width < slide.level_sizes[best][0]:
            best = level
    return best
