"""``spatialdata.zarr``: images, cells and scores of a result as one SpatialData object, for the scverse.

It is written as spatialdata itself writes it (containers and tables 0.2, images and shapes 0.3; tables as AnnData 0.1),
without that package, its images and cells a part at a time. All elements lie in one coordinate system, ``global``: the
slide's level-0 pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import staindiffuser
from staindiffuser.client.cells_parquet import GROUP, write_parquet
from staindiffuser.client.result_files import WrittenImage
from staindiffuser.client.scores import Scores, StainScore
from staindiffuser.files import remove

__all__ = ["SPATIALDATA_FOLDER", "write_spatialdata"]

SPATIALDATA_FOLDER = "spatialdata.zarr"
_SHAPES, _TABLE = "cells", "table"


def write_spatialdata(
    folder: Path, geojson: Path, images: Sequence[WrittenImage], scores: Scores, scale: tuple[float, float]
) -> None:
    """Write ``spatialdata.zarr`` into the folder of a result whose images and cells are finished.

    Its images are called like the files (``cd3``, ``cd3_cells``); its shapes are ``cells``, its table is ``table``: a
    row per cell with class, area in µm², mean probability and centroid, and ``scores`` in ``uns``.

    Args:
        folder: of the result.
        geojson: the cells, see :class:`~staindiffuser.client.cells_file.CellsFile`.
        images: the images, in ``folder``.
        scores: of the result.
        scale: level-0 pixels of the slide per pixel of the images, in x and y.
    """
    import zarr

    from staindiffuser.imaging.ome_zarr import write_ome_zarr

    path = folder / SPATIALDATA_FOLDER
    remove(path)  # of a run that was killed here
    root = zarr.open_group(path, mode="w-", zarr_format=3)
    version = f"staindiffuser {staindiffuser.__version__}"
    root.attrs["spatialdata_attrs"] = {"version": "0.2", "spatialdata_software_version": version}
    root.create_group("images")
    for image in images:
        element = path / "images" / image.name.removesuffix(".ome.tiff").replace(".", "_")
        write_ome_zarr(folder / image.name, element, image.info, glass=image.glass)
        group = zarr.open_group(element, mode="r+")
        ome: Any = group.attrs["ome"]
        ome["version"] = "0.5-dev-spatialdata"
        placed = {"type": "scale", "scale": [1.0, scale[1], scale[0]], **_between("cyx")}
        ome["multiscales"][0]["coordinateTransformations"] = [placed]
        group.attrs.update({"ome": ome, "spatialdata_attrs": {"version": "0.3"}})
    shapes = root.create_group("shapes")
    cells = path / "shapes" / _SHAPES / "shapes.parquet"
    cells.parent.mkdir()
    count = write_parquet(geojson, cells)
    shapes.create_group(_SHAPES).attrs.update(
        {
            "encoding-type": "ngff:shapes",
            "axes": ["x", "y"],
            "coordinateTransformations": [{"type": "identity", **_between("xy")}],
            "spatialdata_attrs": {"version": "0.3"},
        }
    )
    notice = images[0].info.about["notice"]
    _write_table(root.create_group("tables"), cells, count, scores, notice)
    if not count:
        remove(cells.parent)  # spatialdata refuses an element without any


def _between(axes: str) -> dict[str, Any]:
    """From the pixels of an element to the slide's."""
    described = [{"name": axis, "type": "space", "unit": "unit"} for axis in axes if axis != "c"]
    if "c" in axes:
        described.insert(0, {"name": "c", "type": "channel"})
    return {"input": {"name": axes, "axes": described}, "output": {"name": "global", "axes": described}}


def _write_table(tables: Any, cells: Path, count: int, scores: Scores, notice: str) -> None:
    """An AnnData of the cells in a GeoParquet file."""
    import pyarrow.parquet as pq

    keys = {"region": _SHAPES, "region_key": "region", "instance_key": "instance_id"} if count else {}
    kind = {"spatialdata-encoding-type": "ngff:regions_table", "version": "0.2", **keys}
    table = _group(tables, _TABLE, "anndata", "0.1.0", **kind)
    for name in ("layers", "obsp", "varm", "varp"):
        _group(table, name, "dict", "0.1.0")
    columns = ["region", "instance_id", "class"]
    obs = _group(table, "obs", "dataframe", "0.2.0", _index="_index", **{"column-order": columns})
    labels = [score.stain for score in scores.stains]
    names = _empty(obs, "_index", (count,), str)
    _array(obs, "instance_id", np.arange(count))
    _categorical(obs, "region", [_SHAPES], count)  # all codes are 0
    classes = _categorical(obs, "class", labels, count)
    measured = _empty(table, "X", (count, 2), np.float32)
    centroids = _empty(_group(table, "obsm", "dict", "0.1.0"), "spatial", (count, 2), np.float64)
    of_label = {label: number for number, label in enumerate(labels)}
    done = 0
    with pq.ParquetFile(cells) as file:
        for batch in file.iter_batches(GROUP, columns=[name for name in file.schema_arrow.names if name != "geometry"]):
            rows = slice(done, done + len(batch))
            names[rows] = np.array(batch.column("id").to_pylist(), object)
            classes[rows] = np.array([of_label[label] for label in batch.column("class").to_pylist()], np.int8)
            measured[rows] = np.stack([batch.column(name) for name in ("area_um2", "mean_probability")], axis=-1)
            centroids[rows] = np.stack([batch.column(name) for name in ("centroid_x", "centroid_y")], axis=-1)
            done += len(batch)
    var = _group(table, "var", "dataframe", "0.2.0", _index="_index", **{"column-order": []})
    _array(var, "_index", ["area_um2", "mean_probability"])
    uns = _group(table, "uns", "dict", "0.1.0")
    if keys:
        attributes = _group(uns, "spatialdata_attrs", "dict", "0.1.0")
        for name, value in keys.items():
            _array(attributes, name, value)
    _array(uns, "notice", notice)
    _array(uns, "tissue_area_mm2", scores.tissue_area_mm2)
    fields = [field.name for field in dataclasses.fields(StainScore) if field.name != "stain"]
    frame = _group(uns, "scores", "dataframe", "0.2.0", _index="stain", **{"column-order": fields})
    _array(frame, "stain", labels)
    for name in fields:
        values = [getattr(score, name) for score in scores.stains]
        _array(frame, name, [np.nan if value is None else value for value in values])


def _group(parent: Any, name: str, kind: str, version: str, /, **attributes: Any) -> Any:
    group = parent.create_group(name)
    group.attrs.update({"encoding-type": kind, "encoding-version": version, **attributes})
    return group


def _empty(group: Any, name: str, shape: tuple[int, ...], dtype: Any) -> Any:
    """An array to be filled, in chunks of a row group."""
    array = group.create_array(name, shape=shape, dtype=dtype, chunks=(GROUP, *shape[1:]))
    array.attrs.update({"encoding-type": "string-array" if dtype is str else "array", "encoding-version": "0.2.0"})
    return array


def _array(group: Any, name: str, value: Any) -> None:
    """A small array, a number or a text."""
    values = np.asarray(value)
    text = values.dtype.kind == "U"
    array = group.create_array(name, shape=values.shape, dtype=str if text else values.dtype)
    array[...] = values.astype(object) if text else values
    scalar = "string" if text else "numeric-scalar"
    kind = scalar if values.ndim == 0 else "string-array" if text else "array"
    array.attrs.update({"encoding-type": kind, "encoding-version": "0.2.0"})


def _categorical(group: Any, name: str, categories: Sequence[str], count: int) -> Any:
    """A column of categories; returns its codes, all 0."""
    column = _group(group, name, "categorical", "0.2.0", ordered=False)
    _array(column, "categories", list(categories))
    return _empty(column, "codes", (count,), np.int8)
