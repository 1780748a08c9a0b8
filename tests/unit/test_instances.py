"""Cells of maps: those of the plain definition, whatever short cuts are taken."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial import cKDTree
from skimage.measure import find_contours

from staindiffuser.imaging.instances import find_cells
from staindiffuser.imaging.outlines import follow_outlines
from tests.plain_instances import plain_cells

MPP = 0.5


def ellipses(side: int, count: int, seed: int, largest: float = 9) -> np.ndarray:
    """A cell map like a model's: ellipses with soft edges, some of them touching."""
    rng = np.random.default_rng(seed)
    image = np.zeros((side, side), np.uint8)
    for x, y, a, b, turn in rng.uniform((0, 0, 3, 3, 0), (side, side, largest, largest, 180), (count, 5)):
        cv2.ellipse(image, (int(x), int(y)), (int(a), int(b)), float(turn), 0, 360, (240,), -1, cv2.LINE_AA)
    return np.asarray(cv2.GaussianBlur(image, (0, 0), 1.2))


def noise(shape: tuple[int, int], sigma: float, mean: float) -> np.ndarray:
    field = ndimage.gaussian_filter(np.random.default_rng(3).normal(size=shape), sigma)
    return np.clip(mean + field / field.std() * 60, 0, 255).astype(np.uint8)


def strips() -> np.ndarray:
    image = np.zeros((300, 310), np.uint8)
    image[20:280, 100:110], image[50:70], image[::20, ::20] = 255, 200, 255
    return image


MAPS: dict[str, Callable[[], np.ndarray]] = {
    "sparse": lambda: ellipses(900, 500, 0),
    "crowded": lambda: ellipses(700, 2000, 1),
    "large": lambda: ellipses(700, 60, 2, largest=60),
    "speckled": lambda: noise((400, 500), 0.7, 128),
    "fine": lambda: noise((400, 500), 2, 128),
    "coarse": lambda: noise((400, 500), 8, 128),
    "islands": lambda: noise((400, 500), 5, 40),
    "strips": strips,
    "narrow": lambda: ellipses(700, 2000, 1)[:10],
    "random": lambda: np.random.default_rng(0).integers(0, 256, (200, 200), np.uint8),
}


@pytest.mark.parametrize("name", MAPS)
def test_cells_are_those_of_the_plain_definition(name: str) -> None:
    """As many; nearly all to the pixel. Heights differ in the last digit, which moves some borders by a pixel or two.

    Straight strips are all ties, which any rounding decides: there borders move by a whole row.
    """
    compare(MAPS[name](), moved={"strips": 1.0, "narrow": 0.15}.get(name, 0.03))


def real_maps() -> Iterator[Path]:
    folder = Path(os.environ.get("STAINDIFFUSER_TEST_DATA", "../shared/data")) / "crops"
    yield from sorted(folder.glob("*.png"))[:3]


def test_cells_of_real_tissue_are_those_of_the_plain_definition() -> None:
    """Maps whose shapes are those of nuclei of real slides: hematoxylin's density as a probability."""
    from staindiffuser.imaging.image_files import read_image
    from staindiffuser.imaging.optical_density import he_densities

    paths = list(real_maps())
    if not paths:
        pytest.skip("no real tissue: ../shared/data/crops is not there (see STAINDIFFUSER_TEST_DATA)")
    for path in paths:
        density = ndimage.gaussian_filter(he_densities(read_image(path)[:900, :900])[..., 0], 1.0)
        compare(np.clip(density / np.percentile(density, 99) * 200, 0, 255).astype(np.uint8))


def compare(image: np.ndarray, moved: float = 0.03) -> None:
    centroids, areas, probabilities = plain_cells(image, MPP)
    found = find_cells(image, MPP, outlines=False)
    assert len(found) == len(centroids) > 0
    distance, nearest = cKDTree(found.centroids).query(centroids)
    assert sorted(nearest) == list(range(len(found))), "each cell has one of its own"
    assert distance.max() <= 1.0
    changed = np.abs(found.areas[nearest] - areas)
    assert np.mean(changed > np.maximum(2, 0.02 * areas)) <= moved, "whole borders moved"
    same = changed == 0
    assert found.probabilities[nearest][same] == pytest.approx(probabilities[same], abs=0.01)


def test_most_cells_are_the_same_to_the_pixel() -> None:
    for name, share in (("sparse", 1.0), ("crowded", 0.97), ("speckled", 1.0)):
        centroids, areas, _ = plain_cells(MAPS[name](), MPP)
        found = find_cells(MAPS[name](), MPP, outlines=False)
        expected = {(round(x, 6), round(y, 6), int(a)) for (x, y), a in zip(centroids, areas, strict=True)}
        got = {(round(x, 6), round(y, 6), int(a)) for (x, y), a in zip(found.centroids, found.areas, strict=True)}
        assert len(expected & got) >= share * len(expected), name


def test_a_map_without_an_edge_is_found_somehow() -> None:
    found = find_cells(np.full((60, 50), 255, np.uint8), MPP)
    assert found.areas.sum() == 3000


@pytest.mark.parametrize("name", ["sparse", "crowded", "large", "strips"])
def test_outlines_enclose_their_cells(name: str) -> None:
    found = find_cells(MAPS[name](), MPP)
    assert len(found.outlines) == len(found)
    for number in range(len(found)):
        outline = found.outlines[number]
        assert (outline[0] == outline[-1]).all()
        x, y = outline.T
        signed = float(np.dot(x[:-1], y[1:]) - np.dot(x[1:], y[:-1])) / 2
        # Holes lie inside the outline, and every third midpoint cuts corners.
        assert signed > 0.7 * found.areas[number] - 8
        assert x.min() - 1 <= found.centroids[number, 0] <= x.max() + 1
        assert y.min() - 1 <= found.centroids[number, 1] <= y.max() + 1


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
    numbers, first = np.unique(labels, return_index=True)
    labels, first = np.pad(labels, 1), first[1:]
    first = (first // 120 + 1) * 122 + first % 120 + 1
    outlines = follow_outlines(labels, numbers[1:], first, np.bincount(labels.ravel())[numbers[1:]])
    labels = labels[1:-1, 1:-1]
    assert len(outlines) == labels.max()
    for index, label in enumerate(numbers[1:]):
        outline = outlines[index]
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


@pytest.mark.parametrize("name", MAPS)
def test_cells_within_a_part_are_those_of_the_whole(name: str) -> None:
    """Regions that lie elsewhere are left out early; none of them would have changed a cell."""
    image = MAPS[name]()
    height, width = image.shape
    whole = find_cells(image, MPP)
    x, y = whole.centroids.T
    for box in ((0, 0, width // 2, height // 2), (width // 3, height // 4, width, height * 3 // 4)):
        part = find_cells(image, MPP, box)
        inside = np.flatnonzero((x >= box[0]) & (x < box[2]) & (y >= box[1]) & (y < box[3]))
        np.testing.assert_array_equal(part.centroids, whole.centroids[inside])
        np.testing.assert_array_equal(part.areas, whole.areas[inside])
        np.testing.assert_array_equal(part.probabilities, whole.probabilities[inside])
        for number, of_whole in enumerate(inside):
            np.testing.assert_array_equal(part.outlines[number], whole.outlines[of_whole])
