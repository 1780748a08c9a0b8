"""``own-cells.csv``: a user's own cells, scored by the virtual stains (``--cells-from``).

Cells come from QuPath, StarDist, Cellpose or a pathologist, as polygons or centroids in level-0 pixels of the slide.
Per stain, each gets the mean of the cell map over it and the mean DAB density of the image, and is positive if the
first is at least a half, as the nuclei are that this package finds itself.
"""

from __future__ import annotations

import csv
import gzip
import json
import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile
from numpy.typing import NDArray

from staindiffuser.client.contract import ServedStain
from staindiffuser.client.result_files import cell_map_file, image_file
from staindiffuser.errors import DependencyError, InputError
from staindiffuser.imaging.geojson import features
from staindiffuser.imaging.ome_tiff import read_region
from staindiffuser.imaging.optical_density import dab_density

__all__ = ["OWN_CELLS_FILE", "OwnCells", "read_own_cells", "score_own_cells"]

OWN_CELLS_FILE = "own-cells.csv"
POINT_UM = 8.0
"""Diameter of the disc that stands for a cell of which only the centroid is known: about a lymphocyte."""
BLOCK = 1024
"""Cells are scored by blocks of this side, pixels of the result."""
LARGEST = 512
"""Pixels of the result that a cell may be across: what is larger is a region."""
_POINT, _POLYGON = 1, 3
Ring = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class OwnCells:
    """Cells in memory: 16 bytes a corner."""

    ids: list[str]
    points: NDArray[np.float64]
    """[Q, 2] x, y, level-0 pixels of the slide: the corners of all outlines, or centroids."""
    ends: NDArray[np.int64]
    """[N + 1]; the outline of cell n is ``points[ends[n]:ends[n + 1]]``."""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, number: int) -> Ring:
        ring: Ring = self.points[self.ends[number] : self.ends[number + 1]]
        return ring


def read_own_cells(path: Path) -> OwnCells:
    """Read cells from GeoJSON (``.gz`` too), a feature at a time, or from GeoParquet (``.parquet``), by row groups.

    Holes of polygons count as filled. A cell's id is the feature's ``id``, or the column ``id``, or else its number.

    Raises:
        InputError: the file cannot be read, holds no cell, or something that is neither a polygon nor a point.
        DependencyError: a Parquet file, and pyarrow is missing.
    """
    ids: list[str] = []
    corners, ends = array("d"), array("q", [0])
    try:
        for name, ring in _from_parquet(path) if path.suffix == ".parquet" else _from_geojson(path):
            if not np.isfinite(ring).all():
                raise ValueError(f"cell {name} has a coordinate that is no number")
            ids.append(name)
            corners.frombytes(np.ascontiguousarray(ring, np.float64).tobytes())
            ends.append(len(corners) // 2)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, IndexError, EOFError, struct.error) as error:
        raise InputError(f"{path} does not hold cells: {' '.join(str(error).split())[:120]}") from error
    if not ids:
        raise InputError(f"{path} holds no cells")
    points = np.frombuffer(corners, np.float64).reshape(-1, 2)
    return OwnCells(ids=ids, points=points, ends=np.frombuffer(ends, np.int64))


def score_own_cells(
    cells: OwnCells,
    folder: Path,
    stains: Sequence[ServedStain],
    *,
    size: tuple[int, int],
    scale: tuple[float, float],
    mpp: tuple[float, float],
) -> tuple[int, ...]:
    """Write ``own-cells.csv`` into the folder of a result whose images are finished, a row per cell, in their order.

    A cell that lies outside the slide has no scores.

    Args:
        cells: the cells.
        folder: holds the images and cell maps.
        stains: the stains in them.
        size: of the images, pixels.
        scale: level-0 pixels of the slide per pixel of the images, in x and y.
        mpp: pixel size of the images, µm.

    Returns:
        Cells on the slide, and positive ones per stain, as :class:`~staindiffuser.client.scores.NucleusCounter` counts.

    Raises:
        InputError: a cell is as large as a region.
    """
    points = cells.points / scale
    single = np.diff(cells.ends) == 1
    low = np.minimum.reduceat(points, cells.ends[:-1])
    high = np.maximum.reduceat(points, cells.ends[:-1])
    radius = np.array([POINT_UM / 2 / mpp[0], POINT_UM / 2 / mpp[1]])
    low[single] -= radius
    high[single] += radius
    large = np.flatnonzero((high - low).max(axis=1) > LARGEST)
    if len(large):
        raise InputError(f"cell {cells.ids[large[0]]} is {(high - low)[large[0]].max():.0f} pixels across: a region?")
    first, last = np.floor(low).astype(np.int64).clip(0), np.minimum(np.ceil(high).astype(np.int64), size)
    inside = (first < last).all(axis=1)
    values = np.full((len(cells), 2 * len(stains)), np.nan, np.float32)
    blocks = first // BLOCK
    columns = -(-size[0] // BLOCK)
    order = np.flatnonzero(inside)
    order = order[np.argsort((blocks[:, 1] * columns + blocks[:, 0])[order], kind="stable")]
    groups = np.split(order, np.flatnonzero(np.diff((blocks[:, 1] * columns + blocks[:, 0])[order])) + 1)
    for number, stain in enumerate(stains):
        with (
            tifffile.TiffFile(folder / cell_map_file(stain)) as maps,
            tifffile.TiffFile(folder / image_file(stain)) as images,
        ):
            for group in groups if len(order) else ():
                x0, y0 = first[group].min(axis=0).tolist()
                x1, y1 = last[group].max(axis=0).tolist()
                probability = read_region(maps, x0, y0, x1 - x0, y1 - y0)[..., 0]
                dab = dab_density(read_region(images, x0, y0, x1 - x0, y1 - y0))
                for cell in group.tolist():
                    (left, top), (right, bottom) = first[cell].tolist(), last[cell].tolist()
                    outline = points[cells.ends[cell] : cells.ends[cell + 1]]
                    mask = _mask(outline, (left, top, right, bottom), radius)
                    part = np.s_[top - y0 : bottom - y0, left - x0 : right - x0]
                    values[cell, 2 * number] = cv2.mean(probability[part], mask)[0] / 255
                    values[cell, 2 * number + 1] = cv2.mean(dab[part], mask)[0]
    _write(folder / OWN_CELLS_FILE, cells, low, high, scale, stains, values)
    positive = (values[:, 0::2] >= [stain.threshold for stain in stains]).sum(axis=0)
    return int(inside.sum()), *positive.tolist()


def _mask(outline: Ring, box: tuple[int, int, int, int], radius: NDArray[np.float64]) -> NDArray[np.uint8]:
    """The cell's pixels in its box, at least one: uint8 [height, width]."""
    left, top, right, bottom = box
    mask = np.zeros((bottom - top, right - left), np.uint8)
    if len(outline) == 1:
        y, x = np.ogrid[top:bottom, left:right]
        inside = ((x + 0.5 - outline[0, 0]) / radius[0]) ** 2 + ((y + 0.5 - outline[0, 1]) / radius[1]) ** 2 <= 1
        mask[inside] = 1
    else:
        corners = np.rint((outline - (left + 0.5, top + 0.5)) * 16).astype(np.int32)
        cv2.fillPoly(mask, [corners], (1,), shift=4)
    if not mask.any():
        mask[mask.shape[0] // 2, mask.shape[1] // 2] = 1
    return mask


def _write(
    path: Path,
    cells: OwnCells,
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    scale: tuple[float, float],
    stains: Sequence[ServedStain],
    values: NDArray[np.float32],
) -> None:
    centres = (low + high) / 2 * scale
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        head = [f"{stain.name}_{what}" for stain in stains for what in ("probability", "dab", "positive")]
        writer.writerow(["id", "x", "y", *head])
        for number, name in enumerate(cells.ids):
            row: list[Any] = [name, f"{centres[number, 0]:.1f}", f"{centres[number, 1]:.1f}"]
            for stain, (probability, dab) in zip(stains, values[number].reshape(-1, 2).tolist(), strict=True):
                known = probability == probability  # not NaN
                called = int(probability >= stain.threshold)
                row += [f"{probability:.4f}", f"{dab:.4f}", called] if known else ["", "", ""]
            writer.writerow(row)


def _from_geojson(path: Path) -> Iterator[tuple[str, Ring]]:
    with path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
    with gzip.open(path, "rt", encoding="utf-8") if packed else path.open(encoding="utf-8") as text:
        for number, feature in enumerate(features(text)):
            geometry = feature["geometry"]
            kind, coordinates = geometry["type"], geometry["coordinates"]
            if kind == "MultiPolygon" and len(coordinates) == 1:
                kind, coordinates = "Polygon", coordinates[0]
            if kind not in ("Polygon", "Point"):
                raise ValueError(f"a cell must be a Polygon or a Point, not a {kind}")
            ring = np.array(coordinates[0] if kind == "Polygon" else [coordinates], np.float64)
            name = feature.get("id", feature.get("properties", {}).get("id", number))
            yield str(name), ring[:, :2]


def _from_parquet(path: Path) -> Iterator[tuple[str, Ring]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        raise DependencyError("cells from Parquet need pyarrow: pip install 'staindiffuser[parquet]'") from None
    try:
        with pq.ParquetFile(path) as file:
            geo = json.loads((file.schema_arrow.metadata or {}).get(b"geo", b"{}"))
            column = geo.get("primary_column", "geometry")
            if column not in file.schema_arrow.names:
                raise ValueError(f"no column {column}")
            names = ["id"] if "id" in file.schema_arrow.names else []
            number = 0
            for batch in file.iter_batches(columns=[column, *names]):
                known = batch.column("id").to_pylist() if names else range(number, number + len(batch))
                number += len(batch)
                for name, data in zip(known, batch.column(column).to_pylist(), strict=True):
                    yield str(name), _ring_of_wkb(data)
    except pa.ArrowException as error:
        raise ValueError(str(error)) from error


def _ring_of_wkb(data: bytes) -> Ring:
    """Outline of a polygon, or a point, in well-known binary."""
    order = "<" if data[0] == 1 else ">"
    (kind,) = struct.unpack_from(f"{order}I", data, 1)
    if kind == _POINT:
        return np.frombuffer(data, f"{order}f8", 2, 5).reshape(1, 2)
    if kind != _POLYGON:
        raise ValueError(f"a cell must be a Polygon or a Point of two dimensions, not type {kind} of well-known binary")
    (count,) = struct.unpack_from(f"{order}I", data, 9)
    return np.frombuffer(data, f"{order}f8", 2 * count, 13).reshape(-1, 2)
