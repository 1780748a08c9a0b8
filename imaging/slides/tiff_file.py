"""TIFFs read chunk by chunk (tiles or strips) with tifffile: OME-TIFF, generic TIFF, and the tiles of whole slides.

Chunks are fetched with ``os.pread`` and decoded by ``TiffPage.decode``, both of which work in many threads at once.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.errors import IncompleteSlideError, SlideError
from staindiffuser.imaging.image_files import on_white
from staindiffuser.imaging.pixel_size import PixelSize, from_ome_xml, from_resolution
from staindiffuser.imaging.slides.slide import Slide

__all__ = ["TiffLevels", "TiffSlide"]

MAX_CHUNK_PIXELS = 2**28
"""A strip or tile that claims more is refused: nothing honest needs it and it would fill the memory."""


class TiffLevels:
    """The levels of a TIFF's first series, as RGB."""

    def __init__(self, path: Path) -> None:
        """Read the file's directories and check that every chunk lies inside the file.

        Raises:
            SlideError: it is damaged or incomplete, or not 8-bit RGB.
        """
        self.path = path
        _require_whole_chain(path)
        try:
            with tifffile.TiffFile(path) as tiff:
                if not tiff.series:
                    raise SlideError(f"{path} holds no image")
                series = tiff.series[0]
                pages = [level.keyframe for level in series.levels if len(level.shape) == 3 and len(level.pages) == 1]
                if not pages or len(pages) < len(series.levels):
                    raise SlideError(
                        f"{path} holds {series.axes} {series.shape}, not one RGB image (stack or channels?)"
                    )
                self.pages: list[Any] = [page.aspage() for page in pages]
                # These read from the file, and are remembered: it is closed when the tiles are decoded.
                self._decoders = [(page.decode, page.jpegtables, page.jpegheader) for page in self.pages]
                self.is_ome = bool(tiff.is_ome)
                self.mpp = (from_ome_xml(tiff.ome_metadata) if self.is_ome else None) or _resolution(self.pages[0])
        except SlideError:
            raise
        # A damaged TIFF makes tifffile raise nearly anything (struct.error, TypeError, MemoryError, ...).
        except Exception as error:
            raise SlideError(f"{path} is damaged or no TIFF: {_one_line(error)}") from error
        self._check_pages()
        self.is_tiled = all(page.is_tiled for page in self.pages)
        self.sizes = tuple((int(page.imagewidth), int(page.imagelength)) for page in self.pages)
        self._fd = os.open(path, os.O_RDONLY)

    @property
    def chunk(self) -> tuple[int, int]:
        """Width and height of a chunk of level 0."""
        return self._chunk(0)

    def read(self, level: int, x: int, y: int, width: int, height: int) -> UInt8Array:
        """A region, uint8 [height, width, 3]; it must lie inside the level.

        Raises:
            SlideError: a chunk cannot be decoded.
            LookupError: a chunk is not stored at all (sparse slides): what that means is the format's business.
        """
        chunk_width, chunk_height = self._chunk(level)
        columns = -(-self.sizes[level][0] // chunk_width)
        region = np.empty((height, width, 3), dtype=np.uint8)
        for row in range(y // chunk_height, (y + height - 1) // chunk_height + 1):
            for column in range(x // chunk_width, (x + width - 1) // chunk_width + 1):
                chunk = self._decode(level, row * columns + column)
                left, top = column * chunk_width, row * chunk_height
                x0, x1 = max(x, left), min(x + width, left + chunk_width)
                y0, y1 = max(y, top), min(y + height, top + chunk_height)
                region[y0 - y : y1 - y, x0 - x : x1 - x] = chunk[y0 - top : y1 - top, x0 - left : x1 - left]
        return region

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _chunk(self, level: int) -> tuple[int, int]:
        page = self.pages[level]
        if page.is_tiled:
            return int(page.tilewidth), int(page.tilelength)
        return int(page.imagewidth), min(int(page.rowsperstrip), int(page.imagelength))

    def _check_pages(self) -> None:
        bytes_in_file = self.path.stat().st_size
        for level, page in enumerate(self.pages):
            layout = (page.dtype, page.samplesperpixel, page.planarconfig)
            if page.dtype != np.uint8 or page.samplesperpixel not in (3, 4) or page.planarconfig != 1:
                raise SlideError(
                    f"{self.path} is {layout[1]} × {layout[0]} a pixel (level {level}): H&E must be 8-bit RGB"
                )
            if np.prod(self._chunk(level)) > MAX_CHUNK_PIXELS:
                raise SlideError(f"{self.path} claims a tile of {self._chunk(level)} pixels: it is damaged")
            offsets = np.asarray(page.dataoffsets, dtype=np.int64)
            counts = np.asarray(page.databytecounts, dtype=np.int64)
            width, height = self._chunk(level)
            expected = -(-int(page.imagewidth) // width) * -(-int(page.imagelength) // height)
            if len(offsets) < expected or len(counts) < expected:
                raise SlideError(f"{self.path} is damaged: level {level} has {len(offsets)} of {expected} tiles")
            if (offsets + counts).max(initial=0) > bytes_in_file:
                raise IncompleteSlideError(
                    f"{self.path} is incomplete: its data go on after its end ({bytes_in_file} bytes)"
                )

    def _decode(self, level: int, index: int) -> UInt8Array:
        page = self.pages[level]
        count = page.databytecounts[index]
        if count == 0:
            raise LookupError(f"chunk {index} of level {level} is not stored")
        try:
            data = os.pread(self._fd, count, page.dataoffsets[index])
            decode, tables, header = self._decoders[level]
            segment = decode(data, index, jpegtables=tables, jpegheader=header)[0]
        except Exception as error:  # every codec has its own exception class
            raise SlideError(
                f"{self.path} is damaged: tile {index} of level {level} cannot be decoded: {_one_line(error)}"
            ) from error
        if segment is None:
            raise LookupError(f"chunk {index} of level {level} is not stored")
        pixels: UInt8Array = segment[0]
        return on_white(pixels) if pixels.shape[-1] == 4 else pixels


class TiffSlide(Slide):
    """An OME-TIFF or another TIFF."""

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            SlideError: see :class:`TiffLevels`.
        """
        self.path = path
        self._levels = TiffLevels(path)
        self.format = "ome-tiff (tifffile)" if self._levels.is_ome else "tiff (tifffile)"
        self.mpp = self._levels.mpp
        self.level_sizes = self._levels.sizes
        self.exact_levels = tuple(range(len(self.level_sizes)))
        self.chunk = self._levels.chunk
        self._whole_HW3: UInt8Array | None = None
        if not self._levels.is_tiled:
            self._whole_HW3 = self._read_whole()

    def read(self, level: int, x: int, y: int, width: int, height: int) -> UInt8Array:
        """See :meth:`Slide.read`."""
        if self._whole_HW3 is not None and level == 0:
            return self._whole_HW3[y : y + height, x : x + width]
        try:
            return self._levels.read(level, x, y, width, height)
        except LookupError as error:
            raise SlideError(f"{self.path} is incomplete: {error}") from error

    def close(self) -> None:
        """Close the file."""
        self._levels.close()

    def _read_whole(self) -> UInt8Array:
        """Strips go across the image, often as one: reading regions would decode everything each time."""
        width, height = self.size
        self.chunk = (512, 512)
        if width * height > MAX_CHUNK_PIXELS:
            self.close()
            raise SlideError(f"{self.path} is {width} × {height} pixels and not tiled: make it a tiled TIFF")
        try:
            return self.read(0, 0, 0, width, height)
        except SlideError:
            self.close()
            raise


def _require_whole_chain(path: Path) -> None:
    """Follow the directories' next-pointers: readers pass over one that points behind the end of the file.

    Raises:
        IncompleteSlideError: there is one.
    """
    end = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(16)
        order = {b"II": "<", b"MM": ">"}.get(header[:2])
        if order is None or len(header) < 16:
            return
        big = struct.unpack(order + "H", header[2:4])[0] == 43
        (offset,) = struct.unpack(order + "Q", header[8:]) if big else struct.unpack(order + "I", header[4:8])
        count_format, entry_bytes, pointer_format = ("Q", 20, "Q") if big else ("H", 12, "I")
        if not big and end >= 2**32:
            return  # NDPI's own way to be larger than a TIFF can be
        seen: set[int] = set()
        while offset and offset not in seen:
            seen.add(offset)
            pointer_at = end
            if offset < end:
                file.seek(offset)
                counted = file.read(struct.calcsize(count_format))
                if len(counted) == struct.calcsize(count_format):
                    pointer_at = file.tell() + struct.unpack(order + count_format, counted)[0] * entry_bytes
            if pointer_at + struct.calcsize(pointer_format) > end:
                raise IncompleteSlideError(f"{path} is incomplete: its directories go on after its end ({end} bytes)")
            file.seek(pointer_at)
            (offset,) = struct.unpack(order + pointer_format, file.read(struct.calcsize(pointer_format)))


def _resolution(page: Any) -> PixelSize | None:
    tags = page.tags
    x, y, unit = (tags.valueof(name) for name in ("XResolution", "YResolution", "ResolutionUnit"))
    return from_resolution(x, y, None if unit is None else int(unit))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
