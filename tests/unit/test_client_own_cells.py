"""``--cells-from``: the user's cells are scored where they lie, and keep their ids."""

import csv
import gzip
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from staindiffuser.client import own_cells
from staindiffuser.client.errors import OutputError
from staindiffuser.client.options import StainingOptions
from staindiffuser.client.own_cells import read_own_cells
from staindiffuser.client.staining import stain_slide
from staindiffuser.client.testing import FakeStainer
from staindiffuser.errors import InputError
from staindiffuser.imaging import geojson
from staindiffuser.imaging.arrays import UInt8Array

WIDTH, HEIGHT, BROWN_UNTIL = 1500, 700, 620
"""Of the slide, whose pixels are half as large as the model's."""


def paint(tensor: str, tiles_BTT3: UInt8Array, origins_B2: NDArray[np.int64]) -> UInt8Array:
    """CD3 is positive left of a line, CK8/18 nowhere."""
    x = origins_B2[:, 0, None, None, None] + np.arange(tiles_BTT3.shape[2])[None, None, :, None]
    positive = (x < BROWN_UNTIL // 2) & np.full(tiles_BTT3[..., :1].shape, tensor.endswith("CD3"))
    if tensor.startswith("STAIN"):
        return np.where(positive, np.array((138, 69, 43), np.uint8), np.uint8(255))
    return np.where(positive, 255, 0).astype(np.uint8)


def square(x: float, y: float, side: float = 24) -> list[list[float]]:
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]


CELLS: dict[str, Any] = {
    "left": {"type": "Polygon", "coordinates": [square(100, 100)]},
    "right": {"type": "Polygon", "coordinates": [square(1100.5, 400)]},
    "mostly left": {"type": "Polygon", "coordinates": [square(BROWN_UNTIL - 16, 300)]},
    "mostly right": {"type": "MultiPolygon", "coordinates": [[square(BROWN_UNTIL - 8, 300)]]},
    "a point": {"type": "Point", "coordinates": [1.0, 1.0]},
    "outside": {"type": "Polygon", "coordinates": [square(9000, 100)]},
    "tiny": {"type": "Polygon", "coordinates": [square(200, 200, 0.1)]},
}
POSITIVE = {"left": 1, "right": 0, "mostly left": 1, "mostly right": 0, "a point": 1, "outside": None, "tiny": 1}


def collection(cells: dict[str, Any]) -> str:
    features = [{"type": "Feature", "id": name, "geometry": geometry} for name, geometry in cells.items()]
    return json.dumps({"type": "FeatureCollection", "features": features})


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "he.tif"
    pixels = np.full((HEIGHT, WIDTH, 3), (170, 90, 150), np.uint8)
    tifffile.imwrite(path, pixels, photometric="rgb", resolution=(40000, 40000), resolutionunit="CENTIMETER")
    return path


def test_cells_are_scored_where_they_lie(slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_cells, "BLOCK", 256)
    mine = tmp_path / "mine.geojson.gz"
    mine.write_bytes(gzip.compress(collection(CELLS).encode()))
    options = StainingOptions(cells_from=mine, mask="none")
    run = stain_slide(slide, tmp_path / "out", FakeStainer(paint), options)
    with (tmp_path / "out/own-cells.csv").open(newline="", encoding="utf-8") as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    assert list(rows) == list(CELLS), "their order"
    assert {name: int(row["cd3_positive"]) if row["cd3_positive"] else None for name, row in rows.items()} == POSITIVE
    assert {row["ck818_positive"] for row in rows.values()} == {"0", ""}
    assert float(rows["left"]["cd3_dab"]) == pytest.approx(1, abs=0.05)
    assert float(rows["right"]["cd3_dab"]) == pytest.approx(0, abs=0.05)
    assert float(rows["mostly left"]["cd3_probability"]) == pytest.approx(16 / 24, abs=0.05)
    assert (float(rows["right"]["x"]), float(rows["right"]["y"])) == (1112.5, 412)
    assert run.scores is not None
    assert [(s.nuclei, s.positive_nuclei) for s in run.scores.stains] == [(6, 4), (6, 0)]
    assert run.outputs["own-cells.csv"] > 0
    mine.write_text(collection({"other": CELLS["left"]}), encoding="utf-8")
    again = StainingOptions(cells_from=mine, mask="none", resume=True)
    with pytest.raises(OutputError, match="cells_from"):
        stain_slide(slide, tmp_path / "out", FakeStainer(paint), again)


@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_formats_of_geojson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(geojson, "CHUNK", chunk)
    path = tmp_path / "cells.geojson"
    indented = json.dumps(json.loads(collection(CELLS)), indent=2, ensure_ascii=False)
    for text in (collection(CELLS), indented, json.dumps(json.loads(collection(CELLS))["features"])):
        path.write_text(text, encoding="utf-8")
        found = read_own_cells(path)
        assert found.ids == list(CELLS)
        np.testing.assert_array_equal(found[1], square(1100.5, 400))
        np.testing.assert_array_equal(found[4], [[1, 1]])


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="GeoParquet needs pyarrow")
    import pyarrow.parquet as pq

    ring = np.array(square(3, 4))
    little = struct.pack("<BIII", 1, 3, 1, 5) + ring.astype("<f8").tobytes()
    big = struct.pack(">BIII", 0, 3, 1, 5) + ring.astype(">f8").tobytes()
    point = struct.pack("<BIdd", 1, 1, 7.0, 8.0)
    table = pa.table({"id": [11, 12, 13], "geometry": [little, big, point]})
    pq.write_table(table, tmp_path / "cells.parquet")
    found = read_own_cells(tmp_path / "cells.parquet")
    assert found.ids == ["11", "12", "13"]
    np.testing.assert_array_equal(found[0], ring)
    np.testing.assert_array_equal(found[1], ring)
    np.testing.assert_array_equal(found[2], [[7, 8]])


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.geojson", b"", "does not hold cells"),
        ("a.geojson", b'{"type": "FeatureCollection", "features": []}', "holds no cells"),
        ("a.geojson", collection(CELLS).encode()[:-40], "ends in the middle"),
        ("a.geojson", collection({"l": {"type": "LineString", "coordinates": [[0, 0], [1, 1]]}}).encode(), "LineStr"),
        ("a.geojson", collection({"n": {"type": "Point", "coordinates": [float("nan"), 1]}}).encode(), "no number"),
        ("a.geojson", b"\x1f\x8b broken", "a.geojson"),
        ("a.parquet", b"PAR1 broken", "does not hold cells"),
    ],
)
def test_what_holds_no_cells_is_refused(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=problem):
        read_own_cells(tmp_path / name)


def test_a_region_is_no_cell(slide: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.geojson"
    mine.write_text(collection({"tumour": {"type": "Polygon", "coordinates": [square(10, 10, 1400)]}}), "utf-8")
    with pytest.raises(InputError, match="cell tumour is 700 pixels across"):
        stain_slide(
            slide, tmp_path / "out", FakeStainer(paint), StainingOptions(cells_from=mine, mask="none", nuclei=False)
        )
