"""Thresholds of cell maps: chosen on validation cells, kept with the weights, and used by whoever says positive."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from staindiffuser.export.wire import contract_parameters
from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.instances import find_cells, lowest_grey
from staindiffuser.training.checkpoint import Checkpoint, CheckpointConfig
from staindiffuser.training.config import PRESETS, StainConfig
from staindiffuser.training.errors import CheckpointError, ConfigError
from staindiffuser.training.evaluation.cell_scores import CellScore
from staindiffuser.training.evaluation.thresholds import best_threshold, choose_thresholds
from staindiffuser.training.model.network import DualDiffusion
from staindiffuser.training.tiles.paired_tiles import PairedTiles
from tests.synthetic_graphs import write_graphs


def score(*slides: tuple[float, int], seed: int = 0) -> CellScore:
    """Slides of cells whose probability is right, all divided by a number: (number, cells)."""
    rng, found = np.random.default_rng(seed), CellScore()
    for number, (divisor, count) in enumerate(slides):
        said = rng.beta(0.5, 0.5, count)
        found.slides.append(str(number))
        found.tiles.append({"truth": (rng.random(count) < said).astype(float), "map": said / divisor})
        found.tiles[-1] |= {name: np.zeros(count) for name in ("image", "hematoxylin", "eosin")}
    return found


def test_one_half_is_128_of_255() -> None:
    assert lowest_grey(0.5) == 128
    assert lowest_grey(0.2) == 51


def test_a_map_that_says_half_of_the_truth_gets_half_of_the_threshold() -> None:
    honest, shy = (best_threshold(score(*[(divisor, 2000)] * 4)) for divisor in (1.0, 2.0))
    assert honest.f1_at_best is not None
    assert shy.f1_at_half is not None
    assert shy.f1_at_best is not None
    # Of calibrated probabilities, half of the F1.
    assert honest.best == pytest.approx(honest.f1_at_best / 2, abs=0.06)
    assert shy.best == pytest.approx(honest.best / 2, abs=0.03)
    assert shy.best <= shy.threshold == shy.candidate < 0.4
    assert shy.f1_at_candidate is not None
    assert shy.f1_at_best >= shy.f1_at_candidate >= shy.f1_at_best - 0.01
    assert shy.f1_at_half < 0.05 < 0.7 < shy.f1_at_best


def test_one_half_stays_where_slides_disagree_or_cells_are_few() -> None:
    """What is best on one slide must also help the others."""
    torn = score((1.0, 200), (1.0, 200))
    for tile, (negative, positive) in zip(torn.tiles, ((0.1, 0.3), (0.6, 0.9)), strict=True):
        tile["truth"] = np.arange(200) % 2.0
        tile["map"] = np.where(tile["truth"] > 0, positive, negative)
    found = best_threshold(torn)
    assert found.threshold == 0.5 != found.best
    assert found.gain_95 is not None
    assert found.gain_95[0] <= 0 < found.gain_95[1]
    for few in (score((2.0, 2000)), score((2.0, 20), (2.0, 20)), CellScore()):
        found = best_threshold(few)
        assert (found.threshold, found.gain_95) == (0.5, None)


def test_a_stain_that_cannot_be_judged_keeps_its_threshold(
    tiny_checkpoint: Path, tiles_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for few in (score((2.0, 2000)), score((2.0, 20), (2.0, 20)), CellScore()):
        found = best_threshold(dataclasses.replace(few, threshold=0.3))
        assert (found.threshold, found.kept) == (0.3, True)
    judged = best_threshold(dataclasses.replace(score(*[(2.0, 2000)] * 4), threshold=0.7))
    assert judged.threshold < 0.4
    assert not judged.kept

    start = Checkpoint.load(tiny_checkpoint)
    config = dataclasses.replace(start.config, thresholds={"cd3": 0.3})
    dataclasses.replace(start, config=config).save(tmp_path)
    choose_thresholds(tmp_path, PairedTiles.load(tiles_folder), limit=1)
    after = Checkpoint.load(tmp_path)
    assert after.config.thresholds == {"cd3": 0.3}
    assert after.metrics["thresholds"]["stains"]["cd3"]["kept"]
    assert "cd3: too few cells or slides to choose by; its threshold stays 0.3\n" in capsys.readouterr().err


def test_thresholds_are_kept_with_the_weights(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = dataclasses.replace(PRESETS["debug"].model, stains=(StainConfig(name="cd3", label="CD3"),))
    config = CheckpointConfig(name="x", model=model, notice="n", thresholds={"cd3": 0.23})
    Checkpoint(config=config, network=DualDiffusion(model).eval()).save(tmp_path)
    assert Checkpoint.load(tmp_path).config.thresholds == {"cd3": 0.23}
    for wrong in ({"ki67": 0.4}, {"cd3": 1.0}):
        with pytest.raises(ConfigError, match="thresholds"):
            dataclasses.replace(config, thresholds=wrong)
    text = (tmp_path / "config.json").read_text(encoding="utf-8")
    (tmp_path / "config.json").write_text(text.replace("0.23", "-1"), encoding="utf-8")
    with pytest.raises(CheckpointError, match="thresholds"):
        Checkpoint.load(tmp_path)


def test_they_are_on_the_wire_only_where_there_are_any(tmp_path: Path) -> None:
    graphs = write_graphs(tmp_path / "graphs")
    assert "thresholds" not in contract_parameters(graphs, "x")
    told = dataclasses.replace(graphs, thresholds={"cd3": 0.23})
    assert contract_parameters(told, "x")["thresholds"] == '{"cd3": 0.23}'
    assert told.model_version == graphs.model_version  # no pixel changes


def test_cells_begin_at_the_threshold() -> None:
    cells: UInt8Array = np.zeros((60, 60), np.uint8)
    cells[10:22, 10:22], cells[35:47, 35:47] = 70, 200
    assert [len(find_cells(cells, 0.5, threshold=t)) for t in (0.2, 0.5, 0.9)] == [2, 1, 0]
