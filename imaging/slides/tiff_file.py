"""TIFFs read tile by tile (or strip by strip) with tifffile: OME-TIFF, other TIFFs, and the tiles of whole slides.

Tiles are fetched with ``os.pread`` and decoded by ``TiffPage.decode``, both of which work in several threads at once.
Every decode is checked: what is damaged must not come out as grey or black tissue.
"""

from __future__ import annotations

import os
import re
import struct
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.errors import IncompleteSlideError, SlideError, SlideReadError
from staindiffuser.imaging.image_files import WHITE, on_white
from staindiffuser.imaging.pixel_size import PixelSize, from_imagej, from_ome_xml, from_resolution
from staindiffuser.imaging.slides.codestreams import (
    DamagedCodestreamError,
    complete_jpeg,
    decode_intact_jpeg,
    require_intact_jpeg,
    require_intact_jpeg2000,
)
from staindiffuser.imaging.slides.slide import DamagedRegion, Slide

__all__ = ["TiffLevels", "TiffSlide"]

MAX_CHUNK_PIXELS = 2**28
"""A strip or tile that claims more is refused: no real file needs it, and it would fill the memory."""
_RGB, _YCBCR = 2, 6
_PHOTOMETRICS = {
    0: "is greyscale",
    1: "is greyscale",
    3: "uses a colour palette",
    4: "is a transparency mask",
    5: "is CMYK",
    8: "is CIELab",
    9: "is CIELab",
    10: "is CIELab",
}
_JPEG = (6, 7, 33007, 34892)
_JPEG_FILES = 7
"""JPEG as TIFF has it since 1995: every tile is a JPEG file, but for tables that it may share with others."""
_JPEG2000 = (33005, 34712)
_APERIO_YCBCR = (33003, 33004)
"""JPEG 2000 in Aperio's own colour space, which only OpenSlide converts."""
_PREMULTIPLIED, _ALPHA = 1, 2
_NOT_THE_SLIDE = {"label", "macro", "thumbnail", "barcode"}

OnDamage = Callable[[DamagedRegion, SlideError], UInt8Array]


class TiffLevels:
    """The levels of one image of a TIFF, as RGB."""

    def __init__(self, path: Path, sizes: Sequence[tuple[int, int]] | None = None) -> None:
        """Read the file's directories and check that every tile lies inside the file.

        Args:
            path: the file.
            sizes: (width, height) of the levels to find; by default the largest image that is not a label or macro.

        Raises:
            SlideError: the file is damaged or incomplete, or the image cannot be read as 8-bit RGB.
        """
        self.path = path
        self.notes: list[str] = []
        _require_whole_chain(path)
        try:
            with tifffile.TiffFile(path) as tiff:
                self.is_ome = bool(tiff.is_ome)
                _require_single_file(path, tiff)
                series = self._choose(tiff) if sizes is None else _series_of(tiff, sizes)
                self.pages = self._pages(series)
                # These read from the file, which is closed when the tiles are decoded; so they are kept.
                self._decoders = [(page.decode, page.jpegtables, page.jpegheader) for page in self.pages]
                # libjpeg's guess is right for all others; see tifffile's jpeg_decode_colorspace.
                self._unmarked_rgb = [int(page.photometric) == _RGB and not page.is_jfif for page in self.pages]
                self.mpp = self._find_pixel_size(tiff, series)
                profile = self.pages[0].tags.valueof("InterColorProfile")
                self.icc_profile = bytes(profile) if profile else None
            for level, page in enumerate(self.pages):
                self._require_all_chunks(level, page)
        except SlideError:
            raise
        # A damaged TIFF makes tifffile raise nearly anything (struct.error, TypeError, MemoryError, ...).
        except Exception as error:
            raise SlideError(f"{path} is damaged or not a TIFF: {_one_line(error)}") from error
        self.is_tiled = all(page.is_tiled for page in self.pages)
        self.sizes = tuple((int(page.imagewidth), int(page.imagelength)) for page in self.pages)
        self._fd = os.open(path, os.O_RDONLY)

    @property
    def chunk(self) -> tuple[int, int]:
        """Width and height of a tile or strip of level 0."""
        return self._chunk(0)

    def read(
        self, level: int, x: int, y: int, width: int, height: int, *, on_damage: OnDamage, sparse: bool = True
    ) -> UInt8Array:
        """A region, uint8 [height, width, 3]; it must lie inside the level.

        Args:
            level: the level.
            x: left edge, pixels of the level.
            y: upper edge, pixels of the level.
            width: pixels.
            height: pixels.
            on_damage: provides the pixels of a tile that cannot be decoded, or raises.
            sparse: tiles that are not stored are white.

        Raises:
            SlideError: a tile cannot be decoded, from ``on_damage``.
            SlideReadError: the disk or network failed.
            LookupError: a tile is not stored and ``sparse`` is false: the vendor's format decides what that means.
        """
        chunk_width, chunk_height = self._chunk(level)
        columns = -(-self.sizes[level][0] // chunk_width)
        region = np.empty((height, width, 3), dtype=np.uint8)
        for row in range(y // chunk_height, (y + height - 1) // chunk_height + 1):
            for column in range(x // chunk_width, (x + width - 1) // chunk_width + 1):
                left, top = column * chunk_width, row * chunk_height
                size_x, size_y = (
                    min(chunk_width, self.sizes[level][0] - left),
                    min(chunk_height, self.sizes[level][1] - top),
                )
                try:
                    chunk = self._decode(level, row * columns + column)[:size_y, :size_x]
                except LookupError:
                    if not sparse:
                        raise
                    chunk = np.full((size_y, size_x, 3), WHITE, dtype=np.uint8)
                except SlideReadError:
                    raise
                except SlideError as error:
                    chunk = on_damage(DamagedRegion(level, left, top, size_x, size_y), error)
                x0, x1 = max(x, left), min(x + width, left + size_x)
                y0, y1 = max(y, top), min(y + height, top + size_y)
                region[y0 - y : y1 - y, x0 - x : x1 - x] = chunk[y0 - top : y1 - top, x0 - left : x1 - left]
        return region

    def jpeg_side(self, level: int) -> int | None:
        """See :meth:`Slide.jpeg_side`."""
        page, (width, height) = self.pages[level], self._chunk(level)
        whole = page.compression == _JPEG_FILES and not self._decoders[level][2]
        fits = whole and page.is_tiled and page.samplesperpixel == 3 and page.planarconfig == 1
        return width if fits and width == height else None

    def jpeg(self, level: int, column: int, row: int) -> bytes | None:
        """See :meth:`Slide.jpeg`."""
        page, (width, _) = self.pages[level], self._chunk(level)
        index = row * -(-int(page.imagewidth) // width) + column
        count = int(page.databytecounts[index])
        if count == 0:
            return None
        try:
            data = os.pread(self._fd, count, page.dataoffsets[index])
        except OSError as error:
            raise SlideReadError(f"{self.path} cannot be read: {error.strerror or error}") from error
        stream = complete_jpeg(data, self._decoders[level][1], rgb=self._unmarked_rgb[level])
        try:
            require_intact_jpeg(stream)
        except DamagedCodestreamError:
            return None
        return stream

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _choose(self, tiff: Any) -> Any:
        """The largest image that is not named as a label, macro or thumbnail."""
        images = [series for series in tiff.series if series.keyframe is not None]
        slides = [series for series in images if not _NOT_THE_SLIDE & set(re.split(r"[\W_]+", series.name.lower()))]
        if not slides:
            what = "holds no image" if not images else "holds only label, macro or thumbnail images"
            raise SlideError(f"{self.path} {what}")
        chosen = max(slides, key=_area)
        others = sum(series is not chosen and 2 * _area(series) > _area(chosen) for series in slides)
        if others:
            self.notes.append(f"{self.path.name} holds {others + 1} large images: only the largest is stained")
        return chosen

    def _pages(self, series: Any) -> list[Any]:
        """One page per level; reduced levels that cannot be read are dropped with those below them."""
        pages: list[Any] = []
        for level in series.levels:
            page = level.keyframe.aspage()
            problem = _unreadable(page)
            if problem is None and (len(level.shape) != 3 or len(level.pages) != 1):
                problem = f"holds {series.axes} {series.shape}, not one RGB image (a stack, or channels?)"
            if problem is not None:
                if pages:
                    self.notes.append(f"{self.path.name}: reduced levels are ignored, the first of them {problem}")
                    return pages
                raise SlideError(f"{self.path} {problem}: H&E must be 8-bit RGB")
            pages.append(page)
        return pages

    def _find_pixel_size(self, tiff: Any, series: Any) -> PixelSize | None:
        if self.is_ome:
            image = next(index for index, candidate in enumerate(tiff.series) if candidate is series)
            if (mpp := from_ome_xml(tiff.ome_metadata, image)) is not None:
                return mpp
        tags = self.pages[0].tags
        x, y, unit = (tags.valueof(name) for name in ("XResolution", "YResolution", "ResolutionUnit"))
        if tiff.is_imagej and (metadata := tiff.imagej_metadata):
            return from_imagej(metadata.get("unit"), x, y)
        return from_resolution(x, y, None if unit is None else int(unit))

    def _chunk(self, level: int) -> tuple[int, int]:
        page = self.pages[level]
        if page.is_tiled:
            return int(page.tilewidth), int(page.tilelength)
        return int(page.imagewidth), min(int(page.rowsperstrip), int(page.imagelength))

    def _planes(self, page: Any) -> int:
        return int(page.samplesperpixel) if page.planarconfig == 2 else 1

    def _require_all_chunks(self, level: int, page: Any) -> None:
        bytes_in_file = self.path.stat().st_size
        width, height = self._chunk(level)
        if width * height > MAX_CHUNK_PIXELS:
            raise SlideError(f"{self.path} claims a tile of {width} × {height} pixels: it is damaged")
        offsets, counts = page.dataoffsets, page.databytecounts
        expected = -(-int(page.imagewidth) // width) * -(-int(page.imagelength) // height) * self._planes(page)
        if len(offsets) < expected or len(counts) < expected:
            raise SlideError(f"{self.path} is damaged: level {level} has {len(offsets)} of {expected} tiles")
        ends = np.asarray(offsets[:expected], dtype=np.int64) + np.asarray(counts[:expected], dtype=np.int64)
        if ends.max(initial=0) > bytes_in_file:
            raise IncompleteSlideError(
                f"{self.path} is incomplete: its data continue after its end ({bytes_in_file} bytes)"
            )

    def _decode(self, level: int, index: int) -> UInt8Array:
        """A tile or strip as RGB; raises SlideError if it is damaged, LookupError if it is not stored."""
        page = self.pages[level]
        planes = self._planes(page)
        width, height = self._chunk(level)
        stride = -(-int(page.imagewidth) // width) * -(-int(page.imagelength) // height)
        try:
            parts = [self._decode_segment(level, index + plane * stride) for plane in range(planes)]
        except LookupError:
            raise
        except OSError as error:
            raise SlideReadError(f"{self.path} cannot be read: {error.strerror or error}") from error
        except Exception as error:  # every codec has its own exception class
            raise SlideError(
                f"{self.path} is damaged: tile {index} of level {level} cannot be decoded: {_one_line(error)} "
                "(--allow-damaged leaves out such tiles)"
            ) from error
        pixels = parts[0] if planes == 1 else np.concatenate(parts, axis=-1)
        if pixels.shape[-1] == 3:
            return pixels
        kind = int(page.extrasamples[0])
        if kind in (_ALPHA, _PREMULTIPLIED):
            return on_white(pixels, premultiplied=kind == _PREMULTIPLIED)
        return pixels[..., :3]  # an unspecified sample is not part of the colour (TIFF 6.0, ExtraSamples)

    def _decode_segment(self, level: int, index: int) -> UInt8Array:
        page = self.pages[level]
        count = int(page.databytecounts[index])
        if count == 0:
            raise LookupError(f"tile {index} of level {level} is not stored")
        data = os.pread(self._fd, count, page.dataoffsets[index])
        decode, tables, header = self._decoders[level]
        if page.compression in _JPEG:
            if not header and page.samplesperpixel == 3 and page.planarconfig == 1:
                checked = decode_intact_jpeg(data, tables, rgb=self._unmarked_rgb[level])
                if checked.shape[:2] == self._chunk(level)[::-1]:
                    return checked
            else:
                require_intact_jpeg(header + data if header else data, tables)
        elif page.compression in _JPEG2000:
            require_intact_jpeg2000(data)
        segment = decode(data, index, jpegtables=tables, jpegheader=header)[0]
        if segment is None:
            raise DamagedCodestreamError("it holds no data")
        pixels: UInt8Array = segment[0]
        return pixels


class TiffSlide(Slide):
    """An OME-TIFF or another TIFF."""

    def __init__(self, path: Path, *, allow_damaged: bool = False) -> None:
        """Open the file.

        Raises:
            SlideError: see :class:`TiffLevels`.
        """
        super().__init__(path, allow_damaged=allow_damaged)
        self._levels = TiffLevels(path)
        self.format = "ome-tiff (tifffile)" if self._levels.is_ome else "tiff (tifffile)"
        self.mpp = self._levels.mpp
        self.level_sizes = self._levels.sizes
        self.exact_levels = tuple(range(len(self.level_sizes)))
        self.chunk = self._levels.chunk
        self.notes = tuple(self._levels.notes)
        self.icc_profile = self._levels.icc_profile
        self._whole_HW3: UInt8Array | None = None
        if not self._levels.is_tiled:
            self._whole_HW3 = self._read_whole()

    def read(self, level: int, x: int, y: int, width: int, height: int) -> UInt8Array:
        """See :meth:`Slide.read`."""
        if self._whole_HW3 is not None and level == 0:
            return self._whole_HW3[y : y + height, x : x + width]
        return self._levels.read(level, x, y, width, height, on_damage=self._white_if_allowed)

    def jpeg_side(self, level: int) -> int | None:
        """See :meth:`Slide.jpeg_side`."""
        return self._levels.jpeg_side(level)

    def jpeg(self, level: int, column: int, row: int) -> bytes | None:
        """See :meth:`Slide.jpeg`."""
        return self._levels.jpeg(level, column, row)

    def close(self) -> None:
        """Close the file."""
        self._levels.close()

    def _read_whole(self) -> UInt8Array:
        """Strips extend across the image, often as a single one: reading by regions would decode everything anew."""
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


def _area(series: Any) -> int:
    return int(series.keyframe.imagewidth) * int(series.keyframe.imagelength)


def _series_of(tiff: Any, sizes: Sequence[tuple[int, int]]) -> Any:
    for series in tiff.series:
        if [(level.keyframe.imagewidth, level.keyframe.imagelength) for level in series.levels] == list(sizes):
            return series
    raise SlideError("no image of the TIFF has the slide's levels")


def _unreadable(page: Any) -> str | None:
    """Why a page cannot be read faithfully as RGB; None if it can."""
    photometric, compression = int(page.photometric), int(page.compression)
    if photometric in _PHOTOMETRICS:
        return _PHOTOMETRICS[photometric]
    if photometric != _RGB and not (photometric == _YCBCR and compression in (*_JPEG, *_JPEG2000)):
        return f"has the colour model {photometric} with compression {compression}, which is not supported"
    if compression in _APERIO_YCBCR:
        return "is JPEG 2000 in Aperio's colour space but not an Aperio slide"
    if page.dtype != np.uint8:
        return f"has samples of type {page.dtype}"
    if page.samplesperpixel not in (3, 4) or (page.samplesperpixel == 4 and len(page.extrasamples) != 1):
        return f"has {page.samplesperpixel} samples per pixel"
    orientation = int(page.tags.valueof("Orientation", 1))
    if orientation != 1:
        return f"is stored flipped or rotated (TIFF orientation {orientation}), which is not supported"
    return None


def _require_single_file(path: Path, tiff: Any) -> None:
    """Refuse an OME-TIFF whose pixels lie in several files.

    Raises:
        SlideError: it is one.
    """
    if not tiff.is_ome:
        return
    root = ElementTree.fromstring(tiff.ome_metadata)
    elements = [element for element in root.iter() if element.tag.rpartition("}")[2] in ("UUID", "BinaryOnly")]
    own = {root.get("UUID")} - {None}
    files = {(element.text or element.get("UUID") or "").strip() for element in elements} - {""}
    if len(files | own) > 1 or any(element.tag.endswith("BinaryOnly") for element in elements):
        raise SlideError(f"{path} is part of an OME-TIFF of several files: save the slide as a single file")


def _require_whole_chain(path: Path) -> None:
    """Follow the directories' next-pointers: readers ignore one that points behind the end of the file.

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
                raise IncompleteSlideError(f"{path} is incomplete: it has directories after its end ({end} bytes)")
            file.seek(pointer_at)
            (offset,) = struct.unpack(order + pointer_format, file.read(struct.calcsize(pointer_format)))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
