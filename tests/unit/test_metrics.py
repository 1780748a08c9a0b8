"""Metrics on images whose scores are known."""

import itertools
import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from staindiffuser.imaging.instances import cell_centroids, count_matches, find_cells
from staindiffuser.imaging.optical_density import dab_density
from staindiffuser.training.evaluation.metrics import METRIC_NAMES, METRICS, StainScore, radial_power
from staindiffuser.training.evaluation.tile_metrics import Edges, hausdorff95

BROWN, PALE = (120, 75, 45), (225, 225, 235)
MPP = 0.5
NOTHING = np.zeros((64, 64), np.uint8)


def image(columns: slice) -> np.ndarray:
    image = np.full((64, 64, 3), PALE, np.uint8)
    image[:, columns] = BROWN
    return image


def score(virtual: np.ndarray, real: np.ndarray, cells: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    total = StainScore(mpp=MPP, detail=True)
    total.add(virtual=virtual, real=real, cells=cells, mask=mask, he=np.full_like(real, 245))
    return total.metrics()


def discs(*centroids: tuple[float, float], radius: float = 6.0, size: int = 128) -> NDArray[np.uint8]:
    """A map with a disc at each row and column."""
    yy, xx = np.mgrid[:size, :size]
    found = np.zeros((size, size), np.uint8)
    for y, x in centroids:
        found[np.hypot(yy - y, xx - x) <= radius] = 255
    return found


def painted(map_HW: NDArray[np.uint8]) -> np.ndarray:
    return np.where(map_HW[..., None] > 0, BROWN, PALE).astype(np.uint8)


def test_perfect_stain() -> None:
    mask = discs((30, 30), (30, 90), (90, 60))
    metrics = score(painted(mask), painted(mask), mask, mask)
    assert set(metrics) == {metric.name for metric in METRICS if metric.column not in (None, "lpips")}
    for name in (
        "dab_dice",
        "iou",
        "positive_cell_f1",
        "cell_dice",
        "cell_f1",
        "od_correlation",
        "radial_power",
        "ssim",
    ):
        assert metrics[name] == pytest.approx(1), name
    assert metrics["positive_area_error"] == metrics["hausdorff95_um"] == 0
    assert metrics["psnr"] == math.inf


@pytest.mark.parametrize("axis", [0, 1])
def test_a_grid_of_the_pixel_shuffle_has_power_where_grain_has_none_of_its_own(axis: int) -> None:
    rng = np.random.default_rng(0)
    grain = rng.normal(180, 10, (64, 96, 1)).repeat(3, axis=-1)
    grid = 2 * (np.indices((64, 96))[axis] % 2)[..., None]

    def found(image: NDArray[np.float64]) -> float:
        total = StainScore(detail=True)
        total.add(virtual=np.rint(image).astype(np.uint8), real=np.full((64, 96, 3), 200, np.uint8), mask=NOTHING)
        return total.metrics()["grid_power"]

    assert 0.4 < found(grain) < 2.5
    assert found(grain + grid) > 4


def test_glass_is_judged_where_the_h_and_e_shows_it() -> None:
    he = np.full((64, 64, 3), 245, np.uint8)
    he[:, 32:] = (200, 120, 170)
    painted = np.full((64, 64, 3), 255, np.uint8)
    painted[:, :20] -= 6
    painted[:, 32:] = 100
    total = StainScore(detail=True)
    total.add(virtual=painted, real=painted, mask=NOTHING, he=he)
    assert total.metrics()["glass_difference"] == pytest.approx(6 * 20 / 29, abs=0.3)  # the edge is not bare for sure
    unknown = StainScore(detail=True)
    unknown.add(virtual=painted, real=painted, mask=NOTHING)
    assert "glass_difference" not in unknown.metrics()


def test_metrics_stand_in_the_order_of_the_table() -> None:
    metrics = list(score(image(slice(0, 9)), image(slice(0, 9)), NOTHING, NOTHING))
    assert metrics == [name for name in METRIC_NAMES if name in metrics]


def test_half_of_the_positive_area() -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[:, :32] = 255
    metrics = score(image(slice(0, 16)), image(slice(0, 32)), np.where(mask > 0, 0, 255).astype(np.uint8), mask)
    assert metrics["dab_dice"] == pytest.approx(2 / 3, abs=0.03)
    assert metrics["iou"] == pytest.approx(metrics["dab_dice"] / (2 - metrics["dab_dice"]))
    assert metrics["positive_area_error"] == pytest.approx(-0.5, abs=0.05)
    assert metrics["cell_dice"] == 0


def test_dice_is_pooled_over_pixels_not_averaged_over_tiles() -> None:
    total = StainScore()
    total.add(virtual=image(slice(0, 32)), real=image(slice(0, 32)), cells=NOTHING, mask=NOTHING)
    total.add(virtual=image(slice(0, 4)), real=image(slice(0, 0)), cells=NOTHING, mask=NOTHING)
    assert total.tile_dice == [1.0, 0.0]
    assert total.metrics()["dab_dice"] == pytest.approx(64 / (64 + 5), abs=0.02)


def test_what_is_undefined_is_not_a_number() -> None:
    empty = image(slice(0, 0))
    metrics = score(empty, empty, NOTHING, NOTHING)
    for name in ("dab_dice", "iou", "hausdorff95_um", "positive_cell_f1", "cell_dice", "cell_f1"):
        assert math.isnan(metrics[name]), name


def test_a_score_without_cell_maps_and_costly_metrics_says_nothing_of_them() -> None:
    total = StainScore()
    total.add(virtual=image(slice(0, 8)), real=image(slice(0, 9)), mask=NOTHING)
    assert not {"cell_dice", "cell_f1", "hausdorff95_um", "positive_cell_f1"} & set(total.metrics())
    assert total.counts() == {}


def test_the_ignore_band_of_a_mask_does_not_count() -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[:, :32] = 255
    mask[:, 28:36] = 128
    cells = np.zeros((64, 64), np.uint8)
    cells[:, :36] = 255
    assert score(image(slice(0, 32)), image(slice(0, 32)), cells, mask)["cell_dice"] == 1


def test_optical_density_correlation_is_pooled() -> None:
    rng = np.random.default_rng(0)
    total, virtual, real = StainScore(), [], []
    for low in (20, 120):
        pair = rng.integers(low, low + 100, (2, 64, 64, 3), dtype=np.uint8)
        pair[1] = pair.mean(axis=0)
        total.add(virtual=pair[0], real=pair[1], mask=NOTHING)
        virtual.append(dab_density(pair[0]).ravel())
        real.append(dab_density(pair[1]).ravel())
    expected = np.corrcoef(np.concatenate(virtual), np.concatenate(real))[0, 1]
    assert 0 < expected < 0.99
    assert total.metrics()["od_correlation"] == pytest.approx(expected, abs=1e-6)


def test_similarities_are_those_of_whole_precision() -> None:
    rng = np.random.default_rng(0)
    total, similarity, ratio = StainScore(), [], []
    for spread in (10, 40):
        real = rng.integers(0, 200, (64, 64, 3), dtype=np.uint8)
        virtual = (real + rng.integers(0, spread, real.shape)).astype(np.uint8)
        total.add(virtual=virtual, real=real, mask=NOTHING)
        similarity.append(structural_similarity(virtual, real, channel_axis=2, data_range=255))
        ratio.append(peak_signal_noise_ratio(real, virtual, data_range=255))
    total.add(virtual=real, real=real, mask=NOTHING)  # no noise: its infinite ratio is left out
    assert total.metrics()["ssim"] == pytest.approx((sum(similarity) + 1) / 3, abs=1e-5)
    assert total.metrics()["psnr"] == pytest.approx(np.mean(ratio), abs=1e-4)


def test_blur_loses_radial_power_and_noise_gains_it() -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(100, 150, (64, 64, 1), dtype=np.uint8).repeat(3, 2)
    blurred = ((base.astype(int) + np.roll(base, 1, 0) + np.roll(base, 1, 1) + np.roll(base, -1, 0)) // 4).astype(
        np.uint8
    )
    noisy = (base + rng.integers(0, 80, (64, 64, 1))).astype(np.uint8).repeat(1, 2)
    assert radial_power(blurred) < 0.6 * radial_power(base)
    assert radial_power(noisy) > 1.5 * radial_power(base)


def test_hausdorff_of_parallel_lines_is_their_distance() -> None:
    a, b = np.zeros((2, 64, 64), bool)
    a[:, 10], b[:, 22] = True, True
    assert hausdorff95(Edges(a), Edges(b)) == 12


def test_hausdorff_of_shifted_squares_agrees_with_all_pairs_of_edge_pixels() -> None:
    a, b = np.zeros((2, 64, 64), bool)
    a[10:30, 10:30], b[15:35, 22:42] = True, True

    def edge(mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
        def outside(y: int, x: int) -> bool:
            return not mask[y, x]

        return [
            (int(y), int(x))
            for y, x in np.argwhere(mask)
            if outside(y - 1, x) or outside(y + 1, x) or outside(y, x - 1) or outside(y, x + 1)
        ]

    first, second = edge(a), edge(b)
    there = [min(math.dist(p, q) for q in second) for p in first]
    back = [min(math.dist(p, q) for p in first) for q in second]
    expected = max(np.quantile(there, 0.95), np.quantile(back, 0.95))
    assert 5 < expected < math.hypot(5, 12)
    assert hausdorff95(Edges(a), Edges(b)) == pytest.approx(expected)


def test_hausdorff_forgives_a_speck_and_is_the_mean_over_tiles_with_positives_in_both() -> None:
    total = StainScore(mpp=MPP, detail=True)
    real = image(slice(0, 32))
    specked = real.copy()
    specked[60:62, 60:62] = BROWN
    for virtual in (specked, image(slice(0, 20)), image(slice(0, 0))):
        total.add(virtual=virtual, real=real, mask=NOTHING)
    assert total.counts()["hausdorff_tiles"] == 2
    assert total.metrics()["hausdorff95_um"] == pytest.approx((0 + 12 * MPP) / 2, abs=0.01)


@pytest.mark.parametrize(("moved_um", "f1"), [(5.0, 1.0), (7.0, 2 / 3)])
def test_f1_of_three_cells_of_which_one_is_displaced(moved_um: float, f1: float) -> None:
    real = discs((30, 30), (30, 90), (90, 60))
    moved = discs((30, 30), (30, 90), (90, 60 + moved_um / MPP))
    metrics = score(painted(moved), painted(real), moved, real)
    assert metrics["cell_f1"] == pytest.approx(f1)
    assert metrics["positive_cell_f1"] == pytest.approx(f1)


def test_f1_counts_are_pooled_and_cells_on_an_empty_tile_are_false() -> None:
    total = StainScore(mpp=MPP, detail=True)
    three, one, none = discs((30, 30), (30, 90), (90, 60)), discs((64, 64)), discs()
    total.add(virtual=painted(three), real=painted(three), cells=three, mask=three)
    total.add(virtual=painted(one), real=painted(none), cells=one, mask=none)
    total.add(virtual=painted(none), real=painted(one), cells=none, mask=one)
    # 3 true, 1 false, 1 missed
    assert total.metrics()["cell_f1"] == total.metrics()["positive_cell_f1"] == pytest.approx(2 * 3 / (4 + 4))
    assert total.counts() == {"hausdorff_tiles": 1, "real_cells": 4, "image_cells": 4, "map_cells": 4}


def test_a_cell_is_matched_once_and_as_many_as_possible_are() -> None:
    line = np.array([[0.0, 0.0], [0.0, 5.0]])
    assert count_matches(line, np.array([[0.0, 1.0]])) == 1
    # Nearest first would give (0, 5) to the point at 4 and leave the other alone.
    assert count_matches(line, np.array([[0.0, 4.0], [0.0, 10.0]])) == 2
    assert count_matches(line, np.array([[0.0, 6.001 + 5]])) == 0
    assert count_matches(line, np.zeros((0, 2))) == 0


def test_cells_are_those_that_the_client_writes() -> None:
    rng = np.random.default_rng(1)
    noise = ndimage.gaussian_filter(rng.standard_normal((256, 256)), 5)
    cells = np.clip(128 + 2000 * (noise - 0.03), 0, 255).astype(np.uint8)
    expected = sorted(map(tuple, find_cells(cells, MPP).centroids))
    assert len(expected) > 20
    np.testing.assert_allclose(sorted(map(tuple, cell_centroids(cells, MPP) / MPP)), expected, atol=1e-9)


def test_touching_cells_are_two() -> None:
    assert len(cell_centroids(discs((60, 54), (60, 66), radius=7), MPP)) == 2


def test_bootstrap_is_deterministic_and_as_wide_as_the_normal_theory() -> None:
    rng = np.random.default_rng(0)
    total, similarities = StainScore(), []
    for _ in range(40):
        real = rng.integers(0, 200, (32, 32, 3), dtype=np.uint8)
        virtual = (real + rng.integers(0, rng.integers(2, 55), real.shape)).astype(np.uint8)
        total.add(virtual=virtual, real=real, mask=NOTHING[:32, :32])
        similarities.append(total.rows[-1]["ssim"])
    low, high = total.intervals()["ssim"]
    half = 1.96 * np.std(similarities) / math.sqrt(len(similarities))
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)
    assert low < total.metrics()["ssim"] < high
    assert total.intervals() == total.intervals()
    assert total.intervals(seed=1) != total.intervals()


def test_bootstrap_of_few_tiles_draws_them_all_ways() -> None:
    """Two tiles, one right and one wrong: a draw has both of them, or one of them twice."""
    total = StainScore()
    total.add(virtual=image(slice(0, 32)), real=image(slice(0, 32)), mask=NOTHING)
    total.add(virtual=image(slice(0, 32)), real=image(slice(0, 0)), mask=NOTHING)
    assert total.intervals()["dab_dice"] == (0.0, 1.0)
    # Without positives on either side there is no Dice: such draws are left out.
    total.rows[1] |= {"virtual": 0.0}
    assert total.intervals()["dab_dice"] == (1.0, 1.0)


def test_every_metric_says_what_it_is() -> None:
    assert len(set(METRIC_NAMES)) == len(METRICS)
    for metric, other in itertools.pairwise(METRICS):
        assert metric.meaning.endswith(".")
        assert metric.meaning != other.meaning
