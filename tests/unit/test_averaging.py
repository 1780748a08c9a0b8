"""The mean of two checkpoints' weights: each weight lies between, and what is neither's is not claimed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from staindiffuser.errors import UsageError
from staindiffuser.training.averaging import average_checkpoints
from staindiffuser.training.checkpoint import Checkpoint, CheckpointConfig, tensors_sha256
from staindiffuser.training.config import ModelConfig
from staindiffuser.training.model.network import DualDiffusion
from staindiffuser.training.model.subpixel import phase_errors
from staindiffuser.training.tiles.seen import SeenTiles


def write(folder: Path, model: ModelConfig, seed: int, slide: str | None) -> Path:
    torch.manual_seed(seed)
    seen = slide and SeenTiles(he=frozenset({slide}), slides=frozenset({slide}), patients=frozenset())
    config = CheckpointConfig(
        name=f"model {seed}",
        model=model,
        notice="It means nothing.",
        thresholds={model.stain_names[0]: 0.3},
        effective_radius=64 * seed,
        provenance={"recipe": {"seed": seed}},
    )
    network = DualDiffusion(model)
    for stain in model.stain_names:  # a trained branch has a gain
        gain = network.branch("cells", stain).head.gain
        assert gain is not None
        gain.data.fill_(0.5)
    checkpoint = Checkpoint(config=config, network=network, metrics={"stains": {}}, seen=seen or None)
    checkpoint.save(folder, dtype=torch.float32)
    return folder


def test_weights_lie_between_and_scores_are_left_out(tiny_model: ModelConfig, tmp_path: Path) -> None:
    first, second = write(tmp_path / "1", tiny_model, 2, "a"), write(tmp_path / "2", tiny_model, 1, "b")
    mean = Checkpoint.load(average_checkpoints(first, second, tmp_path / "mean", share=0.25))
    states = [Checkpoint.load(folder).network.state_dict() for folder in (first, second)]
    for stain in tiny_model.stain_names:
        assert phase_errors(mean.network.branch("cells", stain).head.plain_weight()).abs().max() < 1e-3
    for name, tensor in mean.network.state_dict().items():
        if name.startswith("cells") and ".head." in name:
            continue  # it is kept free of a grid
        torch.testing.assert_close(tensor, 0.75 * states[0][name] + 0.25 * states[1][name], rtol=2e-3, atol=1e-3)
    config = mean.config
    assert (config.name, config.thresholds, config.effective_radius, mean.metrics) == ("model 1", {}, 128, {})
    about = config.provenance["mean of weights"]
    assert config.provenance["recipe"] == {"seed": 1}
    assert (about["share of these"], about["the others"]) == (0.25, {"recipe": {"seed": 2}})
    assert about["SHA-256 of the others"] == tensors_sha256(states[0].items())
    assert mean.seen is not None
    assert mean.seen.slides == {"a", "b"}
    assert "share of these: 0.25" in (tmp_path / "mean" / "MODEL_CARD.md").read_text(encoding="utf-8")


def test_a_history_that_the_second_has_is_not_told_twice(tiny_model: ModelConfig, tmp_path: Path) -> None:
    first, second = write(tmp_path / "1", tiny_model, 1, None), write(tmp_path / "2", tiny_model, 2, None)
    further = Checkpoint.load(second)
    for depth in (1, 2):
        begun = {"recipe": {"seed": 1}, "name": "model 1"}
        history = {"recipe": {"seed": 2}, "begun with": begun if depth == 1 else {"recipe": {}, "begun with": begun}}
        dataclasses.replace(further, config=dataclasses.replace(further.config, provenance=history)).save(second)
        mean = Checkpoint.load(average_checkpoints(first, second, tmp_path / f"mean{depth}"))
        assert "the others" not in mean.config.provenance["mean of weights"]
        assert mean.config.provenance["begun with"] == history["begun with"]


def test_what_one_of_them_saw_is_not_forgotten(tiny_model: ModelConfig, tmp_path: Path) -> None:
    first, second = write(tmp_path / "1", tiny_model, 1, "a"), write(tmp_path / "2", tiny_model, 2, None)
    for order, (one, other) in enumerate([(first, second), (second, first)]):
        seen = Checkpoint.load(average_checkpoints(one, other, tmp_path / f"mean{order}", name="mean")).seen
        assert seen is not None
        assert seen.slides == {"a"}


def test_what_cannot_be_averaged_is_refused(tiny_model: ModelConfig, tmp_path: Path) -> None:
    first = write(tmp_path / "1", tiny_model, 1, None)
    other = write(tmp_path / "2", dataclasses.replace(tiny_model, embedding=16), 2, None)
    with pytest.raises(UsageError, match="different models"):
        average_checkpoints(first, other, tmp_path / "mean")
    with pytest.raises(UsageError, match="--share 1: must be between 0 and 1"):
        average_checkpoints(first, first, tmp_path / "mean", share=1)
    with pytest.raises(UsageError, match="is there already"):
        average_checkpoints(first, first, first)
