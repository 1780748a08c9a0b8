"""The training run end to end on the debug preset: it learns, resumes exactly, refuses bad data before it starts."""

from __future__ import annotations

import csv
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from staindiffuser.training.checkpoint import Checkpoint
from staindiffuser.training.config import PRESETS, Preset, TrainConfig
from staindiffuser.training.curves import draw_curves, read_curves
from staindiffuser.training.data.pairs import PairedTiles
from staindiffuser.training.errors import DataError
from staindiffuser.training.evaluate import evaluate
from staindiffuser.training.loop import RunOptions, train
from staindiffuser.training.module import DivergedError, TeacherModule, learning_rate

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def preset(steps: int, **changes: float) -> Preset:
    base = PRESETS["debug"]
    recipe = dataclasses.replace(
        base.train, steps=steps, crop=32, batch=4, warmup=2, cooldown=0.0, validate_every=10, validation_tiles=2
    )
    return dataclasses.replace(base, train=dataclasses.replace(recipe, **changes))  # type: ignore[arg-type]


def options(folder: Path) -> RunOptions:
    return RunOptions(output=folder, name="test", progress=False)


def test_training_learns_and_its_checkpoint_can_be_scored(tiles_folder: Path, tmp_path: Path) -> None:
    folder = train(preset(40), tiles_folder, options(tmp_path))
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]
    assert losses[-1] < losses[0]
    checkpoint = Checkpoint.load(folder)
    assert 0 < checkpoint.config.receptive_radius < 200
    assert checkpoint.config.provenance["speed"]["crops_per_second"] > 0
    draw_curves(tmp_path, tmp_path / "curves.png")
    assert set(read_curves(tmp_path)) >= {"loss", "error/pictures-cd3", "val/dab_dice/cd3"}
    assert (tmp_path / "curves.png").stat().st_size > 1000
    scores = evaluate(checkpoint, PairedTiles.load(tiles_folder), steps=2).summary()
    assert scores["tiles"] == 4
    assert set(scores["stains"]) == {"cd3", "ck818"}


def test_interrupted_run_goes_on_as_if_nothing_had_happened(
    tiles_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Checkpoint.load(train(preset(6), tiles_folder, options(tmp_path / "whole")))
    step = TeacherModule.training_step

    def killed(module: TeacherModule, batch: dict[str, Any], index: int) -> torch.Tensor:
        if module.global_step == 3:
            raise KeyboardInterrupt
        return step(module, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(TeacherModule, "training_step", killed)
        with pytest.raises(KeyboardInterrupt):
            train(preset(6), tiles_folder, options(tmp_path / "parts"))
    assert not (tmp_path / "parts" / "checkpoint").exists()
    parts = Checkpoint.load(train(preset(6), tiles_folder, options(tmp_path / "parts")))
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, parts.network.state_dict()[name]), name


def test_diverging_loss_stops_the_run_and_keeps_the_batch(
    tiles_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "isfinite", lambda value: torch.zeros((), dtype=torch.bool))
    with pytest.raises(DivergedError, match="not finite at step 0"):
        train(preset(5), tiles_folder, options(tmp_path))
    assert "he" in torch.load(tmp_path / "diverged-batch.pt")["batch"]


def test_learning_rate_warms_up_and_cools_down() -> None:
    config = TrainConfig(steps=100, warmup=10, cooldown=0.5)
    rates = [learning_rate(step, config) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10:50] == [1.0] * 40
    assert rates[75] == pytest.approx(0.5)
    assert rates[100] == 0


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda text: text.replace(",val,", ",train,"), "no rows with split 'val'"),
        (lambda text: text.replace(",0.5\n", ",0.25\n"), "mpp is 0.25, the model's is 0.5"),
        (lambda text: text.replace("s2,val", "s0,val"), "slide 's0'"),
    ],
)
def test_unusable_data_is_refused_before_training(tiles_folder: Path, tmp_path: Path, edit, message: str) -> None:
    folder = tmp_path / "tiles"
    shutil.copytree(tiles_folder, folder)
    path = folder / "tiles.csv"
    path.write_text(edit(path.read_text()))
    with pytest.raises(DataError, match=message):
        train(preset(5), folder, options(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_crop_larger_than_the_tiles_is_refused(tiles_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="smaller than the crop of 128"):
        train(preset(5, crop=128), tiles_folder, options(tmp_path))


def test_dry_run_checks_every_pixel_and_trains_nothing(tiles_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiles"
    shutil.copytree(tiles_folder, folder)
    picture = folder / "he" / "t00.png"
    asked = dataclasses.replace(options(tmp_path / "run"), dry_run=True)
    train(preset(5), folder, asked)
    picture.write_bytes(picture.read_bytes()[:200])
    with pytest.raises(DataError, match=r"row 2: he: .*t00\.png cannot be read"):
        train(preset(5), folder, asked)
    assert not (tmp_path / "run").exists()
