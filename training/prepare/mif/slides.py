"""An H&E slide and the fluorescence of the same section, registered to it: fields on a grid, read in bounded memory.

Shapes: H and W a region's height and width in pixels, C channels.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np
import tifffile

from staindiffuser.imaging.arrays import FloatArray
from staindiffuser.imaging.pixel_size import PixelSize, from_ome_xml
from staindiffuser.training.errors import DataError
from staindiffuser.training.prepare.mif.fields import Field, Fields, Pixels
from staindiffuser.training.prepare.sections import Section

__all__ = ["ChannelSlide", "RegisteredSlides"]

MARGIN = 32
"""Context around a tile, pixels: cells on its edge are whole."""
LARGEST_DIFFERENCE = 0.02
"""Share by which the two slides' extents may differ: registered slides show the same rectangle."""


class ChannelSlide:
    """A multi-channel (OME-)TIFF, tiled, with or without a pyramid; safe to read from many threads.

    Args:
        path: the file; its axes must be channel, y, x.
        mpp: pixel size of level 0, µm, where the file does not say.

    Raises:
        DataError: it cannot be read as that.
    """

    def __init__(self, path: Path, *, mpp: float | None = None) -> None:
        self.path = path
        try:
            self._tiff = tifffile.TiffFile(path)
            series = self._tiff.series[0]
            levels = [level for level in series.levels if level.axes in ("CYX", "YX")]
            if not levels:
                raise DataError(f"{path} has the axes {series.axes}; needed are channel, y and x (CYX)")
            self._pages: list[list[Any]] = [[page.aspage() for page in level.pages if page] for level in levels]
            xml = self._tiff.ome_metadata if self._tiff.is_ome else None
        except DataError:
            raise
        except FileNotFoundError:
            raise DataError(f"{path} does not exist") from None
        except Exception as error:  # a damaged TIFF makes tifffile raise nearly anything
            raise DataError(f"{path} cannot be read as a TIFF: {' '.join(str(error).split())[:120]}") from error
        self._lock = threading.Lock()
        self._fd = os.open(path, os.O_RDONLY)
        self.channels = _channel_names(xml) or tuple(str(number) for number in range(len(self._pages[0])))
        """As the file names them; ``0``, ``1``, … where it does not."""
        size = (mpp, mpp) if mpp is not None else (from_ome_xml(xml) if xml else None)
        if size is None:
            self.close()
            raise DataError(f"{path} does not say how large its pixels are: give µm per pixel as --mif-mpp")
        self.mpp: PixelSize = size
        page = self._pages[0][0]
        self.size = (int(page.imagewidth), int(page.imagelength))
        """Width and height of level 0, pixels."""

    def close(self) -> None:
        """Close the file."""
        self._tiff.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def size_um(self) -> tuple[float, float]:
        """Width and height, µm."""
        return self.size[0] * self.mpp[0], self.size[1] * self.mpp[1]

    def read(
        self, origin: tuple[float, float], size: tuple[int, int], mpp: float, channels: Sequence[int]
    ) -> FloatArray:
        """A rectangle of some channels; what lies off the slide is 0.

        Args:
            origin: (x, y) of its upper left corner, µm.
            size: (width, height), pixels of ``mpp``.

        Returns:
            float32 [H, W, C].

        Raises:
            DataError: this part of the file is damaged.
        """
        level = self._level(mpp)
        page = self._pages[level][0]
        step = (self.size_um[0] / int(page.imagewidth), self.size_um[1] / int(page.imagelength))
        x0, y0 = (round(origin[axis] / step[axis]) for axis in (0, 1))
        width, height = (max(1, round(size[axis] * mpp / step[axis])) for axis in (0, 1))
        planes = [self._window(level, channel, x0, y0, width, height) for channel in channels]
        if (width, height) != size:
            method = cv2.INTER_AREA if width > size[0] else cv2.INTER_LINEAR
            planes = [np.asarray(cv2.resize(plane, size, interpolation=method), np.float32) for plane in planes]
        return np.stack(planes, axis=-1)

    def _level(self, mpp: float) -> int:
        """The coarsest level whose pixels are not larger than wanted."""
        fine = [
            level
            for level, pages in enumerate(self._pages)
            if level == 0 or self.size_um[0] / int(pages[0].imagewidth) <= 1.05 * mpp
        ]
        return min(fine, key=lambda level: int(self._pages[level][0].imagewidth))

    def _window(self, level: int, channel: int, x: int, y: int, width: int, height: int) -> FloatArray:
        page = self._pages[level][channel]
        whole = (int(page.imagewidth), int(page.imagelength))
        if page.is_tiled:
            chunk = (int(page.tilewidth), int(page.tilelength))
        else:
            chunk = (whole[0], min(int(page.rowsperstrip), whole[1]))
        across = -(-whole[0] // chunk[0])
        out = np.zeros((height, width), np.float32)
        right, bottom = min(x + width, whole[0]), min(y + height, whole[1])
        left, top = max(x, 0), max(y, 0)
        if right <= left or bottom <= top:
            return out
        for row in range(top // chunk[1], (bottom - 1) // chunk[1] + 1):
            for column in range(left // chunk[0], (right - 1) // chunk[0] + 1):
                piece = self._chunk(page, row * across + column)
                if piece is None:  # not stored: empty
                    continue
                cx, cy = column * chunk[0], row * chunk[1]
                x0, x1 = max(left, cx), min(right, cx + piece.shape[1])
                y0, y1 = max(top, cy), min(bottom, cy + piece.shape[0])
                out[y0 - y : y1 - y, x0 - x : x1 - x] = piece[y0 - cy : y1 - cy, x0 - cx : x1 - cx]
        return out

    def _chunk(self, page: Any, index: int) -> FloatArray | None:
        count = page.databytecounts[index]
        if count == 0:
            return None
        try:
            data = os.pread(self._fd, count, page.dataoffsets[index])
            with self._lock:  # the first access to a page's tables reads from the file
                decode, tables, header = page.decode, page.jpegtables, page.jpegheader
            segment = decode(data, index, jpegtables=tables, jpegheader=header)[0]
        except Exception as error:  # every codec has exceptions of its own
            raise DataError(
                f"{self.path} is damaged: chunk {index} cannot be decoded: {' '.join(str(error).split())[:120]}"
            ) from error
        return None if segment is None else np.asarray(segment).reshape(segment.shape[1:3]).astype(np.float32)


class RegisteredSlides(Fields):
    """The fields of a slide: a grid of tiles.

    Args:
        he, mif: the slides, which show the same rectangle of the same section.
        mpp: pixel size of the tiles, µm.
        tile: their side, pixels.
        he_mpp, mif_mpp: pixel size of level 0, µm, where a file does not say.
        channels: names of the fluorescence's channels, in order, where the file does not name them.

    Raises:
        DataError: a slide cannot be used, or the two do not show the same rectangle.
    """

    def __init__(
        self,
        he: Path,
        mif: Path,
        *,
        name: str,
        mpp: float,
        tile: int,
        he_mpp: float | None = None,
        mif_mpp: float | None = None,
        channels: Sequence[str] = (),
    ) -> None:
        self._he = Section(he, mpp=he_mpp, option="--he-mpp")
        try:
            self._mif = ChannelSlide(mif, mpp=mif_mpp)
        except DataError:
            self._he.close()
            raise
        try:
            if channels and len(channels) != len(self._mif.channels):
                raise DataError(f"{mif} has {len(self._mif.channels)} channels, but --channels names {len(channels)}")
            self.channels = tuple(channels) or self._mif.channels
            for ours, theirs in zip(self._he.size_um, self._mif.size_um, strict=True):
                if abs(theirs / ours - 1) > LARGEST_DIFFERENCE:
                    raise DataError(
                        f"{mif} measures {self._mif.size_um[0]:.0f} × {self._mif.size_um[1]:.0f} µm and {he} "
                        f"{self._he.size_um[0]:.0f} × {self._he.size_um[1]:.0f}: register the fluorescence onto the "
                        "H&E, or give --he-mpp or --mif-mpp if a file is wrong"
                    )
        except DataError:
            self.close()
            raise
        self._mpp, self._tile = mpp, tile
        columns, rows = (int(side / mpp) // tile for side in self._he.size_um)
        self._places = {
            f"{name}-{row:04d}-{column:04d}": (column, row) for row in range(rows) for column in range(columns)
        }
        self.fields = tuple(Field(name=place, region=name) for place in self._places)
        if not self.fields:
            self.close()
            raise DataError(f"{he} is smaller than one tile of {tile} pixels: use --tile, or check its pixel size")

    def close(self) -> None:
        """Close both files."""
        self._he.close()
        self._mif.close()

    def read(self, field: Field) -> Pixels:
        """See :meth:`Fields.read`."""
        column, row = self._places[field.name]
        origin = ((column * self._tile - MARGIN) * self._mpp, (row * self._tile - MARGIN) * self._mpp)
        side = self._tile + 2 * MARGIN
        inner = slice(MARGIN, MARGIN + self._tile)
        return Pixels(
            he=self._he.read(origin, (side, side), self._mpp).rgb,
            channels=self._mif.read(origin, (side, side), self._mpp, range(len(self.channels))),
            inner=(inner, inner),
        )


def _channel_names(xml: str | None) -> tuple[str, ...]:
    """Of an OME-XML's first image; none where one of them has no name."""
    if not xml:
        return ()
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError:
        return ()
    image = root.find("{*}Image")
    names = [] if image is None else [channel.get("Name") for channel in image.iterfind("{*}Pixels/{*}Channel")]
    return tuple(name for name in names if name) if names and all(names) else ()
