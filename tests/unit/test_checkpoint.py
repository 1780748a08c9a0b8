"""A checkpoint folder holds what was saved and refuses what does not fit."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from staindiffuser.errors import UsageError
from staindiffuser.training.checkpoint import Checkpoint, tensors_sha256
from staindiffuser.training.errors import CheckpointError
from staindiffuser.training.model_card import model_card


def test_saved_in_half_precision_and_loaded_again(tiny_checkpoint: Path, tmp_path: Path) -> None:
    loaded = Checkpoint.load(tiny_checkpoint)
    loaded.save(tmp_path / "again")
    again = Checkpoint.load(tmp_path / "again")
    assert again.config == loaded.config
    for name, tensor in loaded.network.state_dict().items():
        assert torch.equal(tensor, again.network.state_dict()[name]), name
    card = (tmp_path / "again" / "MODEL_CARD.md").read_text()
    assert "research use only" in card
    assert "CK8/18" in card


def test_the_card_tells_what_a_run_was_begun_with(tiny_checkpoint: Path) -> None:
    loaded = Checkpoint.load(tiny_checkpoint)
    first = {"recipe": {"steps": 7, "batch": 2}, "hardware": "CPU"}
    config = dataclasses.replace(loaded.config, provenance={"recipe": {"steps": 9}, "begun with": first})
    told = "- recipe: steps 9\n- begun with:\n  - recipe: steps 7, batch 2\n  - hardware: CPU\n"
    assert told in model_card(config, {})


def test_hash_covers_names_types_shapes_and_bytes() -> None:
    a, b = torch.arange(6.0), torch.arange(4.0)
    reference = tensors_sha256([("a", a), ("b", b)])
    assert tensors_sha256([("b", b), ("a", a)]) == reference
    for other in ([("a", b), ("b", a)], [("a", a.view(2, 3)), ("b", b)], [("a", a.half()), ("b", b)], [("a", a)]):
        assert tensors_sha256(other) != reference


def test_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a checkpoint folder"):
        Checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(format=99), "format is 99"),
        (lambda c: c.update(colour="red"), "colour: unknown field"),
        (lambda c: c.update(tile="512"), 'tile: input should be a valid integer, not "512"'),
        (lambda c: c.update(tile=500), "tile is 500, must be a multiple of 16"),
        (lambda c: c["model"].update(embedding=0), "embedding is 0, must be at least 1"),
        (lambda c: c["model"]["stains"][0].pop("name"), "model.stains.0.name: missing"),
        (lambda c: c["model"]["encoder"].update(channels=[16, 16, 24, 40]), "does not fit config.json"),
        (lambda c: c.update(sigmas=[80]), "sigmas"),
        (lambda c: c["sigmas"].update(two=[80, 1]), "sigmas must be"),
        (lambda c: c["sigmas"].update({"2": [80]}), "sigmas must be"),
        (lambda c: c.update(steps=3), "steps is 3, but sigmas has none"),
    ],
)
def test_config_that_does_not_fit_is_refused(tiny_checkpoint: Path, tmp_path: Path, edit, message: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.load(folder)


def test_truncated_weights_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        Checkpoint.load(folder)


@pytest.mark.parametrize(
    ("name", "content"), [("metrics.json", '{"a": '), ("metrics.json", "[]"), ("config.json", "[]")]
)
def test_other_damage_is_refused(tiny_checkpoint: Path, tmp_path: Path, name: str, content: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, folder)
    (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=r"cannot be read|where an object is expected"):
        Checkpoint.load(folder)


def test_scores_that_are_no_numbers_are_written_as_null(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.load(tiny_checkpoint)
    metrics = {"tiles": 1, "split": "val", "stains": {"cd3": {"psnr": math.inf, "dab_dice": math.nan}}}
    dataclasses.replace(checkpoint, metrics=metrics).save(tmp_path / "c")
    assert Checkpoint.load(tmp_path / "c").metrics["stains"] == {"cd3": {"psnr": None, "dab_dice": None}}


def test_unwritable_place_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="choose another folder"):
        Checkpoint.load(tiny_checkpoint).save(tmp_path / "file" / "below")
