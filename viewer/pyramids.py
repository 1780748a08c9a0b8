"""Images as pyramids of JPEG tiles, as the page asks for them: level 0 is the largest, each level half of the last.

A stain's OME-TIFF holds such tiles already, and so do many slides: they are sent as they lie in the file. Only tiles
that the image's edge cuts are encoded anew, because the file fills them up. What no file holds is read, reduced and
encoded.
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import simplejpeg
import tifffile
from PIL import Image

from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.slides import Slide
from staindiffuser.viewer.errors import NotThereError, ResultGoneError

__all__ = ["SIDE", "JpegPyramid", "MapPyramid", "Pyramid", "SlidePyramid", "TileCache", "encode", "halvings"]

SIDE = 512
"""Side of a tile, pixels; of those that a slide holds, its own."""
STORED_SIDES = range(192, 1025)
"""Sides of a slide's own tiles that are sent as they are: of smaller ones a view would take too many requests."""
QUALITY = 88
"""JPEG quality of tiles that are encoded here."""
MAX_READ = 1024**2
"""Pixels read for one tile; where a slide has no level that is small enough, tiles are made of the tiles below."""
_JPEG = 7

Sizes = tuple[tuple[int, int], ...]


class Pyramid(Protocol):
    """An image in square tiles; thread-safe."""

    @property
    def levels(self) -> Sizes:
        """(width, height) of each level, largest first, each half of the one before, rounded up."""
        ...

    @property
    def sides(self) -> tuple[int, ...]:
        """Side of the tiles of each level, pixels."""
        ...

    def pixels(self, level: int, column: int, row: int) -> UInt8Array:
        """A tile, uint8 [h, w, 3], cut at the image's edge.

        Raises:
            NotThereError: there is no such tile.
            ResultGoneError: the file cannot be read.
        """
        ...

    def tile(self, level: int, column: int, row: int) -> bytes:
        """A tile as JPEG; raises the errors of :meth:`pixels`."""
        ...


def halvings(width: int, height: int) -> Sizes:
    """Sizes from the image down to one that a tile holds."""
    sizes = [(width, height)]
    while max(sizes[-1]) > SIDE:
        sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
    return tuple(sizes)


def encode(pixels_HW3: UInt8Array) -> bytes:
    """An image as JPEG, its colours not subsampled."""
    data: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels_HW3), quality=QUALITY, colorspace="RGB", colorsubsampling="444"
    )
    return data


def tile_size(levels: Sizes, level: int, column: int, row: int, sides: Sequence[int] | None = None) -> tuple[int, int]:
    """Width and height of a tile; ``sides`` are :data:`SIDE` by default.

    Raises:
        NotThereError: there is no such tile.
    """
    if not 0 <= level < len(levels):
        raise NotThereError(f"there is no level {level}: the image has {len(levels)}")
    width, height = levels[level]
    side = sides[level] if sides is not None else SIDE
    x, y = column * side, row * side
    if column < 0 or row < 0 or x >= width or y >= height:
        raise NotThereError(f"there is no tile {column}, {row}: level {level} is {width} × {height} pixels")
    return min(side, width - x), min(side, height - y)


class _TileFile:
    """The encoded tiles of an OME-TIFF that this package wrote; open as long as this object lives. Thread-safe."""

    def __init__(self, path: Path) -> None:
        """Read where the tiles lie; raises ResultGoneError if that cannot be done."""
        self.path = path
        try:
            with tifffile.TiffFile(path) as tiff:
                self.pages: list[Any] = [level.keyframe for level in tiff.series[0].levels]
                self.levels: Sizes = tuple((int(page.imagewidth), int(page.imagelength)) for page in self.pages)
                self._offsets = [np.asarray(page.dataoffsets, np.int64) for page in self.pages]
                self._counts = [np.asarray(page.databytecounts, np.int64) for page in self.pages]
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except (OSError, tifffile.TiffFileError, IndexError, ValueError) as error:
            raise ResultGoneError(f"{path} cannot be read: {error}") from error
        weakref.finalize(self, os.close, self._fd)
        self._lock = threading.Lock()

    def misfit(self) -> str | None:
        """Why these are not tiles of :data:`SIDE` on levels that are halves of one another; None if they are."""
        if any((page.tilewidth, page.tilelength) != (SIDE, SIDE) for page in self.pages):
            return f"{self.path.name} is not made of tiles of {SIDE} pixels"
        for (width, height), lower in itertools.pairwise(self.levels):
            if lower != ((width + 1) // 2, (height + 1) // 2):
                return f"the levels of {self.path.name} are not halves of one another"
        return None

    def stored(self, level: int, column: int, row: int) -> tuple[bytes, int]:
        """A tile that is known to exist, as it lies in the file, and its number; raises ResultGoneError."""
        index = row * -(-self.levels[level][0] // SIDE) + column
        offset, count = int(self._offsets[level][index]), int(self._counts[level][index])
        try:
            data = self._read(offset, count)
        except OSError as error:
            raise ResultGoneError(f"{self.path} cannot be read: {error.strerror or error}") from error
        if len(data) != count:
            raise ResultGoneError(f"{self.path} is shorter than it was")
        return data, index

    def _read(self, offset: int, count: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(self._fd, count, offset)
        with self._lock:  # Windows
            os.lseek(self._fd, offset, os.SEEK_SET)
            return os.read(self._fd, count)


class JpegPyramid:
    """A stain's image that this package wrote: its tiles are JPEG files of their own."""

    def __init__(self, path: Path) -> None:
        """Read where the tiles lie; the file stays open as long as this object lives.

        Raises:
            ResultGoneError: the file is missing or damaged.
            ValueError: its tiles cannot be sent as they are.
        """
        self._file = _TileFile(path)
        if (problem := self._file.misfit()) is not None:
            raise ValueError(problem)
        for page in self._file.pages:
            if int(page.compression) != _JPEG or page.jpegtables is not None or page.samplesperpixel != 3:
                raise ValueError(f"the tiles of {path.name} are not JPEG files of their own")
        self.levels = self._file.levels
        self.sides = (SIDE,) * len(self.levels)

    def tile(self, level: int, column: int, row: int) -> bytes:
        """See :meth:`Pyramid.tile`."""
        if tile_size(self.levels, level, column, row) == (SIDE, SIDE):
            return self._file.stored(level, column, row)[0]
        return encode(self.pixels(level, column, row))

    def pixels(self, level: int, column: int, row: int) -> UInt8Array:
        """See :meth:`Pyramid.pixels`."""
        width, height = tile_size(self.levels, level, column, row)
        data, _ = self._file.stored(level, column, row)
        try:
            decoded: UInt8Array = simplejpeg.decode_jpeg(data, colorspace="RGB")
        except ValueError as error:
            raise ResultGoneError(f"{self._file.path} is damaged: {error}") from error
        return decoded[:height, :width]


class MapPyramid:
    """A cell map that this package wrote: one lossless plane."""

    def __init__(self, path: Path) -> None:
        """Read where the tiles lie; the file stays open as long as this object lives.

        Raises:
            ResultGoneError: the file is missing, damaged, or not a cell map.
        """
        self._file = _TileFile(path)
        if self._file.misfit() is not None or any(page.samplesperpixel != 1 for page in self._file.pages):
            raise ResultGoneError(f"{path} is not a cell map")
        self.levels = self._file.levels

    def values(self, level: int, column: int, row: int) -> UInt8Array:
        """A tile, uint8 [h, w], probability × 255, cut at the image's edge.

        Raises:
            NotThereError: there is no such tile.
            ResultGoneError: the file cannot be read.
        """
        width, height = tile_size(self.levels, level, column, row)
        data, index = self._file.stored(level, column, row)
        try:
            decoded: UInt8Array = self._file.pages[level].decode(data, index)[0]
        except Exception as error:  # what a codec raises is its own
            raise ResultGoneError(f"{self._file.path} is damaged: {error}") from error
        return decoded.reshape(SIDE, SIDE)[:height, :width]


class SlidePyramid:
    """A slide of any format: its own JPEG tiles where it has them, others are made when they are asked for."""

    def __init__(
        self,
        slide: Slide,
        cache: TileCache,
        name: Hashable,
        *,
        size: tuple[int, int] | None = None,
        own_tiles: bool = False,
    ) -> None:
        """Take over the slide, which is closed when this object is gone.

        Args:
            slide: an open slide.
            cache: keeps the tiles of which others are made.
            name: of the slide in the cache.
            size: (width, height) to show it at, by default its own.
            own_tiles: send the slide's tiles where they are JPEG; their side may not be :data:`SIDE`. Not with
                ``size``.
        """
        self._slide, self._cache, self._name = slide, cache, name
        self.levels: Sizes = halvings(*(size or slide.size))
        self._stored = _stored_levels(slide, self.levels) if own_tiles else {}
        """The slide's levels whose own tiles are sent, by level."""
        self.sides = tuple(
            slide.jpeg_side(self._stored[level]) or SIDE if level in self._stored else SIDE
            for level in range(len(self.levels))
        )
        weakref.finalize(self, slide.close)

    def tile(self, level: int, column: int, row: int) -> bytes:
        """See :meth:`Pyramid.tile`."""
        size = tile_size(self.levels, level, column, row, self.sides)
        if level in self._stored and self._is_inner(level, column, row, size):
            try:
                stored = self._slide.jpeg(self._stored[level], column, row)
            except OSError as error:
                raise self._gone(error) from error
            if stored is not None:
                return stored
        key = (self._name, level, column, row)
        return self._cache.get(key, lambda: encode(self._make(level, column, row)))

    def pixels(self, level: int, column: int, row: int) -> UInt8Array:
        """See :meth:`Pyramid.pixels`; after JPEG's rounding."""
        decoded: UInt8Array = simplejpeg.decode_jpeg(self.tile(level, column, row), colorspace="RGB")
        return decoded

    def _is_inner(self, level: int, column: int, row: int, size: tuple[int, int]) -> bool:
        """Whether the slide's own tile is not filled up: its level may be a pixel smaller than the page's."""
        side = self.sides[level]
        width, height = self._slide.level_sizes[self._stored[level]]
        return size == (side, side) and (column + 1) * side <= width and (row + 1) * side <= height

    def _gone(self, error: OSError) -> ResultGoneError:
        return ResultGoneError(f"{self._slide.path} cannot be read: {error.strerror or error}")

    def _make(self, level: int, column: int, row: int) -> UInt8Array:
        size = tile_size(self.levels, level, column, row, self.sides)
        whole, side = self.levels[0], self.sides[level]
        # The tile in level-0 pixels; the last column and row of a halved level may stand for less than a whole pixel.
        x0, y0 = column * side << level, row * side << level
        x1, y1 = min(whole[0], x0 + (size[0] << level)), min(whole[1], y0 + (size[1] << level))
        stored = 0
        for candidate, (width, _) in enumerate(self._slide.level_sizes):
            if whole[0] / width <= (1 << level) * 1.01:
                stored = candidate
        level_width, level_height = self._slide.level_sizes[stored]
        sx, sy = level_width / whole[0], level_height / whole[1]
        left, top = int(x0 * sx), int(y0 * sy)
        right, bottom = min(level_width, int(np.ceil(x1 * sx))), min(level_height, int(np.ceil(y1 * sy)))
        if level and (right - left) * (bottom - top) > MAX_READ:
            return self._from_below(level, column, row, size)
        try:
            region = self._slide.read(stored, left, top, max(1, right - left), max(1, bottom - top))
        except OSError as error:
            raise self._gone(error) from error
        if region.shape[:2] == (size[1], size[0]):
            return region
        box = (x0 * sx - left, y0 * sy - top, min(x1 * sx - left, region.shape[1]), min(y1 * sy - top, region.shape[0]))
        reduced = Image.fromarray(region).resize(size, Image.Resampling.BOX, box=box, reducing_gap=None)
        return np.asarray(reduced)

    def _from_below(self, level: int, column: int, row: int, size: tuple[int, int]) -> UInt8Array:
        canvas = np.full((2 * size[1], 2 * size[0], 3), 255, np.uint8)
        width, height = self.levels[level - 1]
        left, top, side = 2 * column * self.sides[level], 2 * row * self.sides[level], self.sides[level - 1]
        right, bottom = min(width, left + canvas.shape[1]), min(height, top + canvas.shape[0])
        for y in range(top // side, -(-bottom // side)):
            for x in range(left // side, -(-right // side)):
                part = self.pixels(level - 1, x, y)
                x0, y0 = x * side - left, y * side - top  # negative where a tile begins before this one
                part = part[max(0, -y0) :, max(0, -x0) :]
                space = canvas[max(0, y0) :, max(0, x0) :][: part.shape[0], : part.shape[1]]
                space[:] = part[: space.shape[0], : space.shape[1]]
        return np.asarray(Image.fromarray(canvas).reduce(2))


def _stored_levels(slide: Slide, levels: Sizes) -> dict[int, int]:
    """The slide's levels that are those of the page, to a pixel, and made of JPEG tiles of a fitting size."""
    found = {}
    for number, (width, height) in enumerate(slide.level_sizes):
        for level, size in enumerate(levels[:-1]):  # the smallest stays one tile: the thumbnail
            near = abs(width - size[0]) <= 1 and abs(height - size[1]) <= 1
            if near and slide.jpeg_side(number) in STORED_SIDES:
                found[level] = number
    return found


class TileCache:
    """Encoded tiles, the most recently used ones; one that several ask for at once is made once. Thread-safe.

    No more tiles are made at once than there are processors: what only has to be read does not wait behind them.
    """

    def __init__(self, limit: int) -> None:
        """Keep up to ``limit`` bytes."""
        self._busy = threading.BoundedSemaphore(os.cpu_count() or 1)
        self._inside = threading.local()
        self._limit = limit
        self._bytes = 0
        self._kept: OrderedDict[Hashable, bytes] = OrderedDict()
        self._making: dict[Hashable, Future[bytes]] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], bytes]) -> bytes:
        """The tile of this name, made if it is not there; raises what ``make`` raises."""
        with self._lock:
            kept = self._kept.get(key)
            if kept is not None:
                self._kept.move_to_end(key)
                return kept
            future = self._making.get(key)
            mine = future is None
            if future is None:
                future = self._making[key] = Future()
        if mine:
            try:
                made = self._made(make)
                future.set_result(made)
            except BaseException as error:
                future.set_exception(error)
                raise
            else:
                self._keep(key, made)
            finally:
                with self._lock:
                    del self._making[key]
        return future.result()

    def _made(self, make: Callable[[], bytes]) -> bytes:
        """Make a tile; one that is made of others, which are made meanwhile, takes one place."""
        if getattr(self._inside, "value", False):
            return make()
        with self._busy:
            self._inside.value = True
            try:
                return make()
            finally:
                self._inside.value = False

    def _keep(self, key: Hashable, data: bytes) -> None:
        with self._lock:
            self._kept[key] = data
            self._bytes += len(data)
            while self._bytes > self._limit:
                _, dropped = self._kept.popitem(last=False)
                self._bytes -= len(dropped)
