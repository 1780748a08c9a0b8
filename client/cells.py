"""Cells from cell maps: instances by watershed, written as GeoJSON polygons that QuPath imports.

The maps are searched block by block as they are composed, each block together with the edges of its neighbours. A cell
belongs to the block in which its centroid lies.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from staindiffuser.client.contract import ServedStain
from staindiffuser.client.journal import CellsState
from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.instances import find_instances
from staindiffuser.imaging.ome_tiff import SIDE

__all__ = ["BlockCells", "Cell", "CellsFile", "find_cells"]

OVERLAP = 64
"""Width of the neighbours' edges that a block is searched with, pixels: two or three cells."""
GZIP_HEADER = bytes.fromhex("1f8b08000000000000ff")
"""Deflate, without name and time: the same cells give the same bytes."""
COLOURS = ((150, 75, 0), (0, 120, 160), (170, 30, 90), (60, 130, 40))


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell, in pixels of the map."""

    outline: NDArray[np.float64]
    """[N, 2] x, y of its outline, closed, from the map's corner; pixel 0 extends from 0 to 1."""
    centroid: tuple[float, float]
    """x, y."""
    area: int
    """Pixels."""
    probability: float
    """Mean over its pixels, 0 … 1."""


def find_cells(map_HW: UInt8Array, mpp: float, within: tuple[int, int, int, int] | None = None) -> list[Cell]:
    """The cells of a map, from top to bottom.

    Args:
        map_HW: probability × 255.
        mpp: its pixel size, µm per pixel.
        within: x0, y0, x1, y1; only cells whose centroid has x0 ≤ x < x1 and y0 ≤ y < y1.
    """
    found = find_instances(map_HW, mpp)
    keep = found.is_cell
    if within is not None:
        x, y = found.centroids.T
        keep = keep & (x >= within[0]) & (x < within[2]) & (y >= within[1]) & (y < within[3])
    return [
        Cell(
            outline=outline,
            centroid=(float(found.centroids[label, 0]), float(found.centroids[label, 1])),
            area=int(found.areas[label]),
            probability=float(found.probabilities[label]),
        )
        for label, outline in _Outlines(found.labels).follow(keep).items()
    ]


class _Outlines:
    """The outer outlines of the regions of a label image, all traced at once, step by step.

    An outline runs clockwise along the sides of the region's pixels. A side has the number 4 × pixel + direction; the
    directions are east (along the top side), south, west, north. The pixel ahead (``a``) and the one ahead to the left
    (``b``) determine the next side: around the corner of the same pixel, straight on, or around the corner of ``b``.
    Regions must be connected by sides, as those of watershed are.
    """

    def __init__(self, labels_HW: NDArray[np.int32]) -> None:
        padded = np.pad(labels_HW, 1)
        self._width = padded.shape[1]
        self._labels = padded.ravel()
        ahead = np.array([1, self._width, -1, -self._width])
        self._a = ahead
        self._b = ahead + np.roll(ahead, 1)
        labels, first = np.unique(self._labels, return_index=True)
        # The top side of a region's first pixel in reading order is part of its outer outline.
        starts = {int(label): 4 * int(pixel) for label, pixel in zip(labels, first, strict=True) if label}
        self._cells = np.array(sorted(starts), dtype=np.int64)
        self._starts = np.array([starts[int(label)] for label in self._cells], dtype=np.int64)

    def follow(self, wanted: NDArray[np.bool_]) -> dict[int, NDArray[np.float64]]:
        """Outlines of the labels with ``wanted[label]``: [N, 2] x, y, closed; pixel 0 extends from 0 to 1."""
        chosen = wanted[self._cells]
        labels, start = self._cells[chosen], self._starts[chosen]
        side, index = start, np.arange(len(start))
        passed: list[NDArray[np.int64]] = []
        owners: list[NDArray[np.int64]] = []
        while len(index):
            passed.append(side)
            owners.append(index)
            side = self._next(side, labels[index])
            unfinished = side != start[index]
            side, index = side[unfinished], index[unfinished]
        if not passed:
            return {}
        owner = np.concatenate(owners)
        order = np.argsort(owner, kind="stable")
        points = self._midpoints(np.concatenate(passed)[order])
        ends = np.cumsum(np.bincount(owner, minlength=len(labels)))
        # The midpoint of every third side, and the first again: at most half a pixel off, in a third of the bytes.
        return {
            int(label): np.concatenate([points[begin:end:3], points[begin : begin + 1]])
            for label, begin, end in zip(labels, np.concatenate([[0], ends[:-1]]), ends, strict=True)
        }

    def _next(self, side: NDArray[np.int64], label: NDArray[np.int64]) -> NDArray[np.int64]:
        pixel, direction = side >> 2, side & 3
        a, b = pixel + self._a[direction], pixel + self._b[direction]
        corner = 4 * pixel + ((direction + 1) & 3)
        straight = 4 * a + direction
        around = 4 * b + ((direction - 1) & 3)
        following: NDArray[np.int64] = np.where(
            self._labels[a] != label, corner, np.where(self._labels[b] != label, straight, around)
        )
        return following

    def _midpoints(self, side: NDArray[np.int64]) -> NDArray[np.float64]:
        pixel, direction = side >> 2, side & 3
        x = pixel % self._width - 1 + np.array([0.5, 1.0, 0.5, 0.0])[direction]
        y = pixel // self._width - 1 + np.array([0.0, 0.5, 1.0, 0.5])[direction]
        return np.stack([x, y], axis=-1)


class BlockCells:
    """Finds the cells of one stain as its map is composed, one row of blocks at a time."""

    def __init__(self, stain: ServedStain, number: int, mpp: float, scale: tuple[float, float], rows: int) -> None:
        """Prepare the search.

        Args:
            stain: the class of the cells.
            number: of the stain; chooses its colour.
            mpp: the map's pixel size, µm per pixel.
            scale: level-0 pixels of the input slide per pixel of the map, in x and y.
            rows: number of rows of blocks in the map.
        """
        self._class = {"name": stain.label, "color": list(COLOURS[number % len(COLOURS)])}
        self._mpp = mpp
        self._scale = scale
        self._rows = rows
        self._above: list[UInt8Array | None] = []
        self._current: list[UInt8Array | None] = []
        self._taken = 0

    def add_row(self, blocks: list[UInt8Array | None], workers: Executor) -> list[dict[str, Any]]:
        """Take the next row of blocks, uint8 [h, w, 1]; return the cells of the previous row as GeoJSON features.

        After the last row, its own cells are returned as well.
        """
        features = self._search(self._above, self._current, blocks, self._taken - 1, workers) if self._taken else []
        self._above, self._current = self._current, blocks
        self._taken += 1
        if self._taken == self._rows:
            features += self._search(self._above, self._current, [], self._taken - 1, workers)
        return features

    def restore(self, taken: int, read_row: Callable[[int], list[UInt8Array | None]]) -> None:
        """Continue after ``taken`` rows, which ``read_row`` returns again."""
        self._taken = taken
        self._above = read_row(taken - 2) if taken > 1 else []
        self._current = read_row(taken - 1) if taken else []

    def _search(
        self,
        above: list[UInt8Array | None],
        row: list[UInt8Array | None],
        below: list[UInt8Array | None],
        number: int,
        workers: Executor,
    ) -> list[dict[str, Any]]:
        def search(column: int) -> list[dict[str, Any]]:
            block = row[column]
            if block is None:
                return []
            height, width = block.shape[:2]
            around = np.zeros((height + 2 * OVERLAP, width + 2 * OVERLAP), dtype=np.uint8)
            for i, neighbours in enumerate((above, row, below)):
                for j in (-1, 0, 1):
                    other = neighbours[column + j] if neighbours and 0 <= column + j < len(neighbours) else None
                    if other is not None:
                        _paste(around, other[..., 0], OVERLAP + j * SIDE, OVERLAP + (i - 1) * SIDE)
            return [
                self._feature(cell, column * SIDE - OVERLAP, number * SIDE - OVERLAP)
                for cell in find_cells(around, self._mpp, (OVERLAP, OVERLAP, OVERLAP + width, OVERLAP + height))
            ]

        return [feature for found in workers.map(search, range(len(row))) for feature in found]

    def _feature(self, cell: Cell, left: int, top: int) -> dict[str, Any]:
        outline = (cell.outline + np.array([left, top])) * np.array(self._scale)
        return {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [np.round(outline, 1).tolist()]},
            "properties": {
                "objectType": "detection",
                "classification": self._class,
                "measurements": {
                    "Area µm^2": round(cell.area * self._mpp * self._mpp, 2),
                    "Mean probability": round(cell.probability, 4),
                },
            },
        }


def _paste(canvas_HW: UInt8Array, block_HW: UInt8Array, x: int, y: int) -> None:
    """Copy the part of the block that lies on the canvas."""
    height, width = canvas_HW.shape
    x0, x1 = max(0, x), min(width, x + block_HW.shape[1])
    y0, y1 = max(0, y), min(height, y + block_HW.shape[0])
    if x0 < x1 and y0 < y1:
        canvas_HW[y0:y1, x0:x1] = block_HW[y0 - y : y1 - y, x0 - x : x1 - x]


class CellsFile:
    """``cells.geojson.gz``: a FeatureCollection, written row by row; use it as a context manager.

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
        self._file = path.open("r+b" if state else "wb")
        self._crc32, self._length = (state.crc32, state.length) if state else (0, 0)
        if state:
            self._file.truncate(state.end)
            self._file.seek(state.end)
        else:
            self._file.write(GZIP_HEADER)
            head = json.dumps({"type": "FeatureCollection", "staindiffuser": about}, ensure_ascii=False)
            self._write(head[:-1] + ', "features": [')

    def write(self, features: Sequence[dict[str, Any]]) -> None:
        """Append features."""
        texts = []
        first = not self.counts
        for feature in features:
            texts.append(("\n" if first else ",\n") + json.dumps(feature, ensure_ascii=False))
            first = False
            name = feature["properties"]["classification"]["name"]
            self.counts[name] = self.counts.get(name, 0) + 1
        if texts:
            self._write("".join(texts))

    def commit(self) -> CellsState:
        """Put everything that was written so far on the disk, so that the file can be continued from here."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return CellsState(end=self._file.tell(), crc32=self._crc32, length=self._length, counts=dict(self.counts))

    def finish(self) -> None:
        """Complete the collection and close the file."""
        self._write("\n]}\n")
        self._file.write(zlib.compressobj(wbits=-zlib.MAX_WBITS).flush())  # the final, empty block
        self._file.write(struct.pack("<II", self._crc32, self._length & 0xFFFFFFFF))
        self.close()

    def close(self) -> None:
        """Close the file as it is."""
        self._file.close()

    def _write(self, text: str) -> None:
        data = text.encode("utf-8")
        compressor = zlib.compressobj(level=6, wbits=-zlib.MAX_WBITS)
        self._file.write(compressor.compress(data) + compressor.flush(zlib.Z_FULL_FLUSH))
        self._crc32, self._length = zlib.crc32(data, self._crc32), self._length + len(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
