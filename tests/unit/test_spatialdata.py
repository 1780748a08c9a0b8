"""``--format spatialdata``: images, cells and scores of a result as the scverse reads them."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import zarr

from staindiffuser.client import cells_parquet
from staindiffuser.client.options import StainingOptions
from staindiffuser.client.run_record import RunRecord, read_run
from staindiffuser.client.staining import stain_slide
from staindiffuser.client.testing import FakeStainer
from staindiffuser.errors import DependencyError

# zarr decodes texts so, which NumPy 2.5 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Setting the shape on a NumPy array:DeprecationWarning")

pytest.importorskip("pyarrow", reason="SpatialData keeps shapes as GeoParquet: pyarrow is not installed")

IMAGES = {"cd3": 3, "ck818": 3, "cd3_cells": 1, "ck818_cells": 1, "combined": 3}
"""And their channels."""
OPTIONS = StainingOptions(formats=("spatialdata",), combined=True, mask="none")


def slide(path: Path, cells: int) -> None:
    """1400 × 1000 pixels of 0.25 µm: half as many at the model's 0.5."""
    pixels = np.full((1000, 1400, 3), (225, 170, 205), np.uint8)
    for number in range(cells):
        pixels[30 + number // 12 * 90 :, 20 + number % 12 * 90 :][:30, :30] = (80, 60, 150)
    tifffile.imwrite(path, pixels, photometric="rgb", resolution=(40000, 40000), resolutionunit="CENTIMETER")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spatialdata")
    slide(folder / "he.tif", 100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("staindiffuser.client.spatialdata_folder.GROUP", 64)  # several parts
        patch.setattr(cells_parquet, "GROUP", 64)
        stain_slide(folder / "he.tif", folder / "out", FakeStainer(), OPTIONS)
    return folder / "out"


def run_of(result: Path) -> RunRecord:
    return read_run(result)


def features_of(result: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(gzip.decompress((result / "cells.geojson.gz").read_bytes()))["features"]
    return found


def test_images_are_placed_on_the_slide(result: Path) -> None:
    root: Any = zarr.open_group(result / "spatialdata.zarr", mode="r")
    assert root.attrs["spatialdata_attrs"]["version"] == "0.2"
    assert set(root["images"]) == set(IMAGES)
    for name, channels in IMAGES.items():
        group = root[f"images/{name}"]
        assert group.attrs["spatialdata_attrs"] == {"version": "0.3"}
        assert group.attrs["ome"]["version"] == "0.5-dev-spatialdata"
        assert len(group.attrs["ome"]["omero"]["channels"]) == channels
        (placed,) = group.attrs["ome"]["multiscales"][0]["coordinateTransformations"]
        assert (placed["type"], placed["scale"]) == ("scale", [1, 2, 2]), "level-0 pixels of the slide"
        assert (placed["input"]["name"], placed["output"]["name"]) == ("cyx", "global")
        assert [axis["name"] for axis in placed["output"]["axes"]] == ["c", "y", "x"]
        with tifffile.TiffFile(result / f"{name.replace('_', '.')}.ome.tiff") as tiff:
            stored = tiff.series[0].asarray()
        expected = stored.transpose(2, 0, 1) if stored.shape[-1] == 3 else stored.reshape(channels, 500, 700)
        np.testing.assert_array_equal(np.asarray(group["0"]), expected)


def test_the_table_has_every_cell(result: Path) -> None:
    root: Any = zarr.open_group(result / "spatialdata.zarr", mode="r")
    table, features = root["tables/table"], features_of(result)
    assert len(features) == 200
    assert {key: table.attrs[key] for key in ("encoding-type", "region", "region_key", "instance_key", "version")} == {
        "encoding-type": "anndata",
        "region": "cells",
        "region_key": "region",
        "instance_key": "instance_id",
        "version": "0.2",
    }
    assert list(np.asarray(table["obs/_index"])) == [feature["id"] for feature in features]
    assert np.asarray(table["obs/instance_id"]).tolist() == list(range(200))
    labels = np.asarray(table["obs/class/categories"])[np.asarray(table["obs/class/codes"])]
    assert list(labels) == [feature["properties"]["classification"]["name"] for feature in features]
    measured = [feature["properties"]["measurements"] for feature in features]
    X = np.asarray(table["X"])
    np.testing.assert_allclose(X[:, 0], [one["Area µm^2"] for one in measured], rtol=1e-6)
    np.testing.assert_allclose(X[:, 1], [one["Mean probability"] for one in measured], rtol=1e-6)
    centroids = [(one["Centroid X px"], one["Centroid Y px"]) for one in measured]
    np.testing.assert_array_equal(np.asarray(table["obsm/spatial"]), centroids)
    assert "research use only" in str(np.asarray(table["uns/notice"]))


def test_the_reader_of_the_scverse_takes_it(result: Path) -> None:
    reason = (
        "spatialdata is not installed: it asks for pandas below 3 by way of anndata, and constraints.txt has pandas 3"
    )
    spatialdata = pytest.importorskip("spatialdata", reason=reason)
    data = spatialdata.read_zarr(result / "spatialdata.zarr")
    features, run = features_of(result), run_of(result)
    assert set(data.images) == set(IMAGES)
    assert data.coordinate_systems == ["global"]
    for name in IMAGES:
        x0, x1 = (value for value in spatialdata.get_extent(data[name])["x"])
        assert (x0, x1) == (0, 1400), "level-0 pixels of the slide"
    shapes, table = data["cells"], data["table"]
    assert len(shapes) == len(table) == len(features)
    assert shapes.geometry.is_valid.all()
    for shape, feature in zip(shapes.geometry[:20], features, strict=False):
        assert list(shape.exterior.coords) == [tuple(point) for point in feature["geometry"]["coordinates"][0]]
    # The table is joined to its cells, and cells are found by where they lie.
    joined_shapes, joined = spatialdata.join_spatialelement_table(data, "cells", table_name="table")
    assert len(joined) == len(joined_shapes["cells"]) == len(features)
    part = spatialdata.bounding_box_query(
        data, axes=("x", "y"), min_coordinate=[0, 0], max_coordinate=[700, 500], target_coordinate_system="global"
    )
    assert 0 < len(part["table"]) == len(part["cells"]) < len(features)
    counted = table.obs["class"].value_counts()
    scores = table.uns["scores"]
    assert run.scores is not None
    for score in run.scores.stains:
        assert counted[score.stain] == scores.loc[score.stain, "cells"] == score.cells == 100
        assert scores.loc[score.stain, "positive_area_mm2"] == pytest.approx(score.positive_area_mm2)
    assert list(table.var_names) == ["area_um2", "mean_probability"]
    assert table.uns["tissue_area_mm2"] == pytest.approx(run.scores.tissue_area_mm2)


def test_a_slide_without_cells_has_an_empty_table(tmp_path: Path) -> None:
    slide(tmp_path / "he.tif", 0)
    run = stain_slide(tmp_path / "he.tif", tmp_path / "out", FakeStainer(), OPTIONS)
    assert run.cells == {}
    root: Any = zarr.open_group(tmp_path / "out/spatialdata.zarr", mode="r")
    assert root["tables/table/X"].shape == (0, 2)
    shares = np.asarray(root["tables/table/uns/scores/positive_share"])
    assert all(math.isnan(share) for share in shares), "no nuclei"
    try:
        from spatialdata import read_zarr
    except ModuleNotFoundError:
        return
    assert len(read_zarr(tmp_path / "out/spatialdata.zarr")["table"]) == 0


def test_what_it_needs_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="spatialdata needs cells"):
        StainingOptions(formats=("spatialdata",), cells=False)
    slide(tmp_path / "he.tif", 1)
    monkeypatch.setattr(cells_parquet, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=r"staindiffuser\[parquet\]"):
        stain_slide(tmp_path / "he.tif", tmp_path / "out", FakeStainer(), OPTIONS)
    assert not (tmp_path / "out").exists()
