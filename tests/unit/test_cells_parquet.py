"""``cells.parquet``: the cells of the GeoJSON, all of them, in any number of row groups."""

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import tifffile

from staindiffuser.client import cells_parquet
from staindiffuser.client.cells import BlockRow, MapCells
from staindiffuser.client.cells_file import CellsFile
from staindiffuser.client.cells_parquet import require_pyarrow, write_parquet
from staindiffuser.client.contract import ServedStain
from staindiffuser.client.options import StainingOptions
from staindiffuser.client.staining import stain_slide
from staindiffuser.client.testing import FakeStainer
from staindiffuser.errors import DependencyError

STAINS = (ServedStain(name="cd3", label="CD3"), ServedStain(name="ck818", label="CK8/18"))


def cells_file(path: Path, squares: int) -> None:
    image = np.zeros((512, 1400, 1), np.uint8)
    for number in range(squares):
        y, x = 10 + number // 60 * 22, 8 + number % 60 * 22
        image[y : y + 12, x : x + 13] = 230
    blocks: BlockRow = [image[:, x : x + 512] for x in (0, 512, 1024)]
    with CellsFile(path, {"notice": "n — µ"}) as file:
        for number, stain in enumerate(STAINS):
            file.write([search() for search in MapCells(stain, number, 0.5, (2.0, 2.0), 1, "s").add_row(blocks)])
        file.finish()


@pytest.mark.parametrize(("squares", "group"), [(0, 10), (1, 10), (700, 64), (700, 10_000)])
def test_every_cell_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, squares: int, group: int) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="GeoParquet needs pyarrow")
    monkeypatch.setattr(cells_parquet, "GROUP", group)
    cells_file(tmp_path / "cells.geojson.gz", squares)
    features = json.loads(gzip.decompress((tmp_path / "cells.geojson.gz").read_bytes()))["features"]
    assert write_parquet(tmp_path / "cells.geojson.gz", tmp_path / "cells.parquet") == len(features) == 2 * squares
    table = parquet.read_table(tmp_path / "cells.parquet")
    geo = json.loads(table.schema.metadata[b"geo"])
    assert geo["columns"][geo["primary_column"]]["encoding"] == "WKB"
    assert json.loads(table.schema.metadata[b"staindiffuser"]) == {"notice": "n — µ"}
    rows = table.to_pylist()
    assert [row["id"] for row in rows] == [feature["id"] for feature in features]
    for row, feature in zip(rows, features, strict=True):
        ring = feature["geometry"]["coordinates"][0]
        order, kind, rings, count = struct.unpack("<BIII", row["geometry"][:13])
        assert (order, kind, rings, count) == (1, 3, 1, len(ring))
        assert np.frombuffer(row["geometry"][13:], "<f8").reshape(-1, 2).tolist() == ring
        assert row["class"] == feature["properties"]["classification"]["name"]
        assert row["area_um2"] == pytest.approx(feature["properties"]["measurements"]["Area µm^2"], rel=1e-6)


def test_geopandas_opens_both(tmp_path: Path) -> None:
    geopandas = pytest.importorskip("geopandas", reason="geopandas is not installed")
    pytest.importorskip("pyarrow", reason="GeoParquet needs pyarrow")
    cells_file(tmp_path / "cells.geojson.gz", 50)
    write_parquet(tmp_path / "cells.geojson.gz", tmp_path / "cells.parquet")
    (tmp_path / "cells.geojson").write_bytes(gzip.decompress((tmp_path / "cells.geojson.gz").read_bytes()))
    frames = [geopandas.read_parquet(tmp_path / "cells.parquet"), geopandas.read_file(tmp_path / "cells.geojson")]
    for frame in (frame.set_crs(None, allow_override=True) for frame in frames):  # GeoJSON's default is geographic
        assert len(frame) == 100
        assert frame.geometry.is_valid.all()
        assert frame.geometry.area.min() > 400


def test_without_pyarrow_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells_parquet, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=r"staindiffuser\[parquet\]"):
        require_pyarrow()


def test_a_slide_gets_the_file(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="GeoParquet needs pyarrow")
    pixels = np.full((400, 420, 3), (225, 170, 205), np.uint8)
    for number in range(60):
        pixels[30 + number // 10 * 60 :, 20 + number % 10 * 40 :][:14, :14] = (80, 60, 150)
    tifffile.imwrite(
        tmp_path / "t.tif", pixels, photometric="rgb", resolution=(20000, 20000), resolutionunit="CENTIMETER"
    )
    run = stain_slide(tmp_path / "t.tif", tmp_path / "out", FakeStainer(), StainingOptions(parquet=True))
    assert run.outputs["cells.parquet"] == (tmp_path / "out/cells.parquet").stat().st_size
    assert run.cells == {"CD3": 60, "CK8/18": 60}
    assert run.request.parquet
    with pytest.raises(ValueError, match="parquet needs cells"):
        StainingOptions(parquet=True, cells=False)
