"""The cells of a result, arranged for looking at parts of them.

``cells.geojson.gz`` is read once, in a process of its own (half a million cells take seconds, in which the server must
go on answering), into arrays on disk that are sorted by block: a part of the slide is then a few slices.
"""

from __future__ import annotations

import gzip
import itertools
import json
import subprocess
import sys
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from staindiffuser.imaging.geojson import features

__all__ = ["BINS", "BLOCK", "CellClass", "CellIndex", "build_index", "start_building"]

BLOCK = 1024
"""Side of a block, level-0 pixels of the slide."""
BINS = 32
"""Bins along each side of a block of counts."""
_TENTHS = 10.0
_META = "cells.json"
_ARRAYS = ("kind", "probability", "centroid", "start", "block")
_OUTLINES = "outlines.bin"
_POINT = np.dtype(("<i4", 2))


@dataclass(frozen=True, kw_only=True)
class CellClass:
    """A class of cells."""

    name: str
    """Such as ``CK8/18``."""
    count: int


class CellIndex:
    """The arrays that :func:`build_index` wrote; outlines, the bulk of them, stay on the disk."""

    def __init__(self, folder: Path) -> None:
        """Load the arrays."""
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        self.classes = tuple(CellClass(**one) for one in meta["classes"])
        self._columns: int = meta["columns"]
        self._rows: int = meta["rows"]
        arrays = {name: np.load(folder / f"{name}.npy") for name in _ARRAYS}
        self._kind: NDArray[np.uint8] = arrays["kind"]
        self._probability: NDArray[np.float32] = arrays["probability"]
        self._centroid: NDArray[np.float32] = arrays["centroid"]
        self._start: NDArray[np.int64] = arrays["start"]
        self._outlines = folder / _OUTLINES
        self._block: NDArray[np.int64] = arrays["block"]

    def outlines(self, column: int, row: int) -> dict[str, Any]:
        """The cells of a block, one after another.

        Returns:
            The block's corner in level-0 pixels (``x``, ``y``); per cell its class (``kinds``) and probability
            (``probabilities``); the corners of all outlines, x, y, x, y … in tenths of a pixel from the block's corner
            (``points``), and per cell how many corners are its own (``lengths``).
        """
        found = self._slice(column, row)
        x, y = column * BLOCK, row * BLOCK
        start = self._start[found.start : found.stop + 1]
        count = int(start[-1] - start[0]) if found.start < found.stop else 0
        points = np.zeros((0, 2), np.int32)
        if count:
            points = np.fromfile(self._outlines, _POINT, count=count, offset=int(start[0]) * _POINT.itemsize)
        return {
            "x": x,
            "y": y,
            "kinds": self._kind[found].tolist(),
            "probabilities": np.round(self._probability[found].astype(np.float64), 3).tolist(),
            "lengths": np.diff(start).tolist() if count else [],
            "points": (points - np.array([x, y]) * int(_TENTHS)).ravel().tolist(),
        }

    def counts(self, zoom: int, column: int, row: int, threshold: float) -> dict[str, Any]:
        """Numbers of cells in the bins of a block whose side is ``BLOCK << zoom``.

        Returns:
            The block's corner, the bins' side in level-0 pixels, and per class of which there are any, [bin, count …].
        """
        side = BLOCK << zoom
        x, y = column * side, row * side
        bin_side = side // BINS
        counts = np.zeros(len(self.classes) * BINS * BINS, np.int64)
        for part in self._block_rows(column << zoom, row << zoom, 1 << zoom, 1 << zoom):
            keep = self._probability[part] >= threshold
            place = ((self._centroid[part][keep] - np.array([x, y], np.float32)) // bin_side).astype(np.int64)
            place = place.clip(0, BINS - 1)
            index = (self._kind[part][keep].astype(np.int64) * BINS + place[:, 1]) * BINS + place[:, 0]
            counts += np.bincount(index, minlength=len(counts))
        per_class = counts.reshape(len(self.classes), BINS * BINS)
        bins = {
            str(kind): np.stack([np.flatnonzero(row_), row_[np.flatnonzero(row_)]], axis=-1).ravel().tolist()
            for kind, row_ in enumerate(per_class)
            if row_.any()
        }
        return {"x": x, "y": y, "side": bin_side, "bins": bins}

    def within(self, x0: float, y0: float, x1: float, y1: float) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Class, probability and centroid [N, 2] of the cells whose centroid has x0 ≤ x < x1 and y0 ≤ y < y1."""
        left, top = max(0, int(x0 // BLOCK)), max(0, int(y0 // BLOCK))
        columns = min(self._columns, int(x1 // BLOCK) + 1) - left
        parts = list(self._block_rows(left, top, columns, min(self._rows, int(y1 // BLOCK) + 1) - top))
        kind, probability, centroid = (
            np.concatenate([values[part] for part in parts]) if parts else values[:0]
            for values in (self._kind, self._probability, self._centroid)
        )
        x, y = centroid.T
        keep = (x >= x0) & (x < x1) & (y >= y0) & (y < y1)
        return kind[keep], probability[keep], centroid[keep]

    def _slice(self, column: int, row: int) -> slice:
        if not (0 <= column < self._columns and 0 <= row < self._rows):
            return slice(0, 0)
        block = row * self._columns + column
        return slice(int(self._block[block]), int(self._block[block + 1]))

    def _block_rows(self, column: int, row: int, columns: int, rows: int) -> Iterator[slice]:
        """The cells of a rectangle of blocks: one slice per row of blocks."""
        first, last = max(0, column), min(self._columns, column + columns)
        if first >= last:
            return
        for y in range(max(0, row), min(self._rows, row + rows)):
            start = int(self._block[y * self._columns + first])
            stop = int(self._block[y * self._columns + last])
            if start < stop:
                yield slice(start, stop)


def build_index(geojson: Path, folder: Path, size: tuple[int, int]) -> None:
    """Read the cells and write the arrays into ``folder``.

    Args:
        geojson: a FeatureCollection of polygons in level-0 pixels, gzip-compressed or not.
        folder: an existing folder.
        size: width and height of the slide at level 0, pixels.

    Raises:
        OSError, EOFError, zlib.error, ValueError: the file cannot be read.
    """
    kinds: dict[str, int] = {}
    kind, probability, lengths, coordinates = array("B"), array("f"), array("l"), array("d")
    with gzip.open(geojson, "rt", encoding="utf-8") if _is_gzip(geojson) else geojson.open(encoding="utf-8") as file:
        for feature in features(file):
            properties = feature["properties"]
            name = (properties.get("classification") or {}).get("name", "unclassified")
            measured = properties.get("measurements") or {}
            outline = feature["geometry"]["coordinates"][0]
            if len(kinds) == 255 and name not in kinds:
                raise ValueError("more than 255 classes of cells cannot be shown")
            kind.append(kinds.setdefault(name, len(kinds)))
            probability.append(measured.get("Mean probability", 1.0))
            coordinates.extend(itertools.chain.from_iterable(outline))
            lengths.append(len(outline))
    points = np.frombuffer(coordinates, np.float64).reshape(-1, 2) if lengths else np.zeros((0, 2))
    length = np.array(lengths, np.int64)
    first = np.concatenate([[0], np.cumsum(length)])[:-1] if lengths else length
    centroid = _centroids(points, first, length)
    columns, rows = -(-size[0] // BLOCK), -(-size[1] // BLOCK)
    place = np.clip((centroid // BLOCK).astype(np.int64), 0, [columns - 1, rows - 1])
    block = place[:, 1] * columns + place[:, 0]
    order = np.argsort(block, kind="stable")
    start = np.concatenate([[0], np.cumsum(length[order])])
    source = np.repeat(first[order] - start[:-1], length[order]) + np.arange(len(points))
    arrays: dict[str, NDArray[Any]] = {
        "kind": np.array(kind, np.uint8)[order],
        "probability": np.array(probability, np.float32)[order],
        "centroid": centroid[order].astype(np.float32),
        "start": start,
        "block": np.searchsorted(block[order], np.arange(columns * rows + 1)),
    }
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)
    np.rint(points[source] * _TENTHS).astype("<i4").tofile(folder / _OUTLINES)
    counts = np.bincount(arrays["kind"], minlength=len(kinds))
    classes = [{"name": name, "count": int(count)} for name, count in zip(kinds, counts, strict=True)]
    meta = {"classes": classes, "columns": columns, "rows": rows}
    (folder / _META).write_text(json.dumps(meta), encoding="utf-8")


def _centroids(points: NDArray[np.float64], first: NDArray[np.int64], length: NDArray[np.int64]) -> NDArray[np.float64]:
    """Centres [N, 2] of closed polygons' areas; of a polygon without area, its first corner."""
    if not len(first):
        return np.zeros((0, 2))
    owner = np.repeat(np.arange(len(first)), length)
    relative = points - points[first][owner]
    following = np.roll(relative, -1, axis=0)
    following[first + length - 1] = 0  # the last corner is the first again, which is the origin here
    cross = relative[:, 0] * following[:, 1] - following[:, 0] * relative[:, 1]
    area = np.add.reduceat(cross, first)
    moment = np.stack([np.add.reduceat((relative[:, i] + following[:, i]) * cross, first) for i in (0, 1)], axis=-1)
    area = np.where(area == 0, np.inf, area)
    centres: NDArray[np.float64] = points[first] + moment / (3 * area[:, None])
    return centres


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def start_building(geojson: Path, folder: Path, size: tuple[int, int]) -> subprocess.Popen[str]:
    """Run :func:`build_index` in a process of its own; what is wrong is the last line of its stderr."""
    command = [sys.executable, "-m", __name__, str(geojson), str(folder), str(size[0]), str(size[1])]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, encoding="utf-8")


def _main(arguments: list[str]) -> int:
    geojson, folder, width, height = arguments
    import os

    if hasattr(os, "nice"):
        os.nice(10)  # the server's answers come first
    try:
        build_index(Path(geojson), Path(folder), (int(width), int(height)))
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, IndexError) as error:
        sys.stderr.write(f"{Path(geojson).name} cannot be read: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
