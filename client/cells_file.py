"""``cells.geojson.gz``: every cell as a polygon that QuPath imports."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson
from isal import isal_zlib

from staindiffuser.client.cells import ChunkCells
from staindiffuser.client.journal import CellsState

__all__ = ["CellsFile"]

GZIP_HEADER = bytes.fromhex("1f8b08000000000000ff")
"""Deflate, without name and time: the same cells give the same bytes."""
LEVEL = 1


class CellsFile:
    """A FeatureCollection, written row by row; use it as a context manager.

    The rows are independent blocks of one deflate stream, so a file that was cut off can be continued after any row,
    with the same bytes as if it had been written at once.
    """

    def __init__(self, path: Path, about: dict[str, Any], state: CellsState | None = None) -> None:
        """Open the file.

        Args:
            path: the file.
            about: what the collection states about itself, besides its features.
            state: where to continue in an existing file; by default a new one is written.
        """
        self.counts: dict[str, int] = dict(state.counts) if state else {}
        self.positive_pixels: dict[str, int] = dict(state.positive_pixels) if state else {}
        self._file = path.open("r+b" if state else "wb")
        self._crc32, self._length = (state.crc32, state.length) if state else (0, 0)
        if state:
            self._file.truncate(state.end)
            self._file.seek(state.end)
        else:
            self._file.write(GZIP_HEADER)
            head = orjson.dumps({"type": "FeatureCollection", "staindiffuser": about})
            self._write(head[:-1] + b',"features":[')

    def write(self, found: Sequence[ChunkCells]) -> None:
        """Append cells, one feature a line."""
        texts: list[bytes] = []
        for chunk in found:
            if chunk.count:
                texts += [b",\n" if self.counts else b"\n", chunk.features]
                self.counts[chunk.label] = self.counts.get(chunk.label, 0) + chunk.count
        if texts:
            self._write(b"".join(texts))

    def add_area(self, label: str, pixels: int) -> None:
        """Add to the positive area of a stain."""
        self.positive_pixels[label] = self.positive_pixels.get(label, 0) + pixels

    def commit(self) -> CellsState:
        """Put everything that was written so far on the disk, so that the file can be continued from here."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return CellsState(
            end=self._file.tell(),
            crc32=self._crc32,
            length=self._length,
            counts=dict(self.counts),
            positive_pixels=dict(self.positive_pixels),
        )

    def finish(self) -> None:
        """Complete the collection and close the file."""
        self._write(b"\n]}\n")
        self._file.write(isal_zlib.compressobj(LEVEL, wbits=-isal_zlib.MAX_WBITS).flush())  # the final, empty block
        self._file.write(struct.pack("<II", self._crc32, self._length & 0xFFFFFFFF))
        self.close()

    def close(self) -> None:
        """Close the file as it is."""
        self._file.close()

    def _write(self, data: bytes) -> None:
        compressor = isal_zlib.compressobj(LEVEL, wbits=-isal_zlib.MAX_WBITS)
        self._file.write(compressor.compress(data) + compressor.flush(isal_zlib.Z_FULL_FLUSH))
        self._crc32, self._length = isal_zlib.crc32(data, self._crc32), self._length + len(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
