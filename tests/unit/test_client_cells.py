"""Cells: found once each wherever the blocks lie, as polygons in the slide's own pixels."""

import gzip
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from staindiffuser.client.cell_text import feature_texts
from staindiffuser.client.cells import ChunkCells, MapCells
from staindiffuser.client.cells_file import CellsFile
from staindiffuser.client.contract import ServedStain
from staindiffuser.imaging.instances import find_cells
from staindiffuser.imaging.ome_tiff import SIDE

MPP = 0.5
CD3 = ServedStain(name="cd3", label="CD3")


def disks(height: int, width: int, centres: list[tuple[float, float]], radius: float = 7) -> np.ndarray:
    image = np.zeros((height, width), dtype=np.uint8)
    for cx, cy in centres:
        left, top = max(0, int(cx - radius) - 1), max(0, int(cy - radius) - 1)
        part = image[top : int(cy + radius) + 2, left : int(cx + radius) + 2]
        y, x = np.mgrid[: part.shape[0], : part.shape[1]]
        part[np.hypot(x + left + 0.5 - cx, y + top + 0.5 - cy) <= radius] = 230
    return image


def area(outline: np.ndarray) -> float:
    x, y = outline[:, 0], outline[:, 1]
    return float(abs(np.dot(x[:-1], y[1:]) - np.dot(x[1:], y[:-1])) / 2)


def blocks_of(image: np.ndarray) -> list[list[np.ndarray | None]]:
    rows = []
    for y in range(0, image.shape[0], SIDE):
        row: list[np.ndarray | None] = []
        for x in range(0, image.shape[1], SIDE):
            block = image[y : y + SIDE, x : x + SIDE, None]
            row.append(block if block.any() else None)
        rows.append(row)
    return rows


def chunks_of(image: np.ndarray, scale: tuple[float, float] = (1.0, 1.0)) -> list[ChunkCells]:
    rows = blocks_of(image)
    finder = MapCells(CD3, 0, MPP, scale, len(rows), "slide")
    return [search() for row in rows for search in finder.add_row(row)]


def features_of(image: np.ndarray, scale: tuple[float, float] = (1.0, 1.0)) -> list[dict[str, Any]]:
    chunks = chunks_of(image, scale)
    features: list[dict[str, Any]] = orjson.loads(b"[" + b",".join(c.features for c in chunks if c.count) + b"]")
    assert len(features) == sum(chunk.count for chunk in chunks)
    return features


def test_a_disk_is_one_cell_of_its_area_and_place() -> None:
    cells = find_cells(disks(100, 120, [(60.0, 40.5)]), MPP)
    assert len(cells) == 1
    assert cells.centroids[0] == pytest.approx((60.0, 40.5), abs=0.01)
    assert cells.areas[0] == pytest.approx(np.pi * 49, rel=0.05)
    outline = cells.outlines[0]
    assert area(outline) == pytest.approx(cells.areas[0], rel=0.07)
    assert (outline[0] == outline[-1]).all()
    assert outline.mean(axis=0) == pytest.approx((60.0, 40.5), abs=0.7)
    assert cells.probabilities[0] == pytest.approx(230 / 255, abs=1e-6)


def test_touching_cells_are_parted_and_specks_left_out() -> None:
    image = disks(100, 100, [(40, 50), (52, 50)])
    image[10:14, 10:14] = 255
    cells = find_cells(image, MPP)
    assert len(cells) == 2
    assert sorted(cells.centroids[:, 0]) == pytest.approx([40, 52], abs=1)


def test_nothing_is_found_in_an_empty_map() -> None:
    assert len(find_cells(np.zeros((50, 50), dtype=np.uint8), MPP)) == 0
    assert len(find_cells(np.full((50, 50), 127, dtype=np.uint8), MPP)) == 0


def test_blocks_find_each_cell_once() -> None:
    rng = np.random.default_rng(0)
    centres = [
        (float(x) + float(rng.uniform(-3, 3)), float(y)) for y in range(12, 1400, 25) for x in range(12, 4500, 25)
    ]
    # Right on the borders of blocks, and touching across them.
    image = disks(1400, 4500, centres)
    whole = find_cells(image, MPP)
    features = features_of(image)
    assert len(features) == len(whole)
    centroids = sorted((round(y), round(x)) for x, y in whole.centroids)
    found = sorted(
        (round(np.mean([p[1] for p in ring[:-1]])), round(np.mean([p[0] for p in ring[:-1]])))
        for ring in (feature["geometry"]["coordinates"][0] for feature in features)
    )
    assert np.abs(np.array(centroids) - np.array(found)).max() <= 2


def test_coordinates_are_the_slides_own() -> None:
    (feature,) = features_of(disks(700, 800, [(600, 620)]), scale=(2.0, 1.5))
    assert uuid.UUID(feature["id"]).version == 8
    ring = np.array(feature["geometry"]["coordinates"][0])
    assert (ring.min(axis=0) + ring.max(axis=0)) / 2 == pytest.approx((1200, 930), abs=2)
    assert feature["properties"]["classification"]["name"] == "CD3"
    assert feature["properties"]["objectType"] == "detection"
    measured = feature["properties"]["measurements"]
    assert (measured["Centroid X px"], measured["Centroid Y px"]) == pytest.approx((1200, 930), abs=0.5)
    assert measured["Mean probability"] == pytest.approx(230 / 255, abs=1e-4)
    assert measured["Area µm^2"] == pytest.approx(np.pi * 49 / 4, rel=0.05)


def test_identifiers_tell_cells_slides_and_stains_apart() -> None:
    rng = np.random.default_rng(1)
    image = disks(1100, 5000, [tuple(point) for point in rng.uniform(10, (4990, 1090), (900, 2))])
    ids = [feature["id"] for feature in features_of(image)]
    assert len(set(ids)) == len(ids) > 500
    assert ids == [feature["id"] for feature in features_of(image)]
    other = MapCells(ServedStain(name="ck818", label="CK8/18"), 1, MPP, (1.0, 1.0), 3, "slide")
    rest = [c.features for row in blocks_of(image) for c in (s() for s in other.add_row(row)) if c.count]
    assert not {feature["id"] for feature in orjson.loads(b"[" + b",".join(rest) + b"]")} & set(ids)


def test_the_file_is_a_feature_collection_and_reproducible(tmp_path: Path) -> None:
    chunks = chunks_of(disks(300, 300, [(60, 60), (150, 200)]))
    for name in ("a", "b"):
        with CellsFile(tmp_path / name, {"notice": "n — µ"}) as file:
            file.write(chunks)
            file.write([])
            file.finish()
            assert file.counts == {"CD3": 2}
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    collection = orjson.loads(gzip.decompress((tmp_path / "a").read_bytes()))
    assert collection["type"] == "FeatureCollection"
    assert len(collection["features"]) == 2
    with CellsFile(tmp_path / "empty", {}) as file:
        file.finish()
    assert orjson.loads(gzip.decompress((tmp_path / "empty").read_bytes()))["features"] == []


def test_numbers_are_written_as_json_reads_them() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 40, 3000)
    ends = np.cumsum([0, *lengths])
    points = rng.uniform(0, 10.0 ** rng.integers(0, 7, (ends[-1], 1)), (ends[-1], 2))
    points[:4] = [(0, 0.04), (0.05, 0.96), (9.97, 99.96), (1e6, 123456.7)]
    numbers = rng.uniform(0, [1e6, 1e6, 5000, 1], (3000, 4))
    numbers[:3] = [(0, 0, 0, 0), (0.01, 9.99, 0.001, 0.00004), (1, 10, 100, 1)]
    pieces = [b'{"id":"', b'","ring":[', b'],"x":', b',"y":', b',"area":', b',"p":', b',"n":"\xc2\xb5"}']
    text = feature_texts(pieces, points, ends, numbers)
    cells = orjson.loads(b"[" + text + b"]")
    assert len(cells) == 3000
    assert text.count(b"\n") == 2999, "a feature a line"
    for number, cell in enumerate(cells):
        assert (cell["id"], cell["n"]) == (f"{number:05x}", "\u00b5")
        np.testing.assert_allclose(cell["ring"], points[ends[number] : ends[number + 1]], atol=0.0500001)
        written = [cell["x"], cell["y"], cell["area"], cell["p"]]
        assert (np.abs(numbers[number] - written) <= [0.0500001, 0.0500001, 0.00500001, 0.0000500001]).all()
