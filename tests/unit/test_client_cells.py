"""Cells: found once each wherever the blocks lie, as polygons in the slide's own pixels."""

import gzip
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import ndimage
from skimage.measure import find_contours

from staindiffuser.client.cells import BlockCells, CellsFile, _Outlines, find_cells
from staindiffuser.client.contract import ServedStain
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


def features_of(image: np.ndarray, scale: tuple[float, float] = (1.0, 1.0)) -> list[dict[str, Any]]:
    rows = blocks_of(image)
    finder = BlockCells(CD3, 0, MPP, scale, len(rows))
    with ThreadPoolExecutor(2) as workers:
        return [feature for row in rows for feature in finder.add_row(row, workers)]


def test_a_disk_is_one_cell_of_its_area_and_place() -> None:
    (cell,) = find_cells(disks(100, 120, [(60.0, 40.5)]), MPP)
    assert cell.centroid == pytest.approx((60.0, 40.5), abs=0.01)
    assert cell.area == pytest.approx(np.pi * 49, rel=0.05)
    assert area(cell.outline) == pytest.approx(cell.area, rel=0.07)
    assert (cell.outline[0] == cell.outline[-1]).all()
    assert cell.outline.mean(axis=0) == pytest.approx((60.0, 40.5), abs=0.7)
    assert cell.probability == pytest.approx(230 / 255, abs=1e-6)


def test_touching_cells_are_parted_and_specks_left_out() -> None:
    image = disks(100, 100, [(40, 50), (52, 50)])
    image[10:14, 10:14] = 255
    cells = find_cells(image, MPP)
    assert len(cells) == 2
    assert sorted(round(cell.centroid[0]) for cell in cells) == pytest.approx([40, 52], abs=1)


def test_outlines_are_those_of_marching_squares() -> None:
    """The same midpoints of pixel sides as scikit-image's contours, for regions of any shape that touch one another."""
    rng = np.random.default_rng(2)
    labels = np.zeros((90, 120), dtype=np.int32)
    for number in range(1, 13):
        y, x = rng.integers(0, 80), rng.integers(0, 110)
        labels[y : y + rng.integers(1, 30), x : x + rng.integers(1, 30)] = number
    labels[40:60, 40:60] = 20
    labels[45:50, 45:50] = 0
    labels = _parts_connected_by_sides(labels)
    outlines = _Outlines(labels).follow(np.ones(labels.max() + 1, dtype=bool))
    assert outlines.keys() == set(np.unique(labels)) - {0}
    for label, outline in outlines.items():
        contours = find_contours(np.pad(labels == label, 1).astype(float), 0.5, fully_connected="low")
        contour = max(contours, key=lambda c: np.ptp(c[:, 0]) + np.ptp(c[:, 1]))
        expected = {tuple(point) for point in (contour[:, ::-1] - 0.5).tolist()}
        assert {tuple(point) for point in outline.tolist()} <= expected
        assert len(outline) == -(-(len(contour) - 1) // 3) + 1


def _parts_connected_by_sides(labels: np.ndarray) -> np.ndarray:
    parts = np.zeros_like(labels)
    for label in np.unique(labels[labels > 0]):
        found, _ = ndimage.label(labels == label)
        parts[found > 0] = found[found > 0] + parts.max()
    return parts


def test_nothing_is_found_in_an_empty_map() -> None:
    assert find_cells(np.zeros((50, 50), dtype=np.uint8), MPP) == []
    assert find_cells(np.full((50, 50), 127, dtype=np.uint8), MPP) == []


def test_blocks_find_each_cell_once() -> None:
    rng = np.random.default_rng(0)
    centres = [
        (float(x) + float(rng.uniform(-3, 3)), float(y)) for y in range(12, 1400, 25) for x in range(12, 1300, 25)
    ]
    # Right on the borders of blocks, and touching across them.
    image = disks(1400, 1300, centres)
    whole = find_cells(image, MPP)
    features = features_of(image)
    assert len(features) == len(whole)
    centroids = sorted((round(c.centroid[1]), round(c.centroid[0])) for c in whole)
    found = sorted(
        (round(np.mean([p[1] for p in ring[:-1]])), round(np.mean([p[0] for p in ring[:-1]])))
        for ring in (feature["geometry"]["coordinates"][0] for feature in features)
    )
    assert np.abs(np.array(centroids) - np.array(found)).max() <= 2


def test_coordinates_are_the_slides_own() -> None:
    (feature,) = features_of(disks(700, 800, [(600, 620)]), scale=(2.0, 1.5))
    ring = np.array(feature["geometry"]["coordinates"][0])
    assert (ring.min(axis=0) + ring.max(axis=0)) / 2 == pytest.approx((1200, 930), abs=2)
    assert feature["properties"]["classification"]["name"] == "CD3"
    assert feature["properties"]["objectType"] == "detection"
    assert feature["properties"]["measurements"]["Area µm^2"] == pytest.approx(np.pi * 49 / 4, rel=0.05)


def test_the_file_is_a_feature_collection_and_reproducible(tmp_path: Path) -> None:
    features = features_of(disks(300, 300, [(60, 60), (150, 200)]))
    for name in ("a", "b"):
        with CellsFile(tmp_path / name, {"notice": "n — µ"}) as file:
            file.write(features)
            file.write([])
            file.finish()
            assert file.counts == {"CD3": 2}
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    collection = json.loads(gzip.decompress((tmp_path / "a").read_bytes()))
    assert collection["type"] == "FeatureCollection"
    assert len(collection["features"]) == 2
    with CellsFile(tmp_path / "empty", {}) as file:
        file.finish()
    assert json.loads(gzip.decompress((tmp_path / "empty").read_bytes()))["features"] == []
