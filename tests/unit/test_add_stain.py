"""A stain is added to a checkpoint: the new one is learned, and of the old ones nothing changes, not by a bit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from staindiffuser.errors import UsageError
from staindiffuser.imaging.image_files import read_image
from staindiffuser.training.add_stain import add_stain
from staindiffuser.training.checkpoint import WEIGHTS, Checkpoint
from staindiffuser.training.config import PRESETS
from staindiffuser.training.errors import ConfigError, DataError
from staindiffuser.training.infer import stain_tiles
from staindiffuser.training.model_card import CARD
from staindiffuser.training.options import RunOptions
from staindiffuser.training.snapshots import read_snapshot
from staindiffuser.training.teacher import TASKS
from staindiffuser.training.tiles.paired_tiles import Split
from staindiffuser.training.tiles.writing import PairedTilesWriter

CHANGES: dict[str, Any] = {
    "steps": 6,
    "batch": 4,
    "crop": 32,
    "workers": 0,
    "warmup": 1,
    "validation_tiles": 2,
    "validate_every": 6,
}


def options(folder: Path) -> RunOptions:
    return RunOptions(output=folder, name="", trained_on="coloured blobs", progress="none")


@pytest.fixture(scope="module")
def new_tiles(tiles_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Paired tiles that have the new stain alone: the old one's images under another name."""
    folder = tmp_path_factory.mktemp("new")
    splits: list[Split] = ["train", "train", "val", "test"]
    with PairedTilesWriter(folder, ["ki67"], masks=False) as writer:
        for i in range(16):
            name = f"t{i:02d}"
            he, ihc = (read_image(tiles_folder / column / f"{name}.png") for column in ("he", "cd3"))
            writer.add(name, he=he, stains={"ki67": ihc}, slide=f"s{i % 4}", split=splits[i % 4], mpp=0.5)
    return folder


@pytest.fixture(scope="module")
def added(tiny_checkpoint: Path, new_tiles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with the third stain."""
    return add_stain(tiny_checkpoint, "ki67", new_tiles, options(tmp_path_factory.mktemp("run")), **CHANGES)


def test_old_stains_do_not_change_by_a_bit(tiny_checkpoint: Path, added: Path) -> None:
    before, after = load_file(tiny_checkpoint / WEIGHTS), load_file(added / WEIGHTS)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name
    assert {name.split(".")[1] for name in set(after) - set(before)} == {"ki67"}
    he = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype(np.uint8)
    results = []
    for folder in (tiny_checkpoint, added):
        network = Checkpoint.load(folder).network
        seeds, origins = np.array([[1], [2]]), np.zeros((2, 2), np.int64)
        results.append(stain_tiles(network, he, sigmas=(80.0, 1.5), seeds=seeds, origins=origins))
    assert set(results[1]) - set(results[0]) == {"STAIN_KI67", "CELLS_KI67"}
    for name, image in results[0].items():
        np.testing.assert_array_equal(image, results[1][name])


def test_the_card_says_what_the_new_stain_was_measured_on(added: Path) -> None:
    about = Checkpoint.load(added).metrics["added stains"]["ki67"]
    words = f"`ki67` was added later, and measured then: {about['tiles']} tiles of the split `val`, sampler steps: 2."
    assert words in (added / CARD).read_text()


def test_a_run_goes_on_only_with_the_encoder_that_it_began_with(
    tiny_checkpoint: Path, new_tiles: Path, added: Path, tmp_path: Path
) -> None:
    again = Checkpoint.load(tiny_checkpoint)
    with torch.no_grad():
        next(again.network.encoder.parameters()).mul_(1.5)
    again.save(tmp_path / "again")
    with pytest.raises(UsageError, match="another encoder: choose another --output"):
        add_stain(tmp_path / "again", "ki67", new_tiles, options(added.parent), **CHANGES)


def test_new_stain_has_been_trained(added: Path) -> None:
    network = Checkpoint.load(added).network
    for task in TASKS:
        gain = network.branch(task, "ki67").head.gain
        assert gain is not None
        assert gain.abs().max() > 0  # it starts at 0
    run = read_snapshot(added.parent / "snapshots" / "last.ckpt").learner
    assert {name.split(".")[2] for name in run if name.startswith(("net.images", "net.cells"))} == {"ki67"}


def test_checkpoint_says_what_was_added(tiny_checkpoint: Path, added: Path) -> None:
    old, new = Checkpoint.load(tiny_checkpoint).config, Checkpoint.load(added).config
    assert new.model.stains[:2] == old.model.stains
    assert (new.model.stains[2].name, new.model.stains[2].label) == ("ki67", "Ki-67")
    assert (new.name, new.margin, new.steps, new.sigmas) == (old.name, old.margin, old.steps, old.sigmas)
    assert old.notice in new.notice
    assert "Ki-67 was added later, trained on coloured blobs" in new.notice
    about = new.provenance["added stains"]["ki67"]
    assert (about["recipe"]["steps"], about["data"]["training tiles"]) == (6, 8)
    metrics = json.loads((added / "metrics.json").read_text())
    assert metrics["stains"]["ki67"]["dab_dice"] >= 0
    assert metrics["added stains"]["ki67"] == {"split": "val", "steps": 2, "tiles": 2}
    assert "Ki-67 (`ki67`)" in (added / "MODEL_CARD.md").read_text()


def test_a_second_one_can_follow(added: Path, new_tiles: Path, tiles_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has it already"):
        add_stain(added, "ki67", new_tiles, options(tmp_path), **CHANGES)
    full = tmp_path / "full"  # stored in single precision, which is to be kept
    checkpoint = Checkpoint.load(added)
    recipe = checkpoint.config.provenance["added stains"]["ki67"]["recipe"] | {"steps": 1, "seed": 5}
    config = dataclasses.replace(checkpoint.config, provenance={**checkpoint.config.provenance, "recipe": recipe})
    for tensor in checkpoint.network.parameters():
        tensor.add_(1e-5)
    dataclasses.replace(checkpoint, config=config).save(full, dtype=torch.float32)
    path = tmp_path / "tiles.csv"
    rows = (tiles_folder / "tiles.csv").read_text().replace("cd3,ck818", "cd8,cd20", 1)
    path.write_text(rows)
    for column in ("he", "cd3", "ck818"):
        (tmp_path / column).symlink_to(tiles_folder / column)
    folder = add_stain(full, "cd8", tmp_path, options(tmp_path / "run"))
    before, after = load_file(full / WEIGHTS), load_file(folder / WEIGHTS)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    provenance = Checkpoint.load(folder).config.provenance
    assert list(provenance["added stains"]) == ["ki67", "cd8"]
    assert provenance["added stains"]["cd8"]["recipe"]["seed"] == 5  # the checkpoint's recipe, where none is asked for


def test_a_checkpoint_whose_cells_were_trained_last_gets_an_image_too(
    tiny_checkpoint: Path, new_tiles: Path, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.load(tiny_checkpoint)
    cells = {"tasks": ["cells"], "augmentation": "wider", "mosaic": 0.25, "jigsaw": 0.5, "white_glass": False}
    recipe = dataclasses.asdict(PRESETS["debug"].train) | cells
    config = dataclasses.replace(checkpoint.config, provenance={"recipe": recipe})
    dataclasses.replace(checkpoint, config=config).save(tmp_path / "base")
    folder = add_stain(tmp_path / "base", "ki67", new_tiles, options(tmp_path / "run"), **CHANGES)
    gain = Checkpoint.load(folder).network.branch("images", "ki67").head.gain
    assert gain is not None
    assert gain.abs().max() > 0
    about = Checkpoint.load(folder).config.provenance["added stains"]["ki67"]["recipe"]
    assert (about["tasks"], about["augmentation"]) == (["images", "cells"], "wide")
    assert (about["mosaic"], about["jigsaw"], about["white_glass"]) == (0, 0, True)


def test_what_cannot_be_added_is_refused_before_training(
    tiny_checkpoint: Path, new_tiles: Path, tiles_folder: Path, tmp_path: Path
) -> None:
    run = options(tmp_path / "run")
    with pytest.raises(UsageError, match=r"--stain cd3: .* has it already"):
        add_stain(tiny_checkpoint, "cd3", tiles_folder, run, **CHANGES)
    with pytest.raises(UsageError, match="--stain Ki-67: a name is lower-case"):
        add_stain(tiny_checkpoint, "Ki-67", new_tiles, run, **CHANGES)
    with pytest.raises(DataError, match=r"tiles\.csv, row 1: column 'ki67' is missing; there are cd3, ck818"):
        add_stain(tiny_checkpoint, "ki67", tiles_folder, run, **CHANGES)
    settings = tmp_path / "settings.toml"
    settings.write_text("[model]\nmpp = 0.25\n")
    with pytest.raises(ConfigError, match=r"settings\.toml: model is the checkpoint's"):
        add_stain(tiny_checkpoint, "ki67", new_tiles, run, file=settings, **CHANGES)
    assert not (tmp_path / "run").exists()
