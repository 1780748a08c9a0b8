"""Distillation as a run: what a student may not change, resuming, judging, what is refused."""

from __future__ import annotations

import csv
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from staindiffuser.errors import UsageError
from staindiffuser.training.checkpoint import WEIGHTS, Checkpoint, tensors_sha256
from staindiffuser.training.config import ModelConfig, from_json
from staindiffuser.training.data.dataset import CropBatch, CropDataset
from staindiffuser.training.distill.e2e import forget_noise_, ignores_noise
from staindiffuser.training.distill.run import GALLERY, JudgeOptions, default_recipe, distill, judge_student
from staindiffuser.training.distill.student import DistillConfig, Student
from staindiffuser.training.errors import ConfigError, DataError
from staindiffuser.training.learner import Loss
from staindiffuser.training.options import RunOptions
from staindiffuser.training.tiles.paired_tiles import PairedTiles

QUICK = JudgeOptions(search=False, gate_tiles=1)


def options(folder: Path, **changes: Any) -> RunOptions:
    return dataclasses.replace(RunOptions(output=folder, name="", progress="none", log_every=1), **changes)


def tune(checkpoint: Path, tiles: Path, folder: Path, **changes: Any) -> Path:
    recipe = {"steps": 6, "batch": 2, "crop": 32, "workers": 0, "validate_every": 3, "validation_tiles": 2, **changes}
    return distill(checkpoint, tiles, options(folder), QUICK, **recipe).folder


@pytest.mark.parametrize("method", ["ect", "e2e"])
def test_a_student_keeps_encoder_and_cells_to_the_bit(
    tiny_checkpoint: Path, tiles_folder: Path, tmp_path: Path, method: str
) -> None:
    folder = tune(tiny_checkpoint, tiles_folder, tmp_path, method=method)
    before, after = load_file(tiny_checkpoint / WEIGHTS), load_file(folder / WEIGHTS)
    assert before.keys() == after.keys()
    changed = set()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        if not torch.equal(tensor, after[name]):
            changed.add(name.split(".")[0])
    assert changed == {"images"}
    student = Checkpoint.load(folder)
    assert student.config.name == "tiny"
    assert student.config.provenance["distillation"]["method"] == method
    assert set(student.config.sigmas) == ({"1"} if method == "e2e" else {"1", "2", "4"})
    assert student.config.steps == student.metrics["gate"]["steps"] == student.metrics["steps"]
    assert student.metrics["gate"]["verdict"] in (folder / "MODEL_CARD.md").read_text().replace("G", "g")
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows if row.get("val/dab_dice/cd3-k1")] == ["3", "6"]
    assert ("val/dab_dice/ck818-k4" in rows[0]) == (method == "ect")


@pytest.mark.parametrize("trained", [True, False])
def test_what_was_measured_of_the_cells_stays(
    tiny_checkpoint: Path, tiles_folder: Path, tmp_path: Path, trained: bool
) -> None:
    """A student's images are new, and so are no scores of its teacher's; what is only judged again keeps all."""
    start = Checkpoint.load(tiny_checkpoint)

    def cells(*names: str) -> dict[str, Any]:
        stain = {
            "metrics": dict.fromkeys(names, 0.8),
            "intervals_95": {name: [0.7, 0.9] for name in names},
            "better_than_hematoxylin": False,
        }
        return {"data": "blobs", "split": "test", "steps": 2, "tiles": 4, "stains": {"cd3": stain}}

    numbers = dict.fromkeys(("f1_at_half", "candidate", "f1_at_candidate", "best", "f1_at_best"), 0.5)
    fitted = {"temperature": 1.7, "error_before": 0.2, "error_after": 0.1, "cells": 99}
    kept = {
        "thresholds": {
            "split": "val",
            "tiles": 4,
            "stains": {"cd3": {"threshold": 0.3, **numbers, "gain_95": [0.1, 0.2]}},
        },
        "calibration": {"split": "val", "tiles": 4, "stains": {"cd3": fitted}},
    }
    metrics = {**kept, "cells": cells("map_auroc", "image_auroc", "area_bias"), "intervals_95": {}, "added stains": {}}
    config = dataclasses.replace(start.config, thresholds={"cd3": 0.3}, temperatures={"cd3": 1.7})
    teacher = tmp_path / "teacher"
    dataclasses.replace(start, config=config, metrics=metrics).save(teacher)
    if trained:
        folder = tune(teacher, tiles_folder, tmp_path / "run", steps=1)
    else:
        folder = judge_student(teacher, None, tiles_folder, tmp_path / "run", QUICK).folder
    found = Checkpoint.load(folder).metrics
    assert {name: found[name] for name in kept} == kept
    assert found["cells"] == (cells("map_auroc") if trained else metrics["cells"])
    assert "intervals_95" not in found
    assert "added stains" not in found  # the gate has measured them with the others
    card = (folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    for title in ("Per cell, measured on blobs", "Thresholds of the cell maps", "Calibration of the cell maps"):
        assert f"## {title}" in card


def test_every_image_can_begin_with_the_best_one(tiny_checkpoint: Path) -> None:
    teacher = Checkpoint.load(tiny_checkpoint).network
    student = Student(teacher, DistillConfig(images_from="ck818"))
    best = tensors_sha256(teacher.images["ck818"].state_dict().items())
    for network in (student.net, student.ema):
        assert {tensors_sha256(branch.state_dict().items()) for branch in network.images.values()} == {best}
    assert tensors_sha256(teacher.images["cd3"].state_dict().items()) != best
    for part in ("encoder", "cells"):
        ours, theirs = (tensors_sha256(getattr(n, part).state_dict().items()) for n in (student.net, teacher))
        assert ours == theirs, part
    with pytest.raises(ConfigError, match="images_from is cd8, must be one of cd3, ck818"):
        Student(teacher, DistillConfig(images_from="cd8"))


def test_a_checkpoint_stored_in_float32_stays_so(tiny_checkpoint: Path, tiles_folder: Path, tmp_path: Path) -> None:
    Checkpoint.load(tiny_checkpoint).save(tmp_path / "teacher", dtype=torch.float32)
    folder = judge_student(tmp_path / "teacher", None, tiles_folder, tmp_path / "run", QUICK).folder
    with Image.open(tmp_path / "run" / GALLERY) as image:  # one tile, for each stain
        assert (image.width, image.height) == (6 * 196, 24 + 2 * 196)
    before, after = load_file(tmp_path / "teacher" / WEIGHTS), load_file(folder / WEIGHTS)
    assert all(
        torch.equal(tensor, after[name]) and tensor.dtype == after[name].dtype for name, tensor in before.items()
    )


def test_a_teacher_of_one_step_is_judged_in_one_step(tiny_checkpoint: Path, tiles_folder: Path, tmp_path: Path) -> None:
    """Heun's method of a network that ignores the noisy image gives grain, which is no mark to reach."""
    start = Checkpoint.load(tiny_checkpoint)
    assert not ignores_noise(start.network.images)
    forget_noise_(nn.ModuleDict({"cd3": start.network.images["cd3"]}))  # the other stain was added since
    start.save(tmp_path / "teacher")
    rows = judge_student(tmp_path / "teacher", None, tiles_folder, tmp_path / "run", QUICK).rows
    mark = next(row for row in rows if row.role == "teacher")
    assert (mark.steps, mark.sigmas) == (1, (start.config.model.sigma_max,))
    usual = judge_student(tiny_checkpoint, None, tiles_folder, tmp_path / "other", QUICK).rows
    assert next(row for row in usual if row.role == "teacher").sigmas is None


def test_consistency_tuning_learns(tiny_model: ModelConfig, tiny_checkpoint: Path, tiles_folder: Path) -> None:
    config = DistillConfig(steps=30, batch=4, crop=32, learning_rate=3e-2, warmup=1, stages=1)
    module = Student(Checkpoint.load(tiny_checkpoint).network, config)
    dataset = CropDataset(PairedTiles.load(tiles_folder), crop=32, seed=0)
    batch = dataset.batch(range(4))
    optimizer = module.optimizer()
    losses = []
    for _ in range(20):
        loss = module(batch, 0)
        optimizer.zero_grad()
        loss.value.backward()
        optimizer.step()
        losses.append(loss.value.item())
    assert losses[-1] < 0.9 * losses[0]
    assert {name: len(error) for name, error in loss.errors.items()} == {"images-cd3": 4, "images-ck818": 4}
    trained = {name.split(".")[0] for name, p in module.net.named_parameters() if p.grad is not None}
    assert trained == {"images"}


def test_an_interrupted_distillation_goes_on_as_if_nothing_had_happened(
    tiny_checkpoint: Path, tiles_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tune(tiny_checkpoint, tiles_folder, tmp_path / "whole")
    real = Student.forward

    def killed(module: Student, batch: CropBatch, step: int) -> Loss:
        if step == 4:
            raise RuntimeError("killed")
        return real(module, batch, step)

    with monkeypatch.context() as patch:
        patch.setattr(Student, "forward", killed)
        with pytest.raises(RuntimeError, match="killed"):
            tune(tiny_checkpoint, tiles_folder, tmp_path / "parts", checkpoint_steps=2)
    assert not (tmp_path / "parts" / "checkpoint").exists()
    parts = tune(tiny_checkpoint, tiles_folder, tmp_path / "parts", checkpoint_steps=2)
    one, other = load_file(whole / WEIGHTS), load_file(parts / WEIGHTS)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_run_folder_belongs_to_one_teacher(tiny_checkpoint: Path, tiles_folder: Path, tmp_path: Path) -> None:
    tune(tiny_checkpoint, tiles_folder, tmp_path / "run", steps=1)
    other = Checkpoint.load(tiny_checkpoint)
    with torch.no_grad():
        next(other.network.cells.parameters()).add_(1)
    other.save(tmp_path / "other")
    with pytest.raises(UsageError, match="another teacher's weights: choose another --output"):
        tune(tmp_path / "other", tiles_folder, tmp_path / "run", steps=1)
    with pytest.raises(UsageError, match="begun with method = 'ect', not 'e2e'"):
        tune(tiny_checkpoint, tiles_folder, tmp_path / "run", steps=1, method="e2e")


def test_the_teacher_is_not_replaced(tiny_checkpoint: Path, tiles_folder: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "run" / "checkpoint"
    shutil.copytree(tiny_checkpoint, teacher)
    with pytest.raises(UsageError, match="would replace"):
        judge_student(teacher, None, tiles_folder, tmp_path / "run", dry_run=True)
    with pytest.raises(UsageError, match="would replace"):
        tune(teacher, tiles_folder, tmp_path / "run", steps=1)


def test_the_recipe_follows_the_teachers(tiny_checkpoint: Path) -> None:
    teacher = Checkpoint.load(tiny_checkpoint)
    assert default_recipe(teacher) == DistillConfig()
    recipe: dict[str, Any] = {
        "steps": 3000,
        "batch": 16,
        "crop": 96,
        "learning_rate": 4e-3,
        "p_mean": 0.4,
        "bf16": True,
        "seed": 3,
    }
    config = dataclasses.replace(teacher.config, provenance={"recipe": recipe})
    found = default_recipe(dataclasses.replace(teacher, config=config), steps=50, stages=2)
    assert (found.steps, found.warmup, found.batch, found.crop, found.stages) == (50, 5, 16, 96, 2)
    assert found.learning_rate == 8e-4
    assert (found.p_mean, found.bf16, found.seed) == (DistillConfig.p_mean, False, 0)
    recipe |= {"ema": 0.998, "augmentation": "wider", "rare_share": 0.5}
    config = dataclasses.replace(teacher.config, provenance={"recipe": recipe})
    found = default_recipe(dataclasses.replace(teacher, config=config), steps=200, method="e2e")
    assert (found.ema, found.bf16, found.augmentation, found.rare_share) == (0.95, True, "wide", 0.5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stages", 0),
        ("q", 1.0),
        ("density_weight", -1.0),
        ("detail_weight", -1.0),
        ("consistent_below", 0.0),
        ("r_min", -1.0),
    ],
)
def test_impossible_recipes_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{field} is"):
        DistillConfig(**{field: value})


@pytest.mark.parametrize(("field", "value"), [("method", "both"), ("weighting", "no"), ("steps", "7"), ("step", 7)])
def test_recipes_of_the_wrong_type_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"a file: {field}: (input should be|unknown field)"):
        from_json(DistillConfig, {field: value}, "a file")


def test_only_a_student_of_this_teacher_is_judged(tiny_checkpoint: Path, tiles_folder: Path, tmp_path: Path) -> None:
    other = Checkpoint.load(tiny_checkpoint)
    with torch.no_grad():
        next(other.network.encoder.parameters()).add_(1)
    other.save(tmp_path / "other")
    with pytest.raises(UsageError, match="is no student of"):
        judge_student(tiny_checkpoint, tmp_path / "other", tiles_folder, tmp_path / "run", QUICK)


def test_tiles_without_the_rows_to_judge_by_are_refused(
    tiny_checkpoint: Path, tiles_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tiles"
    folder.mkdir()
    for part in tiles_folder.iterdir():
        if part.is_dir():
            (folder / part.name).symlink_to(part)
    table = (tiles_folder / "tiles.csv").read_text().replace(",test,", ",train,")
    (folder / "tiles.csv").write_text(table)
    with pytest.raises(DataError, match="no rows with split 'test' to judge the student by"):
        judge_student(tiny_checkpoint, None, folder, tmp_path / "run", JudgeOptions(split="test"), dry_run=True)
