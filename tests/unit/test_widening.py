"""A checkpoint goes on in a larger model: what both have computes the same at first, and the rest begins anew."""

from __future__ import annotations

import csv
import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from staindiffuser.errors import UsageError
from staindiffuser.training.checkpoint import Checkpoint
from staindiffuser.training.config import PRESETS, ModelConfig, Preset, StainConfig, Task, WidthConfig
from staindiffuser.training.errors import DataError
from staindiffuser.training.model.layers import normalize_weight_
from staindiffuser.training.model.network import DualDiffusion, he_to_network
from staindiffuser.training.model.pretrained import lite0_weights
from staindiffuser.training.model.widening import can_widen, widened
from staindiffuser.training.options import RunOptions
from staindiffuser.training.teacher import TASKS, Teacher
from staindiffuser.training.train import train

CD3, CK, CD20 = (StainConfig(name=name, label=name.upper()) for name in ("cd3", "ck818", "cd20"))
SMALL = dataclasses.replace(PRESETS["debug"].model, stains=(CD3, CK))
LARGE = dataclasses.replace(SMALL, stains=(CK, CD20, CD3), backbone="efficientnet-lite0")


def outputs(network: DualDiffusion, stain: str) -> dict[Task, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    he = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8, generator=generator)
    with torch.no_grad():
        features = network.encoder(he_to_network(he))
        found: dict[Task, torch.Tensor] = {}
        for task in TASKS:
            noisy = torch.randn(2, network.branch(task, stain).channels, 64, 64, generator=generator)
            found[task] = network.denoiser(task, stain, features)(noisy, 1.0)
        return found


def small_network() -> DualDiffusion:
    torch.manual_seed(1)
    network = DualDiffusion(SMALL)
    with torch.no_grad():  # a trained network's gains are not 0
        for name, parameter in network.named_parameters():
            if name.endswith(".gain"):
                parameter.uniform_(0.5, 1.5)
    normalize_weight_(network)
    return network


def test_what_both_have_computes_the_same() -> None:
    small = small_network()
    state, fresh = widened(small, LARGE)
    large = DualDiffusion(LARGE)
    large.load_state_dict(state)
    for stain in ("cd3", "ck818"):
        for task, value in outputs(small, stain).items():
            assert value.std() > 0.05
            torch.testing.assert_close(outputs(large, stain)[task], value, rtol=2e-3, atol=2e-3)
    assert fresh == ("the backbone, with its published weights", "images of cd20", "cells of cd20")
    assert large.encoder.backbone is not None
    for name, value in lite0_weights().items():
        torch.testing.assert_close(large.encoder.backbone.state_dict()[name], value)
    normalize_weight_(large)  # as after a step of training
    torch.testing.assert_close(outputs(large, "cd3")["cells"], outputs(small, "cd3")["cells"], rtol=5e-3, atol=5e-3)


def test_the_same_model_is_copied_and_other_branches_begin_anew() -> None:
    small = small_network()
    state, fresh = widened(small, SMALL)
    assert not fresh
    for name, tensor in small.state_dict().items():
        assert torch.equal(state[name], tensor), name
    thinner = dataclasses.replace(SMALL, image=WidthConfig(channels=(8, 16, 16, 24)))
    assert widened(small, thinner)[1] == ("images of cd3", "images of ck818")


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        ({}, True),
        ({"stains": (CD20,)}, True),
        ({"cells": WidthConfig(channels=(8, 8, 8, 8))}, True),
        ({"encoder": WidthConfig(channels=(8, 8, 8, 8))}, False),
        ({"embedding": 8}, False),
        ({"sigma_max": 40.0}, False),
        ({"backbone": "none"}, False),
    ],
)
def test_what_may_differ(change: dict[str, object], fits: bool) -> None:
    assert can_widen(LARGE, dataclasses.replace(LARGE, **change)) is fits  # type: ignore[arg-type]


def test_the_first_blocks_of_a_backbone_are_kept() -> None:
    recipe = dataclasses.replace(PRESETS["debug"].train, frozen_blocks=4)
    backbone = Teacher(dataclasses.replace(SMALL, backbone="efficientnet-lite0"), recipe).net.encoder.backbone
    assert backbone is not None
    kept = {name for name, parameter in backbone.named_parameters() if not parameter.requires_grad}
    assert {name.split(".")[0] for name in kept} == {"stem", "blocks"}
    assert {name.split(".")[1] for name in kept if name.startswith("blocks")} == {"0", "1", "2", "3"}


def run(
    data: list[str], output: Path, model: ModelConfig, *, start: Path | None = None, stains: tuple[str, ...] = ()
) -> Path:
    recipe = dataclasses.replace(
        PRESETS["debug"].train,
        steps=3,
        batch=2,
        crop=32,
        warmup=1,
        validate_every=3,
        validation_tiles=2,
        tasks=("cells",) if start else ("images", "cells"),
        rare_share=0.5,
        confounders=0.5,
        frozen_blocks=2,
    )
    options = RunOptions(output=output, start=start, progress="none")
    return train(Preset(model=dataclasses.replace(model, stains=()), train=recipe), data, options, stains=stains)


def test_a_run_learns_the_cells_of_a_new_stain_from_one_of_two_folders(tiles_folder: Path, tmp_path: Path) -> None:
    """The second folder has a column the first lacks; image branches keep what they began with."""
    other = shutil.copytree(tiles_folder, tmp_path / "other")
    with (other / "tiles.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    with (other / "tiles.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "cd20"])
        writer.writeheader()
        writer.writerows({**row, "cd20": row["ck818"]} for row in rows)
    base = run([str(tiles_folder)], tmp_path / "base", SMALL)
    with pytest.raises(DataError, match="column 'cd20' is missing"):
        run([str(tiles_folder)], tmp_path / "none", LARGE, start=base, stains=("cd3", "ck818", "cd20"))
    larger = run(
        [str(tiles_folder), f"{other}=2"], tmp_path / "larger", LARGE, start=base, stains=("cd3", "ck818", "cd20")
    )
    before, after = Checkpoint.load(base), Checkpoint.load(larger)
    assert after.config.model.stain_names == ("cd3", "ck818", "cd20")
    assert after.config.model.stains[:2] == before.config.model.stains  # the constants that the weights were made for
    assert after.config.provenance["begun anew"][0].startswith("the backbone")
    stem = "images.cd3.stem.weight"
    torch.testing.assert_close(after.network.state_dict()[stem], before.network.state_dict()[stem])
    moved = "cells.cd3.stem.weight"
    assert not torch.equal(after.network.state_dict()[moved], before.network.state_dict()[moved])


def test_another_encoder_is_refused(tiles_folder: Path, tmp_path: Path) -> None:
    base = run([str(tiles_folder)], tmp_path / "base", SMALL)
    with pytest.raises(UsageError, match="its encoder is not the preset's"):
        run([str(tiles_folder)], tmp_path / "other", PRESETS["demo"].model, start=base)
