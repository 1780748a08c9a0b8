"""The training run end to end on the debug preset: it learns, resumes exactly, refuses bad data before it starts."""

from __future__ import annotations

import csv
import dataclasses
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from staindiffuser.errors import UsageError
from staindiffuser.imaging.image_files import read_image
from staindiffuser.training.checkpoint import Checkpoint
from staindiffuser.training.config import PRESETS, ModelConfig, Preset, TrainConfig
from staindiffuser.training.curves import read_curves
from staindiffuser.training.data.dataset import CropBatch, CropDataset
from staindiffuser.training.errors import DataError, DivergedError
from staindiffuser.training.evaluation.evaluate import evaluate
from staindiffuser.training.learner import Loss, learning_rate
from staindiffuser.training.loop import fit
from staindiffuser.training.model.layers import normalize_weight_
from staindiffuser.training.model.subpixel import phase_errors
from staindiffuser.training.options import RunOptions
from staindiffuser.training.processes import Processes
from staindiffuser.training.snapshots import find_snapshot, read_snapshot
from staindiffuser.training.teacher import Teacher
from staindiffuser.training.tiles.paired_tiles import PairedTiles
from staindiffuser.training.train import train


def preset(steps: int, **changes: Any) -> Preset:
    base = PRESETS["debug"]
    recipe = dataclasses.replace(
        base.train, steps=steps, crop=32, batch=4, warmup=2, cooldown=0.0, validate_every=10, validation_tiles=2
    )
    return dataclasses.replace(base, train=dataclasses.replace(recipe, **changes))


def options(folder: Path) -> RunOptions:
    return RunOptions(output=folder, name="test", progress="none")


def test_training_learns_and_its_checkpoint_can_be_scored(tiles_folder: Path, tmp_path: Path) -> None:
    folder = train(preset(40), tiles_folder, options(tmp_path))
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]
    assert losses[-1] < losses[0]
    checkpoint = Checkpoint.load(folder)
    assert 0 < checkpoint.config.receptive_radius < 200
    assert checkpoint.config.provenance["speed"]["crops_per_second"] > 0
    assert set(read_curves(tmp_path)) >= {"loss", "error/images-cd3", "val/dab_dice/cd3"}
    assert "(curves.png)" in (folder / "MODEL_CARD.md").read_text()
    assert (folder / "curves.png").stat().st_size > 1000
    scores = evaluate(checkpoint, PairedTiles.load(tiles_folder), steps=2).summary()
    assert scores["tiles"] == 4
    assert set(scores["stains"]) == {"cd3", "ck818"}


def stopped_at(step: int, monkeypatch: pytest.MonkeyPatch, how: Callable[[], None]) -> None:
    """From now on ``how`` happens in the training step number ``step``."""
    real = Teacher.forward

    def forward(teacher: Teacher, batch: CropBatch, number: int) -> Loss:
        if number == step:
            how()
        return real(teacher, batch, number)

    monkeypatch.setattr(Teacher, "forward", forward)


def lost() -> None:
    raise RuntimeError("lost")


@pytest.mark.parametrize(
    ("error", "how", "kept"),
    [(RuntimeError, lost, 2), (KeyboardInterrupt, lambda: signal.raise_signal(signal.SIGTERM), 4)],
    ids=["lost between snapshots", "asked to stop"],
)
def test_interrupted_run_goes_on_as_if_nothing_had_happened(
    tiles_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
    how: Callable[[], None],
    kept: int,
) -> None:
    recipe = preset(7, checkpoint_steps=2, gradient_accumulation=2)
    every_step = dataclasses.replace(options(tmp_path / "whole"), log_every=1)
    whole = Checkpoint.load(train(recipe, tiles_folder, every_step))
    every_step = dataclasses.replace(every_step, output=tmp_path / "parts")
    with monkeypatch.context() as patch:
        stopped_at(3, patch, how)
        with pytest.raises(error):
            train(recipe, tiles_folder, every_step)
    assert not (tmp_path / "parts" / "checkpoint").exists()
    snapshot = tmp_path / "parts" / "snapshots" / "last.ckpt"
    assert torch.load(snapshot, weights_only=True)["step"] == kept
    parts = Checkpoint.load(train(recipe, tiles_folder, every_step))
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, parts.network.state_dict()[name]), name
    for name, (steps, values) in read_curves(tmp_path / "whole").items():
        if not name.startswith("speed/"):
            again = read_curves(tmp_path / "parts")[name]
            np.testing.assert_array_equal(again[0], steps)
            np.testing.assert_array_equal(again[1], values)
    train(recipe, tiles_folder, every_step)  # a finished run stays finished, and keeps its curves
    assert len(read_curves(tmp_path / "parts")["loss"][0]) == 7


def test_what_a_run_goes_on_from_is_chosen(tiles_folder: Path, tmp_path: Path) -> None:
    first = dataclasses.replace(options(tmp_path / "first"), log_every=1)
    train(preset(2), tiles_folder, first)
    last = first.output / "snapshots" / "last.ckpt"
    with pytest.raises(UsageError, match="holds a run already"):
        train(preset(3), tiles_folder, dataclasses.replace(first, resume=False))
    curves = (first.output / "csv" / "metrics.csv").read_text()
    with pytest.raises(UsageError, match=r"begun with learning_rate = 0\.01, not 0\.001.*another --output"):
        train(preset(2, learning_rate=1e-3), tiles_folder, first)
    with pytest.raises(UsageError, match="begun with steps = 2, not 3"):
        train(preset(3), tiles_folder, first)
    assert (first.output / "csv" / "metrics.csv").read_text() == curves  # who is refused leaves the run as it was
    train(preset(2, gradient_accumulation=2), tiles_folder, first)  # decides nothing, and may change
    (tmp_path / "torn.ckpt").write_bytes(last.read_bytes()[:5000])
    torch.save({"weights": 1}, tmp_path / "foreign.ckpt")
    for name, words in (("torn", "cannot be resumed from"), ("foreign", "not a snapshot of a run")):
        bad = dataclasses.replace(first, output=tmp_path / "bad", resume=tmp_path / f"{name}.ckpt")
        with pytest.raises(UsageError, match=words):
            train(preset(3), tiles_folder, bad)
    with pytest.raises(UsageError, match="begun with another model: choose"):
        train(dataclasses.replace(PRESETS["demo"], train=preset(3).train), tiles_folder, first)
    with pytest.raises(UsageError, match=r"none\.ckpt: no such snapshot"):
        train(preset(3), tiles_folder, dataclasses.replace(first, resume=tmp_path / "none.ckpt"))
    other = dataclasses.replace(first, output=tmp_path / "other", resume=last)
    train(preset(3, learning_rate=1e-3), tiles_folder, other)
    assert list(read_curves(other.output)["loss"][0]) == [3]
    assert read_snapshot(other.output / "snapshots" / "last.ckpt").optimizer["param_groups"][0]["lr"] == 1e-3
    train(preset(3, learning_rate=1e-3), tiles_folder, other)  # from its own snapshot, not from the other's again
    assert list(read_curves(other.output)["loss"][0]) == [3]


def test_blocks_of_the_backbone_may_be_frozen_later_but_not_freed(
    tiny_model: ModelConfig, tiles_folder: Path, tmp_path: Path
) -> None:
    model = dataclasses.replace(tiny_model, backbone="efficientnet-lite0")
    dataset = CropDataset(PairedTiles.load(tiles_folder), crop=32, seed=0)

    def run(steps: int, frozen: int, asked: RunOptions) -> None:
        recipe = preset(steps, frozen_blocks=frozen).train
        fit(Teacher(model, recipe), dataset, recipe, asked, first=find_snapshot(asked.output, asked.resume))

    first = options(tmp_path / "first")
    run(1, 2, first)
    asked = dataclasses.replace(options(tmp_path / "other"), resume=first.output / "snapshots" / "last.ckpt")
    for refused in (first, asked):
        with pytest.raises(UsageError, match=r"begun with frozen_blocks = 2, .* with 0: use 2 or more, .* --from"):
            run(2, 0, refused)
    run(2, 3, asked)


def test_a_run_begins_with_the_weights_of_a_checkpoint(tiles_folder: Path, tmp_path: Path) -> None:
    base = train(preset(3), tiles_folder, options(tmp_path / "base"))
    asked = dataclasses.replace(options(tmp_path / "more"), start=base)
    begun, more = (Checkpoint.load(f) for f in (base, train(preset(2, learning_rate=1e-9), tiles_folder, asked)))
    for network in (begun.network, more.network):
        normalize_weight_(network)  # an average's weights are shorter than those that were averaged
    for name, tensor in begun.network.state_dict().items():
        # The last layer of a cell branch is projected anew after it was rounded.
        atol = 2e-2 if name.startswith("cells") and ".head." in name else 1e-3
        torch.testing.assert_close(more.network.state_dict()[name], tensor, rtol=5e-3, atol=atol, msg=name)
    assert more.config.model == begun.config.model  # the constants of the stains are the weights' own
    assert more.config.provenance["begun with"]["recipe"]["steps"] == 3
    other = train(preset(3, seed=1), tiles_folder, options(tmp_path / "other"))
    larger = tmp_path / "larger"
    for size, run, words in (
        ("debug", dataclasses.replace(asked, start=other), "begun with another first weights"),
        ("debug", dataclasses.replace(asked, start=tmp_path / "more" / "checkpoint"), "would replace"),
        ("demo", dataclasses.replace(asked, output=larger), "its encoder is not the preset's"),
    ):
        with pytest.raises(UsageError, match=words):
            train(dataclasses.replace(preset(2, learning_rate=1e-9), model=PRESETS[size].model), tiles_folder, run)
    assert not larger.exists()


def test_parts_of_a_step_give_the_curve_of_the_whole(tiles_folder: Path, tmp_path: Path) -> None:
    curves = []
    for parts in (1, 4):
        asked = dataclasses.replace(options(tmp_path / str(parts)), log_every=1)
        train(preset(8, batch=8, gradient_accumulation=parts, bf16=False), tiles_folder, asked)
        curves.append(read_curves(asked.output))
    assert set(curves[0]) == set(curves[1])
    for name in ("loss", "error/images-cd3", "error_high_sigma/cells-ck818"):
        np.testing.assert_array_equal(curves[0][name][0], curves[1][name][0])
        np.testing.assert_allclose(curves[0][name][1], curves[1][name][1], atol=1e-4)


@pytest.mark.parametrize("computes", [False, True])
def test_bfloat16_is_left_where_it_would_be_emulated(
    tiles_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, computes: bool
) -> None:
    monkeypatch.setattr(Processes, "computes_bf16", computes)
    curves = {}
    for bf16 in (False, True):
        asked = dataclasses.replace(options(tmp_path / str(bf16)), log_every=1)
        train(preset(3, bf16=bf16), tiles_folder, asked)
        curves[bf16] = read_curves(asked.output)["loss"][1]
    assert np.array_equal(curves[False], curves[True]) is not computes


def test_cell_maps_are_kept_free_of_a_grid(tiny_model: ModelConfig, tiles_folder: Path, tmp_path: Path) -> None:
    recipe = preset(3).train
    module = Teacher(tiny_model, recipe)
    fit(module, CropDataset(PairedTiles.load(tiles_folder), crop=32, seed=0), recipe, options(tmp_path))
    for network in (module.net, module.ema):
        for stain in tiny_model.stain_names:
            weight = network.branch("cells", stain).head.plain_weight()
            assert weight.abs().max() > 1e-3
            assert phase_errors(weight).abs().max() < 1e-5


def test_single_task_leaves_the_other_branch_alone(tiny_model: ModelConfig, tiles_folder: Path, tmp_path: Path) -> None:
    recipe = preset(2, bf16=False, tasks=("images",))
    module = Teacher(tiny_model, recipe.train)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    dataset = CropDataset(PairedTiles.load(tiles_folder), crop=32, seed=0)
    fitted = fit(module, dataset, recipe.train, options(tmp_path))
    assert fitted
    assert fitted.seconds > 0
    for name, tensor in module.state_dict().items():
        if name.startswith(("net.cells", "ema.cells")):
            assert torch.equal(tensor, before[name]), name
    for name in ("net.encoder.stem.weight", "net.images.cd3.stem.weight", "ema.images.cd3.head.gain"):
        assert not torch.equal(module.state_dict()[name], before[name]), name
    assert set(module.uncertainty) == {"images-cd3", "images-ck818"}


def test_folders_are_mixed(tiles_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiles_folder, other)
    checkpoint = Checkpoint.load(train(preset(1), [f"{tiles_folder}=3", str(other)], options(tmp_path / "run")))
    data = checkpoint.config.provenance["data"]
    assert data["shares"] == [0.75, 0.25]
    assert data["training tiles"] == 16


def test_diverging_loss_stops_the_run_and_keeps_the_batch(
    tiles_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "isfinite", lambda value: torch.zeros((), dtype=torch.bool))
    with pytest.raises(DivergedError, match="not finite at step 0"):
        train(preset(5), tiles_folder, options(tmp_path))
    assert "he" in torch.load(tmp_path / "diverged-batch.pt")["batch"]
    assert not (tmp_path / "snapshots" / "last.ckpt").exists()


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


def test_validation_tiles_of_odd_size_are_refused(tiles_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiles"
    shutil.copytree(tiles_folder, folder)
    for column in ("he", "cd3", "ck818"):
        image = folder / column / "t10.png"
        Image.fromarray(read_image(image)[:60]).save(image)
    with pytest.raises(DataError, match=r"row 12: the tile is 64 × 60; tiles to validate on must be of one size"):
        train(preset(5), folder, options(tmp_path / "run"))


def test_output_that_cannot_be_written_is_refused_by_a_dry_run_too(tiles_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for dry_run in (True, False):
        asked = dataclasses.replace(options(tmp_path / "file" / "run"), dry_run=dry_run)
        with pytest.raises(UsageError, match="cannot be written"):
            train(preset(5), tiles_folder, asked)


def test_dry_run_checks_every_pixel_and_trains_nothing(tiles_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiles"
    shutil.copytree(tiles_folder, folder)
    image = folder / "he" / "t00.png"
    asked = dataclasses.replace(options(tmp_path / "run"), dry_run=True)
    train(preset(5), folder, asked)
    image.write_bytes(image.read_bytes()[:200])
    with pytest.raises(DataError, match=r"row 2: he: .*t00\.png cannot be read"):
        train(preset(5), folder, asked)
    assert not (tmp_path / "run").exists()
