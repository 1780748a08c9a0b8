"""Temperatures of cell maps: fitted, stored with the weights, and the same in torch and in the exported graph."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from staindiffuser.export.modules import BranchEngine
from staindiffuser.training.checkpoint import Checkpoint, CheckpointConfig
from staindiffuser.training.config import PRESETS, StainConfig
from staindiffuser.training.errors import CheckpointError, ConfigError, DataError
from staindiffuser.training.evaluation.calibration import CellValues, calibrate
from staindiffuser.training.evaluation.cell_scores import calibration_error
from staindiffuser.training.infer import stain_tiles
from staindiffuser.training.model.network import DualDiffusion, tempered
from staindiffuser.training.tiles.paired_tiles import PairedTiles
from staindiffuser.triton_models.noise.philox import tile_noise


def model() -> DualDiffusion:
    torch.manual_seed(3)
    config = dataclasses.replace(PRESETS["debug"].model, stains=(StainConfig(name="cd3", label="CD3", cells_mean=0.8),))
    return DualDiffusion(config).eval().requires_grad_(False)


def test_one_half_and_certainty_stay_what_they_are() -> None:
    values = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    for temperature in (0.2, 1.0, 5.0):
        assert torch.equal(tempered(values, temperature), values)
    assert float(tempered(torch.tensor(0.9), 2.0)) == pytest.approx(1 / (1 + np.exp(-np.log(9) / 2)), rel=1e-6)


def test_the_temperature_that_labels_were_drawn_with_is_found() -> None:
    """400 nuclei a tile whose map is twice as sure as it may be: T = 2."""
    rng = np.random.default_rng(0)
    values = CellValues()
    labels = np.repeat(np.repeat(np.arange(1, 401, dtype=np.int32).reshape(20, 20), 4, axis=0), 4, axis=1)
    for _ in range(8):
        said = rng.uniform(0.02, 0.98, 400)
        true = rng.random(400) < tempered(torch.from_numpy(said), 2.0).numpy()
        cells = np.rint(255 * said)[labels - 1].astype(np.uint8)
        values.add(labels, cells, np.where(true, 255, 0)[labels - 1].astype(np.uint8))
    temperature = values.temperature()
    assert temperature == pytest.approx(2, rel=0.1)
    before, after = (calibration_error(values.truth, values.probabilities(t)) for t in (1.0, temperature))
    assert after < 0.03 < 0.05 < before


def test_too_few_cells_leave_the_map_as_it_is() -> None:
    values = CellValues()
    values.add(np.ones((4, 4), np.int32), np.full((4, 4), 200, np.uint8), np.zeros((4, 4), np.uint8))
    assert values.temperature() == 1
    assert CellValues().temperature() == 1


def test_temperatures_are_kept_with_the_weights(tmp_path: Path) -> None:
    network = model()
    config = CheckpointConfig(name="x", model=network.config, notice="n", temperatures={"cd3": 1.7})
    Checkpoint(config=config, network=network).save(tmp_path)
    loaded = Checkpoint.load(tmp_path)
    assert loaded.network.temperatures == {"cd3": 1.7}
    with pytest.raises(ConfigError, match="temperatures"):
        dataclasses.replace(config, temperatures={"ki67": 1.7})
    text = (tmp_path / "config.json").read_text(encoding="utf-8")
    (tmp_path / "config.json").write_text(text.replace("1.7", "-1"), encoding="utf-8")
    with pytest.raises(CheckpointError, match="temperatures"):
        Checkpoint.load(tmp_path)


def test_the_engine_has_the_temperature_in_it() -> None:
    network = model()
    he = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    place: dict[str, Any] = {"seeds": np.zeros((1, 1), np.int64), "origins": np.zeros((1, 2), np.int64)}
    plain = stain_tiles(network, he, sigmas=[80.0], **place)
    network.temperatures = {"cd3": 2.5}
    found = stain_tiles(network, he, sigmas=[80.0], **place)
    assert np.array_equal(found["STAIN_CD3"], plain["STAIN_CD3"])
    wanted = 255 * tempered(torch.from_numpy(plain["CELLS_CD3"]).double() / 255, 2.5).numpy()
    assert np.abs(found["CELLS_CD3"] - wanted).max() < 3  # of rounding before and after
    assert np.abs(found["CELLS_CD3"].astype(int) - plain["CELLS_CD3"]).max() > 10
    _, noise = tile_noise(place["seeds"], place["origins"], steps=1, height=64, width=64)
    features = network.encoder(torch.tensor(he).float().permute(0, 3, 1, 2) / 127.5 - 1)
    engine = BranchEngine(network, "cells", network.config.stains[0], [network.config.sigma_max]).eval()
    with torch.inference_mode():
        served = engine(*features, torch.from_numpy(noise)).numpy()
    assert np.abs(served.astype(int) - found["CELLS_CD3"]).max() <= 1


def test_a_threshold_goes_only_with_the_map_that_it_was_chosen_on(
    tiny_checkpoint: Path, tiles_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two stains with a temperature and a threshold, only one gets another temperature."""
    start = Checkpoint.load(tiny_checkpoint)
    before = {"cd3": 1.7, "ck818": 1.2}
    config = dataclasses.replace(start.config, temperatures=before, thresholds={"cd3": 0.3, "ck818": 0.4})
    numbers = dict.fromkeys(("f1_at_half", "candidate", "f1_at_candidate", "best", "f1_at_best"), 0.5)
    chosen = {
        stain: {"threshold": threshold, **numbers, "gain_95": None} for stain, threshold in config.thresholds.items()
    }
    metrics = {"thresholds": {"split": "val", "tiles": 9, "stains": chosen}}
    folder, tiles = tmp_path / "checkpoint", PairedTiles.load(tiles_folder)
    dataclasses.replace(start, config=config, metrics=metrics).save(folder)
    fitted = iter((1.7, 2.5, 1.0, 1.0))
    monkeypatch.setattr(CellValues, "temperature", lambda self, before: next(fitted))
    calibrate(folder, tiles, limit=1)
    found = Checkpoint.load(folder)
    assert found.config.temperatures == {"cd3": 1.7, "ck818": 2.5}
    assert found.config.thresholds == {"cd3": 0.3}
    assert found.metrics["thresholds"] == {"split": "val", "tiles": 9, "stains": {"cd3": chosen["cd3"]}}
    calibrate(folder, tiles, limit=1)
    found = Checkpoint.load(folder)
    assert (found.config.temperatures, found.config.thresholds) == ({}, {})
    assert list(found.metrics) == ["calibration"]


def test_tiles_without_a_stain_are_refused(tiny_checkpoint: Path, tiles_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    tiles = dataclasses.replace(PairedTiles.load(tiles_folder), stains=("cd3",))
    with pytest.raises(DataError, match="no column 'ck818', which the model was trained for"):
        calibrate(tmp_path / "checkpoint", tiles)


def test_too_few_cells_leave_the_temperature_as_it_was(
    tiny_checkpoint: Path, tiles_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, folder = Checkpoint.load(tiny_checkpoint), tmp_path / "checkpoint"
    config = dataclasses.replace(start.config, temperatures={"cd3": 1.7}, thresholds={"cd3": 0.3})
    dataclasses.replace(start, config=config).save(folder)
    monkeypatch.setattr("staindiffuser.training.evaluation.calibration.FEWEST", 10**6)
    calibrate(folder, PairedTiles.load(tiles_folder), limit=1)
    found = Checkpoint.load(folder).config
    assert (found.temperatures, found.thresholds) == ({"cd3": 1.7}, {"cd3": 0.3})
