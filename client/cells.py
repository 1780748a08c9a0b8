"""Cells from cell maps: instances by watershed, as polygons in GeoJSON that QuPath imports.

The maps are worked on in blocks as they are completed, each with the surroundings of its neighbours; the block in
which a cell's centroid lies owns it.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from staindiffuser.client.contract import ServedStain
from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.instances import find_instances
from staindiffuser.imaging.ome_tiff import SIDE

__all__ = ["BlockCells", "Cell", "CellsFile", "find_cells"]

OVERLAP = 64
"""Surroundings that a block is worked on with, pixels: two or three cells."""
COLOURS = ((150, 75, 0), (0, 120, 160), (170, 30, 90), (60, 130, 40))


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell, in pixels of the map."""

    outline: NDArray[np.float64]
    """[N, 2] x, y of its outline, closed, counted from the block's corner; a pixel's centre is at + 0.5."""
    centroid: tuple[float, float]
    """x, y."""
    area: int
    """Pixels."""
    probability: float
    """Mean over its pixels, 0 … 1."""


def find_cells(map_HW: UInt8Array, mpp: float, within: tuple[int, int, int, int] | None = None) -> list[Cell]:
    """All cells of a map, from top to bottom.

    Args:
        map_HW: probability × 255.
        mpp: its pixel size, µm.
        within: only cells whose centroid lies in x0 ≤ x < x1, y0 ≤ y < y1.
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
    """The outer outlines of the regions of a label image, all of them followed at once, step by step.

    An outline runs clockwise along the sides of the region's pixels. A side is numbered 4 × pixel + direction, where
    the directions are east along a top side, south, west, north. The pixel ahead (``a``) and the one ahead and to the
    left (``b``) tell where it goes on: around the same pixel's corner, straight on, or around ``b``'s corner. Regions
    are connected by sides, as watershed's are.
    """

    def __init__(self, labels_HW: NDArray[np.int32]) -> None:
        padded = np.pad(labels_HW, 1)
        self._width = padded.shape[1]
        self._labels = padded.ravel()
        ahead = np.array([1, self._width, -1, -self._width])
        self._a = ahead
        self._b = ahead + np.roll(ahead, 1)
        labels, first = np.unique(self._labels, return_index=True)
        # The first pixel in reading order has its top side on the outer outline.
        starts = {int(label): 4 * int(pixel) for label, pixel in zip(labels, first, strict=True) if label}
        self._cells = np.array(sorted(starts), dtype=np.int64)
        self._starts = np.array([starts[int(label)] for label in self._cells], dtype=np.int64)

    def follow(self, wanted: NDArray[np.bool_]) -> dict[int, NDArray[np.float64]]:
        """Outlines of the labels for which ``wanted[label]``: [N, 2] x, y, closed; pixel 0 spans [0, 1)."""
        chosen = wanted[self._cells]
        labels, start = self._cells[chosen], self._starts[chosen]
        side, index = start, np.arange(len(start))
        passed: list[NDArray[np.int64]] = []
        owners: list[NDArray[np.int64]] = []
        while len(index):
            passed.append(side)
            owners.append(index)
            side = self._next(side, labels[index])
            on_the_way = side != start[index]
            side, index = side[on_the_way], index[on_the_way]
        if not passed:
            return {}
        owner = np.concatenate(owners)
        order = np.argsort(owner, kind="stable")
        points = self._middles(np.concatenate(passed)[order])
        ends = np.cumsum(np.bincount(owner, minlength=len(labels)))
        # Every third side's middle, and the first again: half a pixel off at most, a third of the file.
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

    def _middles(self, side: NDArray[np.int64]) -> NDArray[np.float64]:
        pixel, direction = side >> 2, side & 3
        x = pixel % self._width - 1 + np.array([0.5, 1.0, 0.5, 0.0])[direction]
        y = pixel // self._width - 1 + np.array([0.0, 0.5, 1.0, 0.5])[direction]
        return np.stack([x, y], axis=-1)


class BlockCells:
    """Finds the cells of one stain, row of blocks by row of blocks, as its map is composed."""

    def __init__(self, stain: ServedStain, number: int, mpp: float, scale: tuple[float, float], rows: int) -> None:
        """Start.

        Args:
            stain: classifies the cells.
            number: of the stain, chooses its colour.
            mpp: the map's pixel size, µm.
            scale: level-0 pixels of the input slide per pixel of the map.
            rows: rows of blocks that will come.
        """
        self._class = {"name": stain.label, "color": list(COLOURS[number % len(COLOURS)])}
        self._mpp = mpp
        self._scale = scale
        self._rows = rows
        self._above: list[UInt8Array | None] = []
        self._current: list[UInt8Array | None] = []
        self._taken = 0

    def add_row(self, blocks: list[UInt8Array | None], workers: Executor) -> list[dict[str, Any]]:
        """Take the next row of blocks, uint8 [h, w, 1]; give the cells (GeoJSON features) of the row before it.

        With the last row also that row's own cells.
        """
        features = self._search(self._above, self._current, blocks, self._taken - 1, workers) if self._taken else []
        self._above, self._current = self._current, blocks
        self._taken += 1
        if self._taken == self._rows:
            features += self._search(self._above, self._current, [], self._taken - 1, workers)
        return features

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
    """Copy what of the block lies on the canvas."""
    height, width = canvas_HW.shape
    x0, x1 = max(0, x), min(width, x + block_HW.shape[1])
    y0, y1 = max(0, y), min(height, y + block_HW.shape[0])
    if x0 < x1 and y0 < y1:
        canvas_HW[y0:y1, x0:x1] = block_HW[y0 - y : y1 - y, x0 - x : x1 - x]


class CellsFile:
    """``cells.geojson.gz``: a FeatureCollection that is written as the cells come."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        """Open.

        Args:
            path: the file.
            about: what the collection says of itself, beside its features.
        """
        self.counts: dict[str, int] = {}
        # No file name and time in the header: the same cells give the same bytes.
        self._raw = path.open("wb")
        self._gzip = gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=self._raw, mtime=0)
        self._text = io.TextIOWrapper(self._gzip, encoding="utf-8")
        head = json.dumps({"type": "FeatureCollection", "staindiffuser": about}, ensure_ascii=False)
        self._text.write(head[:-1] + ', "features": [')
        self._first = True

    def write(self, features: Sequence[dict[str, Any]]) -> None:
        """Append."""
        for feature in features:
            self._text.write(("\n" if self._first else ",\n") + json.dumps(feature, ensure_ascii=False))
            self._first = False
            name = feature["properties"]["classification"]["name"]
            self.counts[name] = self.counts.get(name, 0) + 1

    def finish(self) -> None:
        """Close the collection and the file."""
        self._text.write("\n]}\n")
        self.close()

    def close(self) -> None:
        """Close the file as it is."""
        self._text.close()
        self._raw.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
