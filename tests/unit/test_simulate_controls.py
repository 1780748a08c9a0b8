"""The controls of the simulator, in small; the report computes them in full."""

from pathlib import Path

import numpy as np
import pytest

from staindiffuser.training.simulate.controls import (
    MEASURES,
    PooledDice,
    colour_forest,
    measure,
    oracle_ceiling,
    real_fields,
    simulated_fields,
)
from staindiffuser.training.simulate.report import CEILING_OF_COLOUR, main


def test_dice_is_pooled() -> None:
    dice = PooledDice()
    assert dice.value == 1
    dice.add(np.array([True, True, False]), np.array([True, False, False]))
    dice.add(np.array([False, False, False]), np.array([False, True, True]))
    assert dice.value == 2 * 1 / (2 + 1 + 2)


def test_colour_alone_fails() -> None:
    """A small forest; the report's is larger and no better than its limits allow."""
    for stain, dice in colour_forest(train=50, val=20, test=30, per_tile=250, trees=30, jobs=1).items():
        assert dice <= CEILING_OF_COLOUR[stain], stain


def test_context_is_needed_and_enough() -> None:
    oracle, every = oracle_ceiling(tiles=30), oracle_ceiling(tiles=30, rule="lymphocytes")
    assert oracle["ck818"] == 1.0
    assert 0.9 < oracle["cd3"] < 1.0
    assert every["cd3"] < oracle["cd3"] - 0.08, "calling every lymphocyte a T cell must cost something"


def test_simulated_fields_lie_among_the_real(real_data: Path) -> None:
    real = [values for field in real_fields(real_data) if (values := measure(field.image))]
    ours = [values for image in simulated_fields(40) if (values := measure(image))]
    for name in MEASURES:
        low, high = np.percentile([values[name] for values in real], [5, 95])
        made = np.array([values[name] for values in ours])
        assert low <= np.median(made) <= high, name
        assert np.mean((made >= low) & (made <= high)) > 0.75, name


def test_measures_of_known_nuclei() -> None:
    """Nine round nuclei of 40 µm² on pink."""
    y, x = np.mgrid[:144, :144]
    image = np.full((144, 144, 3), (230, 170, 200), np.uint8)
    for cy in (24, 72, 120):
        for cx in (24, 72, 120):
            image[np.hypot(y - cy, x - cx) < 7.14] = (90, 70, 150)
    values = measure(image)
    assert values is not None
    assert values["nuclear_area"] == pytest.approx(40, rel=0.15)
    assert values["nuclei_per_mm2"] == pytest.approx(9 / (0.072**2), rel=0.02)
    assert measure(np.full((144, 144, 3), 245, np.uint8)) is None


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_full_report(tmp_path: Path, real_data: Path) -> None:
    assert main(["--output", str(tmp_path), "--real", str(real_data)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "controls.json", "controls.md", "pairs.jpg", "real-and-simulated.jpg", "statistics.png",
    }  # fmt: skip
