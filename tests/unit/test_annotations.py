"""Annotations: polygons of any viewer's GeoJSON, with holes, and files that hold none."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from staindiffuser.client.command import run_command
from staindiffuser.client.errors import OutputError
from staindiffuser.client.options import StainingOptions
from staindiffuser.client.staining import stain_slide
from staindiffuser.client.target import Target
from staindiffuser.client.testing import FakeStainer
from staindiffuser.errors import InputError, UsageError
from staindiffuser.imaging.annotations import coverage, read_regions
from tests.unit.test_client_staining import tissue_tile

SQUARE = [[10, 10], [30, 10], [30, 30], [10, 30], [10, 10]]
HOLE = [[15, 15], [25, 15], [25, 25], [15, 25], [15, 15]]


def feature(kind: str, coordinates: Any) -> dict[str, Any]:
    return {"type": "Feature", "properties": {}, "geometry": {"type": kind, "coordinates": coordinates}}


def collection(*features: dict[str, Any]) -> dict[str, Any]:
    return {"type": "FeatureCollection", "features": list(features)}


def write(path: Path, data: object) -> Path:
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "data",
    [
        collection(feature("Polygon", [SQUARE, HOLE])),
        collection(feature("Point", [5, 5]), feature("Polygon", [SQUARE, HOLE]), feature("LineString", SQUARE)),
        feature("MultiPolygon", [[SQUARE, HOLE]]),
        [feature("Polygon", [SQUARE, HOLE])],
        {"type": "GeometryCollection", "geometries": [{"type": "Polygon", "coordinates": [SQUARE, HOLE]}]},
        {"type": "Polygon", "coordinates": [SQUARE, HOLE]},
    ],
)
def test_every_form_of_geojson_is_read(tmp_path: Path, data: object) -> None:
    share = coverage(read_regions(write(tmp_path / "a.geojson", data)), (40, 50), (1.0, 1.0))
    assert share.shape == (50, 40)
    assert share.sum() == pytest.approx(20 * 20 - 10 * 10, rel=0.03)
    assert share[20, 20] == 0
    assert share[12, 12] == 1
    packed = tmp_path / "a.geojson.gz"
    packed.write_bytes(gzip.compress((tmp_path / "a.geojson").read_bytes()))
    np.testing.assert_array_equal(coverage(read_regions(packed), (40, 50), (1.0, 1.0)), share)


def test_a_grid_of_other_pixels_and_overlapping_polygons(tmp_path: Path) -> None:
    data = collection(feature("Polygon", [SQUARE]), feature("Polygon", [[[x + 10, y] for x, y in SQUARE]]))
    share = coverage(read_regions(write(tmp_path / "a.geojson", data)), (20, 10), (2.0, 5.0))
    assert share.sum() * 10 == pytest.approx(30 * 20, rel=0.15)  # pixels of 2 × 5


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "not GeoJSON"),
        ("{", "not GeoJSON"),
        ("[]", "no polygon"),
        ('{"type": "FeatureCollection"}', "not GeoJSON"),
        ('{"type": "FeatureCollection", "features": []}', "no polygon"),
        ('{"type": "Feature", "geometry": null}', "no polygon"),
        ('{"type": "Point", "coordinates": [1, 2]}', "no polygon"),
        ('{"type": "Circle", "coordinates": [1, 2]}', "unknown type"),
        ('{"type": "Polygon", "coordinates": [[[1, 2], [3, 4]]]}', "fewer than three"),
        ('{"type": "Polygon", "coordinates": [[[1, 2], [3, NaN], [5, 6]]]}', "no number"),
        ('{"type": "Polygon", "coordinates": [[["a", 2], [3, 4], [5, 6]]]}', "not GeoJSON"),
        ("[" * 100_000, "not GeoJSON"),
    ],
)
def test_what_holds_no_polygon_is_refused(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "a.geojson"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=words) as caught:
        read_regions(path)
    assert "\n" not in str(caught.value)


def test_only_the_annotation_is_stained(tmp_path: Path) -> None:
    tile = tissue_tile(tmp_path / "t.tif", 700, 900)
    corners = [[100, 150], [400, 150], [400, 600], [100, 600], [100, 150]]
    path = write(tmp_path / "a.geojson", collection(feature("Polygon", [corners])))
    options = StainingOptions(stains=("cd3",), cells=False, mask=str(path), save_mask=True)
    run = stain_slide(tmp_path / "t.tif", tmp_path / "out", FakeStainer(), options)
    image = tifffile.imread(tmp_path / "out/cd3.ome.tiff").astype(int)
    inside = np.zeros(tile.shape[:2], bool)
    inside[160:590, 110:390] = True
    assert np.abs(image[inside] - tile[inside]).mean() < 3
    outside = np.ones(tile.shape[:2], bool)
    outside[140:610, 90:410] = False
    assert (image[outside] > 250).all()
    assert run.mask is not None
    assert run.mask.shown_fraction == pytest.approx(300 * 450 / (700 * 900), rel=0.03)
    assert run.tiles.stained < run.tiles.total
    assert "tissue.png" in run.outputs
    other = write(tmp_path / "b.geojson", collection(feature("Polygon", [SQUARE])))
    with pytest.raises(OutputError, match="mask"):
        stain_slide(
            tmp_path / "t.tif", tmp_path / "out", FakeStainer(),
            StainingOptions(stains=("cd3",), cells=False, mask=str(other), save_mask=True, resume=True),
        )  # fmt: skip


def test_without_a_mask_glass_is_stained_too(tmp_path: Path) -> None:
    tile = tissue_tile(tmp_path / "t.tif", 600, 900)
    tile[:, 500:] = 243
    tifffile.imwrite(
        tmp_path / "t.tif", tile, photometric="rgb", resolution=(20000, 20000), resolutionunit="CENTIMETER"
    )
    runs = {}
    for mask in ("auto", "none"):
        options = StainingOptions(stains=("cd3",), cells=False, mask=mask)
        runs[mask] = stain_slide(tmp_path / "t.tif", tmp_path / mask, FakeStainer(), options)
    assert runs["none"].tiles.stained == runs["none"].tiles.total > runs["auto"].tiles.stained
    image = tifffile.imread(tmp_path / "none/cd3.ome.tiff")
    assert np.abs(image[:, 600:].astype(int) - 243).max() < 4
    assert runs["none"].tissue_fraction == pytest.approx(runs["auto"].tissue_fraction, abs=0.02)


@pytest.mark.parametrize(
    ("content", "words"), [(None, "cannot be read"), ("{", "not GeoJSON"), ("far", "no part of it")]
)
def test_a_wrong_annotation_ends_the_slide(tmp_path: Path, content: str | None, words: str) -> None:
    tissue_tile(tmp_path / "t.tif")
    path = tmp_path / "a.geojson"
    if content == "far":
        write(path, feature("Polygon", [[[x + 9999, y] for x, y in SQUARE]]))
    elif content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=words):
        stain_slide(tmp_path / "t.tif", tmp_path / "out", FakeStainer(), StainingOptions(mask=str(path)))
    assert not (tmp_path / "out").exists()


def test_one_annotation_does_not_fit_several_slides(tmp_path: Path) -> None:
    for name in "ab":
        tissue_tile(tmp_path / f"{name}.tif")
    path = write(tmp_path / "a.geojson", feature("Polygon", [SQUARE]))
    with pytest.raises(UsageError, match="fits one slide, not 2"):
        run_command([tmp_path], tmp_path / "out", Target(addresses=("127.0.0.1:9",)), StainingOptions(mask=str(path)))
