"""Scores per cell against scikit-learn-like closed forms, and on tissue whose positive cells are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.optical_density import HE_MATRIX, STAIN_MATRIX, dab_mask
from staindiffuser.training.evaluation.cell_scores import (
    CELL_METRICS,
    CellScore,
    auroc,
    calibration_error,
    measure_nuclei,
    reliability,
)

SIDE, APART = 192, 32


def drawn(density: NDArray[np.float64], vector: NDArray[np.float64]) -> UInt8Array:
    image: UInt8Array = np.clip(np.rint(256 * 10.0 ** -(density[..., None] * vector) - 1), 0, 255).astype(np.uint8)
    return image


def discs(chosen: NDArray[np.bool_], radius: float) -> NDArray[np.bool_]:
    """Discs on a grid where ``chosen`` [5, 5] is true: bool [SIDE, SIDE]."""
    y, x = np.mgrid[:SIDE, :SIDE]
    image = np.zeros((SIDE, SIDE), bool)
    for row, column in np.argwhere(chosen):
        image |= np.hypot(y - APART * (row + 1), x - APART * (column + 1)) <= radius
    return image


@pytest.fixture
def tile() -> dict[str, UInt8Array]:
    """25 nuclei, 10 of them positive; the virtual stain finds eight of these and two of the others."""
    rng = np.random.default_rng(1)
    order = rng.permutation(25)
    truth, called = np.zeros(25, bool), np.zeros(25, bool)
    truth[order[:10]] = True
    called[order[2:12]] = True
    truth, called = truth.reshape(5, 5), called.reshape(5, 5)
    return {
        "he": drawn(0.7 * discs(np.ones((5, 5), bool), 6), HE_MATRIX[0]),
        "real": drawn(0.6 * discs(truth, 8), STAIN_MATRIX[1]),
        "mask": np.where(discs(truth, 9), np.uint8(255), np.uint8(0)),
        "virtual": drawn(0.6 * discs(called, 8), STAIN_MATRIX[1]),
        "cells": np.where(discs(called, 9), np.uint8(204), np.uint8(0)),
    }


def test_cells_are_counted_by_their_nuclei_in_the_he(tile: dict[str, UInt8Array]) -> None:
    found = measure_nuclei(tile["he"], 0.5)
    assert found.nuclei.max() == 25
    np.testing.assert_allclose(found.hematoxylin, found.hematoxylin[0], rtol=0.05)
    score = CellScore()
    for slide in ("a", "b"):
        score.add(slide, found, **{name: tile[name] for name in ("real", "mask", "virtual", "cells")})
    assert score.counts() == {"cells": 50, "positive_cells": 20, "slides": 2}
    metrics = score.metrics()
    assert set(metrics) == set(CELL_METRICS)
    assert metrics["map_f1"] == pytest.approx(0.8)  # 8 of 10 found, 2 of 10 wrong
    # 8 of 10 positive ones score high and 2 low; 2 of 15 negative ones high and 13 low; ties count half.
    assert metrics["map_auroc"] == pytest.approx((8 * 13 + 0.5 * (8 * 2 + 2 * 13)) / 150, abs=0.02)
    assert metrics["image_auroc"] == pytest.approx(metrics["map_auroc"], abs=0.03)
    # Called cells are positive in 0.8 of the cases, as the map says; of the others 2 in 15 are.
    assert metrics["calibration_error"] == pytest.approx(15 / 25 * 2 / 15, abs=0.01)
    assert metrics["area_bias"] == pytest.approx(0, abs=1e-6)
    real = dab_mask(tile["real"]).mean()
    assert metrics["all_positive_dice"] == pytest.approx(2 * real / (1 + real))
    assert score.passes()
    np.testing.assert_allclose(score.intervals(samples=5)["map_f1"], 0.8)


def test_a_map_that_knows_no_more_than_hematoxylin_does_not_pass(tile: dict[str, UInt8Array]) -> None:
    score = CellScore()
    images = {name: tile[name] for name in ("real", "mask", "virtual")}
    score.add("a", measure_nuclei(tile["he"], 0.5), cells=np.full((SIDE, SIDE), 90, np.uint8), **images)
    assert score.metrics()["map_auroc"] == pytest.approx(0.5)
    assert not score.passes()


def test_a_set_without_positive_cells_is_undefined_and_does_not_pass(tile: dict[str, UInt8Array]) -> None:
    score = CellScore()
    assert math.isnan(score.metrics()["map_auroc"])
    empty = np.zeros((SIDE, SIDE), np.uint8)
    images = {name: tile[name] for name in ("real", "virtual", "cells")}
    score.add("a", measure_nuclei(tile["he"], 0.5), mask=empty, **images)
    assert math.isnan(score.metrics()["map_auroc"])
    assert math.isnan(score.metrics()["map_best_f1"])
    assert not score.passes()
    assert score.intervals() == {}  # one slide says nothing about others


def test_glass_holds_no_nuclei() -> None:
    found = measure_nuclei(np.full((64, 64, 3), 243, np.uint8), 0.5)
    assert found.nuclei.max() == 0
    assert found.hematoxylin.shape == (0,)


def test_auroc_is_the_chance_that_a_positive_scores_higher() -> None:
    rng = np.random.default_rng(0)
    truth = (rng.random(300) < 0.3).astype(np.float64)
    score = np.round(rng.random(300) + 0.3 * truth, 1).astype(np.float64)
    pairs = score[truth > 0][:, None] - score[truth == 0][None]
    assert auroc(truth, score) == pytest.approx((pairs > 0).mean() + 0.5 * (pairs == 0).mean())


def test_calibration_is_the_distance_from_what_is_said_to_what_is() -> None:
    truth = np.array([1.0, 0, 0, 0, 1, 1, 1, 1])
    said = np.array([0.25, 0.25, 0.25, 0.25, 0.95, 0.95, 0.95, 0.95])
    np.testing.assert_allclose(reliability(truth, said), [(0.25, 0.25, 4), (0.95, 1.0, 4)])
    assert calibration_error(truth, said) == pytest.approx(0.025)
    assert math.isnan(calibration_error(np.zeros(0), np.zeros(0)))
