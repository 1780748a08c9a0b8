"""``cells.parquet``: the cells of ``cells.geojson.gz`` as GeoParquet 1.1, for tools that compute (geopandas, DuckDB).

It is made from the finished GeoJSON, a few thousand cells at a time, so memory does not grow with their number.
"""

from __future__ import annotations

import gzip
import itertools
import json
import struct
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from staindiffuser.errors import DependencyError

__all__ = ["GROUP", "PARQUET_FILE", "require_pyarrow", "write_parquet"]

PARQUET_FILE = "cells.parquet"
GROUP = 20_000
"""Cells in a row group."""
_WKB_POLYGON = 3


def require_pyarrow() -> None:
    """Check that GeoParquet can be written.

    Raises:
        DependencyError: pyarrow is missing.
    """
    if find_spec("pyarrow") is None:
        raise DependencyError(
            "GeoParquet needs pyarrow: pip install 'staindiffuser[parquet]', or leave out --parquet or spatialdata"
        )


def write_parquet(geojson: Path, path: Path) -> int:
    """Write the cells as GeoParquet; coordinates are the slide's level-0 pixels, without a geographic system.

    Args:
        geojson: as :class:`~staindiffuser.client.cells_file.CellsFile` writes it: one feature a line.
        path: the file to write.

    Returns:
        The number of cells.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = pa.dictionary(pa.int32(), pa.string())
    columns = [("id", pa.string()), ("class", text), ("centroid_x", pa.float64()), ("centroid_y", pa.float64())]
    columns += [("area_um2", pa.float32()), ("mean_probability", pa.float32()), ("geometry", pa.binary())]
    count = 0
    with gzip.open(geojson, "rb") as file:
        head = orjson.loads(file.readline().strip() + b"]}")
        geometry = {"encoding": "WKB", "geometry_types": ["Polygon"], "crs": None, "edges": "planar"}
        geo = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": geometry}}
        about = {"geo": json.dumps(geo), "staindiffuser": json.dumps(head["staindiffuser"], ensure_ascii=False)}
        schema = pa.schema(columns, metadata=about)
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for rows in _batches(_rows(file)):
                arrays = [
                    pa.array(values, type=field.type)
                    for values, field in zip(zip(*rows, strict=True), schema, strict=True)
                ]
                writer.write_table(pa.table(arrays, schema=schema))
                count += len(rows)
    return count


def _rows(lines: Any) -> Iterator[tuple[Any, ...]]:
    for line in lines:
        feature_text = line.rstrip(b",\n")
        if feature_text == b"]}":
            return
        if not feature_text:
            continue
        feature = orjson.loads(feature_text)
        properties = feature["properties"]
        measured = properties["measurements"]
        yield (
            feature["id"],
            properties["classification"]["name"],
            measured["Centroid X px"],
            measured["Centroid Y px"],
            measured["Area µm^2"],
            measured["Mean probability"],
            _wkb(feature["geometry"]["coordinates"][0]),
        )


def _wkb(ring: list[list[float]]) -> bytes:
    """A polygon of one ring as well-known binary, little-endian."""
    return struct.pack("<BIII", 1, _WKB_POLYGON, 1, len(ring)) + np.array(ring, "<f8").tobytes()


def _batches(rows: Iterator[tuple[Any, ...]]) -> Iterator[list[tuple[Any, ...]]]:
    while batch := list(itertools.islice(rows, GROUP)):
        yield batch
