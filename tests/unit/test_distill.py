"""Distillation: the consistency loss against hand values, what a student may not change, the search for σ."""

from __future__ import annotations

import csv
import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from staindiffuser.errors import UsageError
from staindiffuser.training.checkpoint import WEIGHTS, Checkpoint
from staindiffuser.training.config import ModelConfig, StainConfig
from staindiffuser.training.data import optical_density
from staindiffuser.training.data.dataset import CropDataset
from staindiffuser.training.data.pairs import PairedTiles
from staindiffuser.training.distill.e2e import OneStepLoss, dab_density, detail_distance, forget_noise_, local_spectra
from staindiffuser.training.distill.ect import ConsistencyLoss, consistency_loss, lower_level, stage_of
from staindiffuser.training.distill.module import DistillConfig, StudentModule
from staindiffuser.training.distill.run import GALLERY, JudgeOptions, default_recipe, distill, judge_student
from staindiffuser.training.distill.sigma_search import FewTiles, QuickScore, coordinate_search, merit, search_sigmas
from staindiffuser.training.errors import ConfigError, DataError
from staindiffuser.training.evaluate import evaluate_tiles
from staindiffuser.training.loop import RunOptions
from staindiffuser.training.model.layers import normalize_weight_

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

STAIN = StainConfig(name="cd3", label="CD3")
QUICK = JudgeOptions(search=False, gate_tiles=1)


class Line:
    """A toy denoiser D(x, t) = a x / (1 + t), with a learned."""

    def __init__(self) -> None:
        self.a = torch.tensor(2.0, requires_grad=True)
        self.calls: list[tuple[Tensor, bool]] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls.append((t.clone(), torch.is_grad_enabled()))
        return self.a * x / (1 + t).view(-1, 1, 1, 1)


# --- the schedule ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("t", "stage", "expected"),
    [
        # n(0) would be 1 + 8 / 2 = 5, n(1) = 1 + 8 / (1 + e), n(80) = 1 to 34 digits
        (80.0, 0, 80 * (1 - 1 / 4)),
        (80.0, 3, 80 * (1 - 1 / 256)),
        (1.0, 0, 1 - (1 + 8 / (1 + math.e)) / 4),
        (1.0, 2, 1 - (1 + 8 / (1 + math.e)) / 64),
        (0.5, 0, 0.0),  # n = 4.02: more than q, so the clamp holds
        (0.002, 1, 0.002 * (1 - (1 + 8 / (1 + math.exp(0.002))) / 16)),
    ],
)
def test_lower_level_by_hand(t: float, stage: int, expected: float) -> None:
    assert lower_level(torch.tensor([t], dtype=torch.float64), stage).item() == pytest.approx(expected, abs=1e-12)


def test_each_stage_brings_the_levels_closer() -> None:
    t = torch.logspace(-2.7, 1.9, 200, dtype=torch.float64)
    levels = torch.stack([lower_level(t, stage) for stage in range(4)])
    assert (levels[0] == 0).any()
    assert (levels[1:] > 0).all()
    assert (levels.diff(dim=0) > 0).all()
    assert (levels < t).all()
    assert (levels.diff(dim=1) >= 0).all()  # and r grows with t


def test_stages_are_equal_parts_of_the_run() -> None:
    stages = [stage_of(step, 10, 4) for step in range(11)]
    assert stages == sorted(stages)
    assert [stages[:10].count(s) for s in range(4)] == [3, 2, 3, 2]
    assert stages[10] == 3


# --- the loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["step", "flat"])
def test_consistency_loss_by_hand(weighting: Any) -> None:
    y, noise = torch.full((1, 1, 2, 2), 0.5), torch.ones(1, 1, 2, 2)
    t, r = torch.tensor([3.0]), torch.tensor([1.0])
    # D(0.5 + 3, 3) = 2 · 3.5 / 4 = 1.75;  D(0.5 + 1, 1) = 2 · 1.5 / 2 = 1.5
    loss, distance = consistency_loss(Line(), y, noise, t, r, weighting=weighting, sigma_data=0.5)
    c_out = 3 * 0.5 / math.sqrt(9 + 0.25)
    assert distance.item() == pytest.approx(0.25, abs=1e-5)
    expected = {"step": 0.25 / 2, "flat": 0.25 / c_out}[weighting]
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    # against the real picture: 1.75 − 0.5, and flat is the teacher's squared loss there
    loss, _ = consistency_loss(Line(), y, noise, t, torch.zeros(1), weighting=weighting, sigma_data=0.5)
    assert loss.item() == pytest.approx({"step": 1.25 / 3, "flat": (1.25 / c_out) ** 2}[weighting], rel=1e-5)


def test_target_is_the_picture_where_r_is_zero() -> None:
    y, noise = torch.full((2, 1, 2, 2), 0.5), torch.ones(2, 1, 2, 2)
    t, r = torch.tensor([3.0, 3.0]), torch.tensor([0.0, 1.0])
    _, distance = consistency_loss(Line(), y, noise, t, r, weighting="step", sigma_data=0.5)
    assert distance.tolist() == pytest.approx([1.75 - 0.5, 0.25], abs=1e-5)
    line = Line()
    _, distance = consistency_loss(line, y, noise, t, torch.zeros(2), weighting="step", sigma_data=0.5)
    assert distance.tolist() == pytest.approx([1.25, 1.25], abs=1e-5)
    assert len(line.calls) == 1  # nothing to compute for the target


def test_gradient_flows_through_the_first_term_only() -> None:
    y, noise = torch.full((1, 1, 2, 2), 0.5), torch.ones(1, 1, 2, 2)
    t, r = torch.tensor([3.0]), torch.tensor([1.0])
    line = Line()
    loss, _ = consistency_loss(line, y, noise, t, r, weighting="step", sigma_data=0.5)
    loss.backward()  # type: ignore[no-untyped-call]
    # d/da of a · 3.5 / 4 is 0.875, over t − r = 2; through both terms it would be (0.875 − 0.75) / 2
    assert line.a.grad is not None
    assert line.a.grad.item() == pytest.approx(0.875 / 2, abs=1e-4)
    assert [enabled for _, enabled in line.calls] == [True, False]


def test_equal_predictions_have_a_finite_gradient() -> None:
    line = Line()
    zeros = torch.zeros(1, 1, 2, 2)
    loss, _ = consistency_loss(
        line, zeros, zeros, torch.tensor([1.0]), torch.tensor([0.5]), weighting="step", sigma_data=0.5
    )
    loss.backward()  # type: ignore[no-untyped-call]
    assert line.a.grad is not None
    assert line.a.grad.item() == 0


def test_noise_levels_follow_the_draws_and_the_stage() -> None:
    levels: list[Tensor] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        levels.append(t)
        return x

    loss = ConsistencyLoss(
        steps=8,
        stages=4,
        q=4.0,
        p_mean=-0.4,
        p_std=2.0,
        max_share=0.5,
        consistent_below=100.0,
        r_min=0.0,
        sigma_min=0.002,
        sigma_max=80.0,
        sigma_data=0.5,
        weighting="step",
    )
    draws = torch.tensor([[0.4, 0.0], [0.6, 0.0], [0.6, 1.0], [0.6, -9.0], [0.6, 9.0]])
    y = torch.zeros(5, 3, 2, 2)
    for step in (2, 7):
        loss(denoise, y, y + 1, draws, STAIN, step)
    expected = [80.0, math.exp(-0.4), math.exp(1.6), 0.002, 80.0]
    assert levels[0].tolist() == pytest.approx(expected)
    assert levels[1].tolist() == pytest.approx(lower_level(levels[0], 1).tolist())
    assert levels[3].tolist() == pytest.approx(lower_level(levels[0], 3).tolist())
    above = dataclasses.replace(loss, consistent_below=2.0, r_min=0.01)
    above(denoise, y, y + 1, draws, STAIN, 7)
    # where r = 0 the target is the picture: any level will do
    lower = torch.where((levels[4] < 2.0) & (levels[4] > 0.1), lower_level(levels[0], 3), levels[4])
    assert levels[5].tolist() == pytest.approx(lower.tolist())


# --- one-step fine-tuning -------------------------------------------------------------------------------------------


def test_dab_density_is_that_of_the_metric() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    expected = optical_density.unmix(optical_density.optical_density(rgb))[..., 1]
    found = dab_density(torch.from_numpy(rgb).permute(2, 0, 1)[None].double() / 255)
    assert found.shape == (1, 1, 5, 7)
    np.testing.assert_allclose(found[0, 0].numpy(), expected, atol=1e-5)


def test_local_spectra_find_a_wave_wherever_it_lies() -> None:
    place = torch.arange(32.0)
    for shift in (0.0, 1.7):
        wave = torch.cos(2 * math.pi * 4 / 16 * (place + shift)).expand(1, 1, 32, 32)
        spectra = local_spectra(wave, 16)
        assert spectra.shape == (1, 1, 3, 3, 16, 9)
        # the amplitude of a wave of 1 under a window of mean 1/4 in each of 16² pixels, halved, times its frequency;
        # halved again, since in each direction its power is 1 at the middle and 1/4 at the neighbours of three
        torch.testing.assert_close(spectra[..., 0, 4], torch.full((1, 1, 3, 3), 16 * 0.25 / 4 * 4), rtol=1e-3, atol=0)
    assert local_spectra(torch.ones(1, 1, 32, 32), 16)[..., 0, 0].abs().max() == 0


def test_detail_is_not_met_by_a_blur_nor_by_a_pattern_and_is_by_the_same_grain_elsewhere() -> None:
    generator = torch.Generator().manual_seed(0)

    def grain() -> Tensor:
        return torch.nn.functional.avg_pool2d(torch.randn(1, 1, 130, 130, generator=generator), 3, 1)

    real, other, blurred = grain(), grain(), torch.zeros(1, 1, 128, 128)
    rows = torch.arange(128)
    pattern = torch.where((rows[:, None] // 4 + rows // 4) % 2 == 0, 1.0, -1.0)[None, None] * real.std()
    moved = real.roll((1, 1), (2, 3))
    found = {
        name: detail_distance(painted, real).item()
        for name, painted in {"moved": moved, "other": other, "blurred": blurred, "pattern": pattern}.items()
    }
    assert list(found) == sorted(found, key=found.__getitem__), found
    assert detail_distance(real, real).item() == 0
    assert found["other"] < 0.6 * found["blurred"]
    best = min((0.7, 0.78, 0.86, 0.94, 1.02), key=lambda power: detail_distance(power**0.5 * other, real).item())
    assert best == 0.86  # with plain amplitudes it would be π / 4
    # which pixel by pixel is the other way around
    assert (other - real).square().mean() > 1.5 * (blurred - real).square().mean()


def test_one_step_loss_asks_for_pixels_density_and_detail() -> None:
    asked: list[tuple[Tensor, Tensor]] = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        asked.append((x, sigma))
        return y + 0.1

    y = torch.zeros(2, 3, 32, 32)
    losses = []
    for density_weight, detail_weight in ((0.0, 0.0), (4.0, 0.0), (0.0, 3.0)):
        loss, pixels = OneStepLoss(
            sigma_max=80.0, sigma_data=0.5, density_weight=density_weight, detail_weight=detail_weight
        )(denoise, y, y, torch.zeros(2, 2), STAIN, 0)
        assert pixels.tolist() == pytest.approx([0.01, 0.01])
        losses.append(loss)
    assert not asked[0][0].any()
    assert asked[0][1].tolist() == [80.0, 80.0]
    # STAIN's mean is 0.5 and its standard deviation 0.25: 0.1 of the standardised target is 0.05 of intensity
    density = [dab_density(torch.full((1, 3, 1, 1), v)).item() for v in (0.55, 0.5)]
    assert losses[0].tolist() == pytest.approx([0.01, 0.01])
    assert losses[1][0].item() == pytest.approx(0.01 + 4 * (density[0] - density[1]) ** 2, rel=1e-4)
    assert losses[2][0].item() == pytest.approx(0.01 + 3 * detail_distance(y + 0.1, y)[0].item(), rel=1e-4)


def test_a_branch_that_forgot_noise_paints_the_same_from_any(tiny_checkpoint: Path) -> None:
    network = Checkpoint.load(tiny_checkpoint).network
    branch = network.branch("pictures", "cd3")
    injections = branch.attend(network.encoder(torch.rand(1, 3, 32, 32)))

    def painted(x: Tensor) -> Tensor:
        return branch(x, torch.ones(1), injections)

    x, nothing = torch.randn(1, 3, 32, 32), torch.zeros(1, 3, 32, 32)
    expected = painted(nothing)
    assert not torch.allclose(painted(x), expected, atol=0.01)
    forget_noise_(network.pictures)
    normalize_weight_(network.pictures)  # as after an optimiser step
    assert torch.allclose(painted(nothing), expected, atol=1e-3)
    assert torch.equal(painted(x), painted(nothing))


# --- the run --------------------------------------------------------------------------------------------------------


def options(folder: Path, **changes: Any) -> RunOptions:
    return dataclasses.replace(RunOptions(output=folder, name="", progress=False, log_every=1), **changes)


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
    assert changed == {"pictures"}
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


def test_a_checkpoint_stored_in_float32_stays_so(tiny_checkpoint: Path, tiles_folder: Path, tmp_path: Path) -> None:
    Checkpoint.load(tiny_checkpoint).save(tmp_path / "teacher", dtype=torch.float32)
    folder = judge_student(tmp_path / "teacher", None, tiles_folder, tmp_path / "run", QUICK).folder
    with Image.open(tmp_path / "run" / GALLERY) as picture:  # one tile, for each stain
        assert (picture.width, picture.height) == (6 * 196, 24 + 2 * 196)
    before, after = load_file(tmp_path / "teacher" / WEIGHTS), load_file(folder / WEIGHTS)
    assert all(
        torch.equal(tensor, after[name]) and tensor.dtype == after[name].dtype for name, tensor in before.items()
    )


def test_consistency_tuning_learns(tiny_model: ModelConfig, tiny_checkpoint: Path, tiles_folder: Path) -> None:
    config = DistillConfig(steps=30, batch=4, crop=32, learning_rate=3e-2, warmup=1, stages=1)
    module = StudentModule(Checkpoint.load(tiny_checkpoint).network, config)
    dataset = CropDataset(PairedTiles.load(tiles_folder), crop=32, seed=0)
    batch = torch.utils.data.default_collate([dataset[i] for i in range(4)])
    optimizer = module.configure_optimizers()["optimizer"]
    losses = []
    for _ in range(20):
        loss, distances = module.losses(batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert {name: tuple(d.shape) for name, d in distances.items()} == {"cd3": (4,), "ck818": (4,)}
    trained = {name.split(".")[0] for name, p in module.net.named_parameters() if p.grad is not None}
    assert trained == {"pictures"}


def test_an_interrupted_distillation_goes_on_as_if_nothing_had_happened(
    tiny_checkpoint: Path, tiles_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tune(tiny_checkpoint, tiles_folder, tmp_path / "whole")
    step = StudentModule.training_step

    def killed(module: StudentModule, batch: dict[str, Any], index: int) -> Tensor:
        if module.global_step == 4:
            raise RuntimeError("killed")
        return step(module, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(StudentModule, "training_step", killed)
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
    recipe = {"steps": 3000, "batch": 16, "crop": 96, "learning_rate": 4e-3, "p_mean": 0.4, "bf16": True, "seed": 3}
    config = dataclasses.replace(teacher.config, provenance={"recipe": recipe})
    found = default_recipe(dataclasses.replace(teacher, config=config), steps=50, stages=2)
    assert (found.steps, found.warmup, found.batch, found.crop, found.stages) == (50, 5, 16, 96, 2)
    assert found.learning_rate == 8e-4
    assert (found.p_mean, found.bf16, found.seed) == (DistillConfig.p_mean, False, 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stages", 0),
        ("q", 1.0),
        ("density_weight", -1.0),
        ("detail_weight", -1.0),
        ("method", "both"),
        ("weighting", "no"),
        ("consistent_below", 0.0),
        ("r_min", -1.0),
    ],
)
def test_impossible_recipes_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{field} is"):
        DistillConfig(**{field: value})


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


# --- the search for σ -----------------------------------------------------------------------------------------------


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
