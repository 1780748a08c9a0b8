"""Cells from cell maps, found as the maps are composed, a row of blocks at a time.

A row is searched in chunks of a few blocks, each with the edges of its neighbours. A cell belongs to the chunk in which
its centroid lies.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import orjson

from staindiffuser.client.cell_text import feature_texts
from staindiffuser.client.contract import ServedStain
from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.instances import HALF, Cells, find_cells
from staindiffuser.imaging.ome_tiff import SIDE

__all__ = ["BlockRow", "ChunkCells", "MapCells", "Search"]

OVERLAP = 64
"""Width of the neighbours' edges that a chunk is searched with, pixels: two or three cells."""
CHUNK = 2
"""Blocks in a chunk: enough to spend little on its edges, few enough for the processor's cache."""
COLOURS = ((150, 75, 0), (0, 120, 160), (170, 30, 90), (60, 130, 40))

BlockRow = list[UInt8Array | None]
"""A row of a map as it was composed: uint8 [h, w, 1] per block, None for glass."""


@dataclass(frozen=True, kw_only=True)
class ChunkCells:
    """The cells of one chunk of a stain's map."""

    label: str
    """The stain's."""
    count: int
    features: bytes
    """As GeoJSON features with commas between them."""


Search = Callable[[], ChunkCells]
"""Finds the cells of a chunk; from any thread."""


class MapCells:
    """Finds the cells of one stain as its map is composed."""

    def __init__(
        self, stain: ServedStain, number: int, mpp: float, scale: tuple[float, float], rows: int, source: str = ""
    ) -> None:
        """Prepare the search.

        Args:
            stain: the class of the cells.
            number: of the stain; chooses its colour.
            mpp: the map's pixel size, µm per pixel.
            scale: level-0 pixels of the input slide per pixel of the map, in x and y.
            rows: number of rows of blocks in the map.
            source: identifies slide, model and seed: cells of different ones, or of another threshold, have different
                identifiers.
        """
        self._label, self._threshold = stain.label, stain.threshold
        self._mpp = mpp
        self._scale = np.array(scale)
        self._rows = rows
        # A UUID of version 8 (RFC 9562), whose last 12 digits are the cell's place: QuPath takes no other identifiers.
        found_from = "" if stain.threshold == HALF else f" {stain.threshold:g}"
        digest = hashlib.sha256(f"{source} {stain.name}{found_from}".encode()).hexdigest()
        self._identity = f"{digest[:8]}-{digest[8:12]}-8{digest[12:15]}-8{digest[15:18]}-"
        classification = orjson.dumps({"name": stain.label, "color": list(COLOURS[number % len(COLOURS)])})
        self._pieces = (
            b'","geometry":{"type":"Polygon","coordinates":[[',
            b']]},"properties":{"objectType":"detection","classification":'
            + classification
            + b',"measurements":{"Centroid X px":',
            b',"Centroid Y px":',
            ',"Area µm^2":'.encode(),
            b',"Mean probability":',
            b"}}}",
        )
        self._above: BlockRow = []
        self._current: BlockRow = []
        self._taken = 0

    def add_row(self, blocks: BlockRow) -> list[Search]:
        """Take the next row of blocks; return the searches of the previous row.

        After the last row, those of its own are returned as well.
        """
        searches = self._searches(self._above, self._current, blocks, self._taken - 1) if self._taken else []
        self._above, self._current = self._current, blocks
        self._taken += 1
        if self._taken == self._rows:
            searches += self._searches(self._above, self._current, [], self._taken - 1)
        return searches

    def restore(self, taken: int, read_row: Callable[[int], BlockRow]) -> None:
        """Continue after ``taken`` rows, which ``read_row`` returns again."""
        self._taken = taken
        self._above = read_row(taken - 2) if taken > 1 else []
        self._current = read_row(taken - 1) if taken else []

    def _searches(self, above: BlockRow, row: BlockRow, below: BlockRow, number: int) -> list[Search]:
        def search(first: int) -> ChunkCells:
            blocks = row[first : first + CHUNK]
            height = max(block.shape[0] for block in blocks if block is not None)
            width = sum(SIDE if block is None else block.shape[1] for block in blocks)
            around = np.zeros((height + 2 * OVERLAP, width + 2 * OVERLAP), dtype=np.uint8)
            for i, neighbours in enumerate((above, row, below)):
                for column in range(max(0, first - 1), min(len(neighbours), first + CHUNK + 1)):
                    other = neighbours[column]
                    if other is not None:
                        _paste(around, other[..., 0], OVERLAP + (column - first) * SIDE, OVERLAP + (i - 1) * SIDE)
            inner = (OVERLAP, OVERLAP, OVERLAP + width, OVERLAP + height)
            cells = find_cells(around, self._mpp, inner, threshold=self._threshold)
            features = self._features(cells, first * SIDE - OVERLAP, number * SIDE - OVERLAP, number, first // CHUNK)
            return ChunkCells(label=self._label, count=len(cells), features=features)

        firsts = range(0, len(row), CHUNK)
        stained = [first for first in firsts if any(block is not None for block in row[first : first + CHUNK])]
        return [functools.partial(search, first) for first in stained]

    def _features(self, cells: Cells, left: int, top: int, row: int, chunk: int) -> bytes:
        if not len(cells):
            return b""
        corner = np.array([left, top])
        start = f'{{"type":"Feature","id":"{self._identity}{row:04x}{chunk:03x}'.encode()
        points, centroids = (cells.outlines.points + corner) * self._scale, (cells.centroids + corner) * self._scale
        numbers = np.column_stack([centroids, cells.areas * self._mpp**2, cells.probabilities])
        return feature_texts([start, *self._pieces], points, cells.outlines.ends, numbers)


def _paste(canvas_HW: UInt8Array, block_HW: UInt8Array, x: int, y: int) -> None:
    """Copy the part of the block that lies on the canvas."""
    height, width = canvas_HW.shape
    x0, x1 = max(0, x), min(width, x + block_HW.shape[1])
    y0, y1 = max(0, y), min(height, y + block_HW.shape[0])
    if x0 < x1 and y0 < y1:
        canvas_HW[y0:y1, x0:x1] = block_HW[y0 - y : y1 - y, x0 - x : x1 - x]
