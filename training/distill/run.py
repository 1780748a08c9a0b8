"""A distillation from checkpoint to checkpoint: train the student, search its σ, judge it, write what ships."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from staindiffuser.errors import UsageError
from staindiffuser.training.checkpoint import WEIGHTS, Checkpoint, tensors_sha256
from staindiffuser.training.config import from_json
from staindiffuser.training.curves import curves_image
from staindiffuser.training.data.targets import load_tile
from staindiffuser.training.diffusion.samplers import START_SIGMAS
from staindiffuser.training.distill.e2e import ignores_noise
from staindiffuser.training.distill.gallery import Gallery
from staindiffuser.training.distill.sigma_search import FewTiles, SigmaSearch, merit, search_sigmas
from staindiffuser.training.distill.student import DistillConfig, Student
from staindiffuser.training.errors import DataError
from staindiffuser.training.evaluation.evaluate import check_data
from staindiffuser.training.evaluation.scoring import score_tiles
from staindiffuser.training.gate import GateRow, Role, Verdict, gate_record, judge
from staindiffuser.training.infer import HEUN_STEPS, Sampler, stain_tiles_with
from staindiffuser.training.journal import Journal, tell
from staindiffuser.training.loop import fit
from staindiffuser.training.model.network import DualDiffusion
from staindiffuser.training.options import RunOptions, check_run, check_writable, locked
from staindiffuser.training.receptive import default_margin, effective_radius
from staindiffuser.training.snapshots import find_snapshot
from staindiffuser.training.tiles.mixed_tiles import MixedTiles, open_tiles
from staindiffuser.training.tiles.paired_tiles import PairedTile, PairedTiles, Split, spread
from staindiffuser.training.train import how_it_was_trained
from staindiffuser.training.training_data import TrainingData, check_one_size

GALLERY = "gate.jpg"
"""In the run folder: tiles that the gate judged, as every sampler stains them."""
__all__ = ["GALLERY", "JudgeOptions", "Outcome", "default_recipe", "distill", "judge_student"]

_OF_CELLS = ("cells", "thresholds", "calibration")
"""Metrics that distillation leaves as they are, as it does the cell branches."""
_OF_IMAGES = ("image_auroc", "image_best_f1", "area_bias", "area_spread")
"""Scores per cell that are of the virtual image."""

Samplers = dict[int, tuple[float, ...]]
Tiles = PairedTiles | MixedTiles


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """How the student's σ are searched and how it is judged."""

    search: bool = True
    """Search σ on validation tiles; otherwise those of the checkpoint stay."""
    search_tiles: int = 8
    gate_tiles: int = 64
    split: Split = "val"
    """Rows that the gate judges by."""
    at_most: int = 4
    """Largest number of steps that may ship."""
    undistilled: bool = False
    """Show the teacher's weights with few steps, too."""
    seed: int = 0
    """Seed of the noise."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a distillation."""

    folder: Path
    """The checkpoint folder."""
    rows: tuple[GateRow, ...]
    verdict: Verdict | None
    """None where nothing was judged: a dry run, or a process that is not the first."""


@dataclass(frozen=True)
class QuickValidation:
    """DAB-Dice and radial power of the student's moving average at each k."""

    tiles: FewTiles
    samplers: Samplers

    def __call__(self, network: DualDiffusion, step: int, journal: Journal) -> float:
        """The :func:`merit` of the best k: the DAB-Dice alone would choose a blurred mean."""
        values, merits = {}, []
        for k, sigmas in self.samplers.items():
            scores = self.tiles.score(network, sigmas)
            merits.append(merit(scores))
            for stain, score in scores.items():
                values[f"val/dab_dice/{stain}-k{k}"] = score.dab_dice
                values[f"val/radial_power/{stain}-k{k}"] = score.radial_power
        journal.log(values, step)
        return max(merits)


def default_recipe(teacher: Checkpoint, **changes: Any) -> DistillConfig:
    """The recipe for a teacher, after the one that it was trained by: its batch, crop and loader, an eighth of its
    steps, a fifth of its learning rate, an average over a tenth of the run at most (ours); never the ``wider``
    augmentation, under which images become soft.

    Args:
        changes: fields of :class:`DistillConfig` that are to be otherwise.

    Raises:
        ConfigError: a field has a value that it cannot have.
    """
    recipe = teacher.config.provenance.get("recipe", {})
    same = (
        "batch",
        "gradient_accumulation",
        "crop",
        "augmentation",
        "rare_share",
        "confounders",
        "ema",
        "workers",
        "checkpoint_minutes",
        "validate_every",
        "validation_tiles",
    )
    fields: dict[str, Any] = {name: recipe[name] for name in same if name in recipe}
    if fields.get("augmentation") == "wider":  # for soft cell maps; images learned from resampled crops are soft
        fields["augmentation"] = "wide"
    if "steps" in recipe:
        fields["steps"] = max(1, recipe["steps"] // 8)
    if "learning_rate" in recipe:
        fields["learning_rate"] = recipe["learning_rate"] / 5
    if changes.get("method") == "e2e":  # compares no two predictions, so half the digits do
        fields["bf16"] = recipe.get("bf16", DistillConfig.bf16)
    if "batch" in changes:  # the teacher's parts may not divide it
        fields.pop("gradient_accumulation", None)
    fields |= changes
    steps = fields.get("steps", DistillConfig.steps)
    if "ema" in fields:  # else a short run would end with an average over weights from before its cool-down
        fields["ema"] = min(fields["ema"], max(0.0, 1 - 10 / max(1, steps)))
    fields.setdefault("warmup", min(DistillConfig.warmup, steps // 10))
    return from_json(DistillConfig, fields, "the recipe, after the teacher's")


def distill(
    checkpoint: Path,
    data: Path | Sequence[str],
    options: RunOptions,
    judging: JudgeOptions | None = None,
    **changes: Any,
) -> Outcome:
    """Train a few-step student of the teacher in ``checkpoint`` on paired tiles.

    Encoder and cell branches stay the teacher's to the bit.

    Args:
        data: a folder, or several, each with its weight (see :func:`open_tiles`).
        options: an empty ``name`` is the teacher's.
        changes: what differs from :func:`default_recipe`.

    Raises:
        ConfigError, CheckpointError, DataError: what was given cannot be used; before any training starts.
        UsageError: the output cannot be written, or holds another run.
    """
    judging = judging or JudgeOptions()
    teacher = Checkpoint.load(checkpoint)
    config = default_recipe(teacher, **changes)
    check_run(config, options, checkpoint)
    first = find_snapshot(options.output, options.resume, tell)
    names = teacher.config.model.stain_names
    checked = TrainingData.open(data, config, stains=names, decode=options.dry_run or first is None, fold=options.fold)
    tiles, folder = checked.tiles, options.output / "checkpoint"
    _check_judging(tiles, teacher, judging)
    torch.manual_seed(config.seed)
    student = Student(teacher.network, config)
    samplers = {k: sigmas for k, sigmas in _samplers(teacher).items() if k == 1 or config.method != "e2e"}
    with locked(options):
        few = FewTiles(teacher.network, () if options.dry_run else checked.validation, seed=judging.seed)
        validation = QuickValidation(few, samplers)
        fitted = fit(student, checked.dataset, config, options, first=first, validation=validation, data=checked.digest)
        if fitted is None or not fitted.first:
            return Outcome(folder=folder, rows=(), verdict=None)
        about = {
            "method": config.method,
            "teacher's weights (SHA-256)": student.teacher_sha256,
            **how_it_was_trained(config, checked, fitted),
        }
        if earlier := teacher.config.provenance.get("distillation"):
            about["begun with images of"] = earlier
        made = Checkpoint(
            config=dataclasses.replace(
                teacher.config,
                name=options.name or teacher.config.name,
                provenance={**teacher.config.provenance, "distillation": about},
            ),
            network=fitted.network.cpu().eval(),
            metrics=_without_images(teacher.metrics),
            curves=curves_image(options.output),
            seen=checked.seen(teacher.seen),
        )
        return _ship(teacher, made, samplers, tiles, judging, folder, dtype=_stored_dtype(checkpoint))


def judge_student(
    checkpoint: Path,
    student: Path | None,
    data: Path | Sequence[str],
    output: Path,
    judging: JudgeOptions | None = None,
    *,
    dry_run: bool = False,
) -> Outcome:
    """Search σ and apply the gate without training.

    Args:
        checkpoint: the teacher.
        student: its student; the teacher itself, undistilled, if None.

    Raises:
        CheckpointError, DataError: what was given cannot be used.
        UsageError: the student has another encoder or other stains than the teacher; the output cannot be written.
    """
    judging = judging or JudgeOptions()
    teacher = Checkpoint.load(checkpoint)
    judged = Checkpoint.load(student) if student else teacher
    encoders = [tensors_sha256(c.network.encoder.state_dict().items()) for c in (teacher, judged)]
    if encoders[0] != encoders[1] or teacher.config.model != judged.config.model:
        raise UsageError(f"{student} is no student of {checkpoint}: its encoder, sizes or stains are others")
    check_writable(output, checkpoint)
    tiles = open_tiles([data] if isinstance(data, Path) else data, check="pixels" if dry_run else "headers")
    _check_judging(tiles, teacher, judging)
    folder = output / "checkpoint"
    if dry_run:
        return Outcome(folder=folder, rows=(), verdict=None)
    return _ship(teacher, judged, _samplers(judged), tiles, judging, folder, dtype=_stored_dtype(student or checkpoint))


def _ship(
    teacher: Checkpoint,
    student: Checkpoint,
    samplers: Samplers,
    tiles: Tiles,
    judging: JudgeOptions,
    folder: Path,
    *,
    dtype: torch.dtype,
) -> Outcome:
    """Search σ, judge, write."""
    if min(samplers) > judging.at_most:
        raise UsageError(f"--at-most {judging.at_most}: the student has no sampler of fewer than {min(samplers)} steps")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for network in (teacher.network, student.network):
        network.to(device)
    provenance = dict(student.config.provenance)
    if judging.search:
        found = _search(student.network, tiles, samplers, judging)
        samplers = {k: search.sigmas for k, search in found.items()}
        provenance["search for σ"] = {
            "tiles": min(judging.search_tiles, len(tiles.scored("val"))),
            "trials": sum(len(search.trials) for search in found.values()),
        }
    rows = spread(tiles.scored(judging.split), judging.gate_tiles)
    table = _table(teacher, student, samplers, rows, judging, image=folder.parent / GALLERY)
    verdict = judge(table, at_most=judging.at_most)
    sigmas = samplers[verdict.steps]
    he = np.stack([load_tile(row, ())["he"] for row in rows[:8]])
    radius = effective_radius(student.network, he, sigmas=sigmas)
    config = dataclasses.replace(
        student.config,
        steps=verdict.steps,
        sigmas={str(k): s for k, s in samplers.items()},
        effective_radius=radius,
        margin=default_margin(radius, student.config.tile),
        provenance=provenance,
    )
    about = {"split": judging.split, "tiles": len(rows), "seed": judging.seed}
    shipped = next(row for row in table if row.role == "student" and row.steps == verdict.steps)
    metrics = {
        **about,
        "steps": verdict.steps,
        "stains": shipped.stains,
        "gate": gate_record(table, verdict, **about, at_most=judging.at_most),
        **{name: student.metrics[name] for name in _OF_CELLS if name in student.metrics},
    }
    shipping = Checkpoint(
        config=config, network=student.network.cpu(), metrics=metrics, curves=student.curves, seen=student.seen
    )
    shipping.save(folder, dtype=dtype)
    return Outcome(folder=folder, rows=tuple(table), verdict=verdict)


def _without_images(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """A teacher's metrics without the scores per cell that were its images', which its student paints anew."""
    left = copy.deepcopy(dict(metrics))
    for stain in left.get("cells", {}).get("stains", {}).values():
        for group in ("metrics", "intervals_95"):
            for name in _OF_IMAGES:
                stain[group].pop(name, None)
    return left


def _search(network: DualDiffusion, tiles: Tiles, samplers: Samplers, judging: JudgeOptions) -> dict[int, SigmaSearch]:
    few = FewTiles(network, spread(tiles.scored("val"), judging.search_tiles), seed=judging.seed)
    return search_sigmas(network, few, steps=tuple(samplers))


def _table(
    teacher: Checkpoint,
    student: Checkpoint,
    samplers: Samplers,
    rows: Sequence[PairedTile],
    judging: JudgeOptions,
    *,
    image: Path,
) -> list[GateRow]:
    """Score every sampler on the same tiles with the same noise, and draw some of them."""
    own = _samplers(teacher) if judging.undistilled else {}
    steps, sampler = _of_teacher(teacher.network)
    asked: list[tuple[Role, int, Sampler]] = [
        ("teacher", steps, sampler),
        *(("undistilled", k, sigmas) for k, sigmas in own.items()),
        *(("student", k, sigmas) for k, sigmas in samplers.items()),
    ]

    def stainer(he: NDArray[np.uint8], seeds: NDArray[np.int64]) -> list[dict[str, NDArray[np.uint8]]]:
        origins = np.zeros((len(he), 2), np.int64)
        return [
            *stain_tiles_with(teacher.network, he, samplers=[sampler, *own.values()], seeds=seeds, origins=origins),
            *stain_tiles_with(student.network, he, samplers=list(samplers.values()), seeds=seeds, origins=origins),
        ]

    stains = teacher.config.model.stain_names
    gallery = Gallery(stains)
    scores = score_tiles(stainer, rows, stains=stains, samplers=len(asked), seed=judging.seed, seen=gallery.see)
    gallery.draw(image, [f"{role}, k = {steps}" for role, steps, _ in asked])
    return [
        GateRow(
            role=role,
            steps=steps,
            sigmas=tuple(sigmas) if sigmas is not None else None,
            stains={name: score.metrics() for name, score in found.items()},
        )
        for (role, steps, sigmas), found in zip(asked, scores, strict=True)
    ]


def _samplers(checkpoint: Checkpoint) -> Samplers:
    """The checkpoint's few-step samplers."""
    return {int(k): sigmas for k, sigmas in checkpoint.config.sigmas.items() if int(k) in START_SIGMAS}


def _of_teacher(network: DualDiffusion) -> tuple[int, Sampler]:
    """Steps and sampler by which a teacher sets the mark: Heun's, or one step where it was fine-tuned to one itself.

    A network that ignores its noisy image cannot take the noise out of it, step by step; what Heun's method makes of it
    is grain (radial power 6 to 13), and now and then scores by chance where little is positive.
    """
    return (1, (network.config.sigma_max,)) if ignores_noise(network.images) else (HEUN_STEPS, None)


def _check_judging(tiles: Tiles, teacher: Checkpoint, judging: JudgeOptions) -> None:
    for part in tiles.parts:
        check_data(part, teacher.config.model)
    needed: set[Split] = {judging.split, "val"} if judging.search else {judging.split}
    for split in sorted(needed):
        if not tiles.split(split):
            raise DataError(f"{tiles.folder / 'tiles.csv'}: no rows with split {split!r} to judge the student by")
        check_one_size(tiles.split(split), "judge by")


def _stored_dtype(folder: Path) -> torch.dtype:
    """The precision of a checkpoint's weights, so that those that do not change are stored as they were."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        name = min(name for name in file.keys() if name.startswith("encoder."))  # noqa: SIM118  # not a dict
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor.dtype
