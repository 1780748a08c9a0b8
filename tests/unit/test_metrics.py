"""Metrics on pictures whose scores are known."""

import numpy as np
import pytest

from staindiffuser.training.metrics import METRIC_NAMES, StainScore, radial_power

BROWN, PALE = (120, 75, 45), (225, 225, 235)


def picture(columns: slice) -> np.ndarray:
    image = np.full((64, 64, 3), PALE, np.uint8)
    image[:, columns] = BROWN
    return image


def score(virtual: np.ndarray, real: np.ndarray, cells: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    total = StainScore()
    total.add(virtual=virtual, real=real, cells=cells, mask=mask)
    return total.metrics()


def test_perfect_stain() -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[:, :32] = 255
    metrics = score(picture(slice(0, 32)), picture(slice(0, 32)), mask, mask)
    assert set(metrics) == set(METRIC_NAMES)
    assert metrics["dab_dice"] == metrics["cell_dice"] == 1
    assert metrics["od_correlation"] == pytest.approx(1)
    assert metrics["radial_power"] == pytest.approx(1)
    assert metrics["ssim"] == pytest.approx(1)
    assert metrics["positive_area_error"] == 0


def test_half_of_the_positive_area() -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[:, :32] = 255
    metrics = score(picture(slice(0, 16)), picture(slice(0, 32)), np.where(mask > 0, 0, 255).astype(np.uint8), mask)
    assert metrics["dab_dice"] == pytest.approx(2 / 3, abs=0.03)
    assert metrics["positive_area_error"] == pytest.approx(-0.5, abs=0.05)
    assert metrics["cell_dice"] == 0


def test_dice_is_pooled_over_pixels_not_averaged_over_tiles() -> None:
    total = StainScore()
    empty, mask = picture(slice(0, 0)), np.zeros((64, 64), np.uint8)
    total.add(virtual=picture(slice(0, 32)), real=picture(slice(0, 32)), cells=mask, mask=mask)
    total.add(virtual=picture(slice(0, 4)), real=empty, cells=mask, mask=mask)
    assert total.tile_dice == [1.0, 0.0]
    assert total.metrics()["dab_dice"] == pytest.approx(64 / (64 + 5), abs=0.02)


def test_the_ignore_band_of_a_mask_does_not_count() -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[:, :32] = 255
    mask[:, 28:36] = 128
    cells = np.zeros((64, 64), np.uint8)
    cells[:, :36] = 255
    assert score(picture(slice(0, 32)), picture(slice(0, 32)), cells, mask)["cell_dice"] == 1


def test_blur_loses_radial_power_and_noise_gains_it() -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(100, 150, (64, 64, 1), dtype=np.uint8).repeat(3, 2)
    blurred = ((base.astype(int) + np.roll(base, 1, 0) + np.roll(base, 1, 1) + np.roll(base, -1, 0)) // 4).astype(
        np.uint8
    )
    noisy = (base + rng.integers(0, 80, (64, 64, 1))).astype(np.uint8).repeat(1, 2)
    assert radial_power(blurred) < 0.6 * radial_power(base)
    assert radial_power(noisy) > 1.5 * radial_power(base)
