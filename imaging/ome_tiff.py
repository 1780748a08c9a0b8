"""Pyramidal, tiled OME-TIFF, written while the image is still being made.

Encoded tiles of all levels go to one spool file as they come, because a TIFF's levels are complete at different times;
at the end tifffile copies them behind its directories. The levels are SubIFDs, as OME-TIFF asks, and the main
directory's next-pointer also points at the first of them: tifffile and Bio-Formats read the one, OpenSlide and cuCIM
the other, and all see every level.
"""

from __future__ import annotations

import itertools
import math
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import cv2
import imagecodecs
import numpy as np
import tifffile
from isal import isal_zlib

from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.ome_xml import Channel, ImageInfo, ome_xml
from staindiffuser.imaging.pixel_size import PixelSize

__all__ = [
    "SIDE",
    "Channel",
    "Compose",
    "ImageInfo",
    "PendingRow",
    "PyramidWriter",
    "RowState",
    "halved",
    "level_sizes",
    "read_region",
    "write_channels",
]

SIDE = 512
"""Side of the file's tiles, pixels."""
JPEG_QUALITY = 90
LEAST_LEVELS = 3
CLASSIC_LIMIT = 2**32 - 2**24
"""Above this many bytes of tiles the file is a BigTIFF."""

Compose = Callable[[int, int, int, int], UInt8Array | None]
"""(x, y, width, height) → uint8 [height, width, C], or None where it is all glass."""


@dataclass(frozen=True)
class PendingRow:
    """A row of halved tiles that waits, in a file of its own, for the row below it."""

    stored: tuple[bool, ...]
    """Per tile: false for glass, which is not stored."""
    crc32: int
    """Of the file."""


@dataclass(frozen=True)
class RowState:
    """What a row added to a resumable writer; the states of all rows so far restore it."""

    lengths: tuple[tuple[int, ...], ...]
    """Per level: bytes of each encoded tile that was appended to the spool."""
    pending: tuple[PendingRow | None, ...]
    """Per level."""


def level_sizes(width: int, height: int) -> list[tuple[int, int]]:
    """(width, height) of each level: halved until one tile holds it, at least three."""
    sizes = [(width, height)]
    while max(sizes[-1]) > SIDE or len(sizes) < LEAST_LEVELS:
        sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
    return sizes


def halved(tile_HWC: UInt8Array) -> UInt8Array:
    """Means of 2 × 2 pixels, rounded; height and width must be even."""
    height, width, channels = tile_HWC.shape
    half = cv2.resize(tile_HWC, (width // 2, height // 2), interpolation=cv2.INTER_AREA)
    return half.reshape(height // 2, width // 2, channels).astype(np.uint8, copy=False)


class PyramidWriter:
    """Takes rows of level-0 tiles from top to bottom; builds and encodes the other levels on the way."""

    def __init__(
        self, folder: Path, width: int, height: int, *, channels: int, glass: int, name: str | None = None
    ) -> None:
        """Open the spool.

        Args:
            folder: where there is room for the encoded tiles.
            width: of level 0, pixels.
            height: of level 0, pixels.
            channels: 3 gives RGB as JPEG, 1 gives one lossless plane.
            glass: value of glass, where nothing was stained.
            name: names the spool's files in ``folder``, from which :meth:`restore` continues after a crash; by default
                the spool is an unnamed file that vanishes whatever happens.
        """
        self.sizes = level_sizes(width, height)
        self._channels = channels
        self._glass = np.full((SIDE, SIDE, channels), glass, dtype=np.uint8)
        self._empty = self._encode(self._glass)
        self._base = None if name is None else folder / name
        self._spool = _open_spool(folder, name)
        self._end = 0
        self._tiles: list[list[tuple[int, int]]] = [[] for _ in self.sizes]
        self._half_rows: list[list[list[UInt8Array | None]]] = [[] for _ in self.sizes]
        self._committed = [0 for _ in self.sizes]
        self._saved: dict[int, tuple[list[UInt8Array | None], PendingRow]] = {}

    @property
    def rows(self) -> int:
        """Rows of tiles at level 0."""
        return -(-self.sizes[0][1] // SIDE)

    @property
    def columns(self) -> int:
        """Tiles in a row of level 0."""
        return -(-self.sizes[0][0] // SIDE)

    @property
    def spooled(self) -> int:
        """Bytes of all encoded tiles so far."""
        return self._end

    def write_row(self, row: int, compose: Compose, workers: Executor) -> list[UInt8Array | None]:
        """Compose and encode a row of level-0 tiles, in ``workers``, and what it completes of the other levels.

        Returns:
            The composed tiles, uint8 [h, w, C], cut at the image's edge; None for glass.
        """
        width, height = self.sizes[0]
        y = row * SIDE

        def make(column: int) -> tuple[UInt8Array | None, bytes | None, UInt8Array | None]:
            x = column * SIDE
            tile = compose(x, y, min(SIDE, width - x), min(SIDE, height - y))
            if tile is None:
                return None, None, None
            full = _filled(tile)
            return tile, self._encode(full), halved(full)

        made = list(workers.map(make, range(self.columns)))
        self._append(0, [encoded for _, encoded, _ in made])
        self._pass_up(1, [half for _, _, half in made], last=row == self.rows - 1)
        return [tile for tile, _, _ in made]

    def commit(self) -> RowState:
        """Put everything that was written so far on the disk, so that the writer can be restored to this point."""
        pending = tuple(
            self._save_pending(level, rows[0]) if rows else None for level, rows in enumerate(self._half_rows)
        )
        self._spool.flush()
        os.fsync(self._spool.fileno())
        lengths = tuple(
            tuple(count for _, count in tiles[done:]) for tiles, done in zip(self._tiles, self._committed, strict=True)
        )
        self._committed = [len(tiles) for tiles in self._tiles]
        return RowState(lengths=lengths, pending=pending)

    def restore(self, states: Sequence[RowState]) -> None:
        """Continue after the row of the last state, in a new writer with the same arguments.

        Args:
            states: from :meth:`commit`, one per row, from the first row on.

        Raises:
            ValueError: the spool's files are not those that were committed.
        """
        for state in states:
            for level, lengths in enumerate(state.lengths):
                for length in lengths:
                    self._tiles[level].append((self._end, length))
                    self._end += length
        if self._spool.seek(0, os.SEEK_END) < self._end:
            raise ValueError("the spool is shorter than what was committed")
        self._spool.truncate(self._end)
        self._committed = [len(tiles) for tiles in self._tiles]
        for level, pending in enumerate(states[-1].pending if states else ()):
            if pending is not None:
                row = self._load_pending(level, pending)
                self._half_rows[level].append(row)
                self._saved[level] = (row, pending)

    def read_row(self, row: int) -> list[UInt8Array | None]:
        """The tiles of a row that was written to a lossless plane, as :meth:`write_row` returned them."""
        tiles: list[UInt8Array | None] = []
        width, height = self.sizes[0]
        for column in range(self.columns):
            offset, length = self._tiles[0][row * self.columns + column]
            self._spool.seek(offset)
            encoded = self._spool.read(length)
            if encoded == self._empty:
                tiles.append(None)
                continue
            tile = np.frombuffer(isal_zlib.decompress(encoded), np.uint8).reshape(SIDE, SIDE, 1)
            tiles.append(tile[: height - row * SIDE, : width - column * SIDE])
        return tiles

    def finish(self, path: Path, info: ImageInfo) -> None:
        """Write the file. All rows must have been written."""
        big = self._end > CLASSIC_LIMIT
        with tifffile.TiffWriter(path, bigtiff=big, ome=False) as tiff:
            self.write_levels(tiff, info.mpp, ome_xml(info, self.sizes[0], self._channels))
        _chain_levels(path, big=big)

    def write_levels(self, tiff: tifffile.TiffWriter, mpp: PixelSize, description: bytes | None) -> None:
        """Append a directory for level 0, and SubIFDs for the others."""
        pixel: dict[str, Any] = {"tile": (SIDE, SIDE), "dtype": np.uint8, "resolutionunit": "CENTIMETER"}
        if self._channels == 3:
            # Only sets the tags (YCbCr, not subsampled): the tiles come encoded.
            pixel |= {"photometric": "rgb", "compression": "jpeg", "subsampling": (1, 1)}
        else:
            pixel |= {"photometric": "minisblack", "compression": "adobe_deflate"}
        for level, (width, height) in enumerate(self.sizes):
            scale = (self.sizes[0][0] / width, self.sizes[0][1] / height)
            tiff.write(
                self._read_back(level),
                shape=(height, width, 3) if self._channels == 3 else (height, width),
                subifds=len(self.sizes) - 1 if level == 0 else None,
                subfiletype=1 if level else 0,
                description=description if level == 0 else None,
                metadata=None,
                software="StainDiffuser",
                resolution=(1e4 / (mpp[0] * scale[0]), 1e4 / (mpp[1] * scale[1])),
                **pixel,
            )

    def close(self) -> None:
        """Close the spool."""
        self._spool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _encode(self, tile_PPC: UInt8Array) -> bytes:
        if self._channels == 3:
            encoded = imagecodecs.jpeg8_encode(
                tile_PPC, level=JPEG_QUALITY, colorspace="RGB", outcolorspace="YCBCR", subsampling="444"
            )
        else:
            # ISA-L's, several times as fast as zlib's level 6; a predictor would save nothing on cell maps.
            encoded = isal_zlib.compress(np.ascontiguousarray(tile_PPC), 1)
        return bytes(encoded)

    def _append(self, level: int, row: Sequence[bytes | None]) -> None:
        self._spool.seek(self._end)
        for encoded in row:
            data = self._empty if encoded is None else encoded
            self._spool.write(data)
            self._tiles[level].append((self._end, len(data)))
            self._end += len(data)

    def _pass_up(self, level: int, halves: list[UInt8Array | None], *, last: bool) -> None:
        """Collect two rows of halved tiles; four of them make one tile of ``level``."""
        if level == len(self.sizes):
            return
        rows = self._half_rows[level]
        rows.append(halves)
        if len(rows) < 2 and not last:
            return
        width, height = self.sizes[level]
        top = len(self._tiles[level]) // -(-width // SIDE) * SIDE
        encoded: list[bytes | None] = []
        above: list[UInt8Array | None] = []
        for column in range(-(-width // SIDE)):
            quarters = [half for row in rows for half in row[2 * column : 2 * column + 2]]
            if all(quarter is None for quarter in quarters):
                encoded.append(None)
                above.append(None)
                continue
            tile = self._glass.copy()
            for i, row in enumerate(rows):
                for j, half in enumerate(row[2 * column : 2 * column + 2]):
                    if half is not None:
                        y, x = i * SIDE // 2, j * SIDE // 2
                        tile[y : y + SIDE // 2, x : x + SIDE // 2] = half
            tile = _filled(tile[: height - top, : width - column * SIDE])
            encoded.append(self._encode(tile))
            above.append(halved(tile))
        rows.clear()
        self._append(level, encoded)
        self._pass_up(level + 1, above, last=last)

    def _pending_path(self, level: int) -> Path:
        assert self._base is not None, "only a named spool can be committed"
        return self._base.with_name(f"{self._base.name}.pending-{level}")

    def _save_pending(self, level: int, row: list[UInt8Array | None]) -> PendingRow:
        """Write a row of halved tiles, over a file to which the last committed state does not refer."""
        if level in self._saved and self._saved[level][0] is row:
            return self._saved[level][1]
        data = b"".join(tile.tobytes() for tile in row if tile is not None)
        with self._pending_path(level).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        pending = PendingRow(stored=tuple(tile is not None for tile in row), crc32=zlib.crc32(data))
        self._saved[level] = (row, pending)
        return pending

    def _load_pending(self, level: int, pending: PendingRow) -> list[UInt8Array | None]:
        data = self._pending_path(level).read_bytes()
        shape = (SIDE // 2, SIDE // 2, self._channels)
        size = math.prod(shape)
        if zlib.crc32(data) != pending.crc32 or len(data) != size * sum(pending.stored):
            raise ValueError(f"the pending row of level {level} is not the one that was committed")
        parts = iter(np.frombuffer(data, np.uint8).reshape(-1, *shape))
        return [next(parts) if stored else None for stored in pending.stored]

    def _read_back(self, level: int) -> Iterator[bytes]:
        for offset, count in self._tiles[level]:
            self._spool.seek(offset)
            yield self._spool.read(count)


def write_channels(path: Path, planes: Sequence[PyramidWriter], info: ImageInfo) -> None:
    """Write single planes of the same size as the channels of one file. All their rows must have been written.

    Its levels are SubIFDs only: the next-pointer of each channel leads to the next one. OpenSlide reads no such files.
    """
    big = sum(plane.spooled for plane in planes) > CLASSIC_LIMIT
    with tifffile.TiffWriter(path, bigtiff=big, ome=False) as tiff:
        for number, plane in enumerate(planes):
            plane.write_levels(tiff, info.mpp, None if number else ome_xml(info, plane.sizes[0], 1))


def read_region(tiff: tifffile.TiffFile, x: int, y: int, width: int, height: int, level: int = 0) -> UInt8Array:
    """A region of a level of a file that this module wrote, uint8 [height, width, C]; decodes only its tiles."""
    planes = [_read_plane(tiff, page, x, y, width, height) for page in tiff.series[0].levels[level].pages]
    return planes[0] if len(planes) == 1 else np.concatenate(planes, axis=-1)


def _read_plane(tiff: tifffile.TiffFile, page: Any, x: int, y: int, width: int, height: int) -> UInt8Array:
    keyframe = page.keyframe
    columns = -(-keyframe.imagewidth // SIDE)
    region = np.empty((height, width, keyframe.samplesperpixel), dtype=np.uint8)
    for row in range(y // SIDE, (y + height - 1) // SIDE + 1):
        for column in range(x // SIDE, (x + width - 1) // SIDE + 1):
            index = row * columns + column
            tiff.filehandle.seek(page.dataoffsets[index])
            data = tiff.filehandle.read(page.databytecounts[index])
            tile: UInt8Array = keyframe.decode(data, index)[0][0]
            left, top = column * SIDE, row * SIDE
            x0, x1 = max(x, left), min(x + width, left + SIDE)
            y0, y1 = max(y, top), min(y + height, top + SIDE)
            region[y0 - y : y1 - y, x0 - x : x1 - x] = tile[y0 - top : y1 - top, x0 - left : x1 - left]
    return region


def _open_spool(folder: Path, name: str | None) -> IO[bytes]:
    if name is None:
        return tempfile.TemporaryFile(dir=folder)
    path = folder / f"{name}.spool"
    return path.open("r+b" if path.exists() else "w+b")


def _filled(tile_HWC: UInt8Array) -> UInt8Array:
    """A tile at the image's edge, filled up by its last pixels: white would ring through the JPEG's blocks."""
    height, width = tile_HWC.shape[:2]
    if (height, width) == (SIDE, SIDE):
        return tile_HWC
    return np.pad(tile_HWC, ((0, SIDE - height), (0, SIDE - width), (0, 0)), mode="edge")


def _chain_levels(path: Path, *, big: bool) -> None:
    """Point each level's next-pointer at the level below it: the first directory at its first SubIFD, and so on.

    Older versions of tifffile chain the SubIFDs themselves, newer ones (2026.11) leave their next-pointers empty.
    """
    with tifffile.TiffFile(path) as tiff:
        page: Any = tiff.pages.first
        directories, order = [page.offset, *page.subifds], tiff.byteorder
    count_format, entry_bytes, pointer_format = ("Q", 20, "Q") if big else ("H", 12, "I")
    with path.open("r+b") as file:
        for directory, following in itertools.pairwise([*directories, 0]):
            file.seek(directory)
            (entries,) = struct.unpack(order + count_format, file.read(struct.calcsize(count_format)))
            file.seek(entries * entry_bytes, 1)
            file.write(struct.pack(order + pointer_format, following))
