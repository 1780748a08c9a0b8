"""The search for the student's σ."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from staindiffuser.training.checkpoint import Checkpoint
from staindiffuser.training.distill.sigma_search import FewTiles, QuickScore, coordinate_search, merit, search_sigmas
from staindiffuser.training.evaluation.evaluate import evaluate_tiles
from staindiffuser.training.tiles.paired_tiles import PairedTiles


def test_coordinate_search_finds_the_peak_of_a_known_function() -> None:
    peak = (80.0, 10.7, 2.1, 0.707)

    def objective(sigmas: tuple[float, ...]) -> float:
        return -sum(math.log(a / b) ** 2 for a, b in zip(sigmas, peak, strict=True))

    found = coordinate_search(objective, [(80.0, 21.4, 4.2, 0.5)])
    assert found.sigmas == pytest.approx(peak, rel=0.01)
    assert found.value == found.trials[found.sigmas] == max(found.trials.values())
    assert len(found.trials) < 40


def test_search_takes_the_best_start_and_asks_nothing_twice() -> None:
    asked: list[tuple[float, ...]] = []

    def objective(sigmas: tuple[float, ...]) -> float:
        asked.append(sigmas)
        return -abs(math.log(sigmas[1] / 0.6))

    found = coordinate_search(objective, [(80.0, s) for s in (0.1, 0.4, 1.6, 6.4)], factors=[2**0.5])
    assert found.sigmas == pytest.approx((80.0, 0.5656), abs=1e-3)
    assert len(asked) == len(set(asked))


def test_search_keeps_the_levels_in_order() -> None:
    found = coordinate_search(lambda sigmas: sigmas[1] - 100 * sigmas[2], [(8.0, 4.0, 0.5)], rounds=9)
    assert all(list(sigmas) == sorted(set(sigmas), reverse=True) for sigmas in found.trials)
    assert found.sigmas[1] > 4
    assert found.sigmas[2] < 0.1


def test_merit_counts_power_outside_the_gate_against_dice() -> None:
    assert merit({"a": QuickScore(dab_dice=0.8, radial_power=1.1)}) == pytest.approx(0.8)
    assert merit({"a": QuickScore(dab_dice=0.8, radial_power=0.5)}) == pytest.approx(0.8 - 0.35)
    both = {"a": QuickScore(dab_dice=0.8, radial_power=1.0), "b": QuickScore(dab_dice=0.4, radial_power=1.35)}
    assert merit(both) == pytest.approx((0.8 + 0.4 - 0.2) / 2)


def test_quick_scores_are_those_of_the_evaluation(tiny_checkpoint: Path, tiles_folder: Path) -> None:
    network = Checkpoint.load(tiny_checkpoint).network
    rows = PairedTiles.load(tiles_folder).split("val")[:3]
    tiles = FewTiles(network, rows, seed=5)
    for sigmas in ((80.0,), (80.0, 2.0)):
        slow = evaluate_tiles(network, rows, sigmas=sigmas, seed=5)
        for stain, quick in tiles.score(network, sigmas).items():
            expected = slow[stain].metrics()
            assert quick.dab_dice == pytest.approx(expected["dab_dice"], abs=1e-3)
            assert quick.radial_power == pytest.approx(expected["radial_power"], rel=1e-3)


def test_search_of_a_network_covers_each_number_of_steps(tiny_checkpoint: Path, tiles_folder: Path) -> None:
    network = Checkpoint.load(tiny_checkpoint).network
    found = search_sigmas(network, FewTiles(network, PairedTiles.load(tiles_folder).split("val")[:1]), steps=(1, 2))
    assert found[1].sigmas == (80.0,)
    assert len(found[2].sigmas) == 2
    assert len(found[2].trials) >= 9
