"""Baselines and ablations in one table: who learns most from the same tiles in the same number of optimiser steps.

Every arm sees the same tiles, crops, augmentations and batches (they follow from the seed and the sample's number) and
is scored on the same unseen tiles. Each finished run is written at once to ``runs/``, with everything that decides its
numbers; a run is done again only when something of that has changed.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

import staindiffuser.training
from staindiffuser.benchmarks.ablation_tiles import fingerprint, open_simulated, open_tiles, subset
from staindiffuser.errors import DependencyError, UsageError
from staindiffuser.files import write_json
from staindiffuser.training.baselines.pix2pix import Pix2Pix
from staindiffuser.training.baselines.unet import Regression, parameter_count
from staindiffuser.training.config import PRESETS, ModelConfig, Preset, TrainConfig, WidthConfig
from staindiffuser.training.data.dataset import CropDataset
from staindiffuser.training.data.targets import load_tile, measure_stains
from staindiffuser.training.diffusion.samplers import START_SIGMAS
from staindiffuser.training.evaluation.evaluate import evaluate_tiles
from staindiffuser.training.evaluation.metrics import StainScore
from staindiffuser.training.loop import fit
from staindiffuser.training.options import RunOptions
from staindiffuser.training.snapshots import find_snapshot
from staindiffuser.training.teacher import Teacher
from staindiffuser.training.tiles.mixed_tiles import MixedTiles
from staindiffuser.training.tiles.paired_tiles import PairedTile, PairedTiles, Split

__all__ = ["ARMS", "EVERY_SIZE", "SMALL", "AblationStudy", "ArmName", "Run", "bench_ablations", "chosen_preset"]

ArmName = Literal["regression", "pix2pix", "single", "plain", "separate", "mixed", "dual"]
ARMS: tuple[ArmName, ...] = get_args(ArmName)
EVERY_SIZE: tuple[ArmName, ...] = ("regression", "single", "mixed", "dual")
"""Arms that are trained at every number of tiles; the others at the median one only."""
Scores = dict[str, dict[str, float]]
"""Per stain its metrics by name."""

SMALL = Preset(
    model=ModelConfig(
        encoder=WidthConfig(channels=(16, 24, 32, 48)),
        image=WidthConfig(channels=(16, 32, 48, 64)),
        cells=WidthConfig(channels=(8, 16, 24, 32)),
        embedding=64,
    ),
    train=dataclasses.replace(
        PRESETS["demo"].train, steps=300, batch=8, crop=64, warmup=40, learning_rate=1e-2, workers=0
    ),
)
"""Between ``debug`` and ``demo``, with the latter's noise levels: a run of about a minute on one core."""
LEARNING_RATES: dict[str, float] = {"regression": 1e-3, "pix2pix": 1e-3}
"""Peak rates of the baselines; the other arms have the preset's.

The best of 3e-4 (pix2pix alone), 1e-3, 3e-3 and 1e-2 (regression alone) by DAB-Dice on validation tiles, one run of
``small`` each with 256 tiles. For dual diffusion 4e-3 was worse than 1e-2 and 2e-2 hardly better.
"""
_CODE = (
    "data/augmentation.py",
    "data/dataset.py",
    "data/targets.py",
    "evaluation/metrics.py",
    "evaluation/tile_metrics.py",
    "learner.py",
    "loop.py",
    "teacher.py",
    "tiles/mixed_tiles.py",
)
_DIFFUSION, _BASELINES = ("diffusion", "infer.py", "model"), ("baselines", "model")
"""The parts of the training package that decide a run's numbers: of all arms, and of these or those."""


@dataclass(frozen=True, kw_only=True)
class AblationStudy:
    """What is compared, on what, and for how long."""

    data: Path
    """Paired tiles to train on."""
    output: Path
    """Gets ``runs/``, ``results.json``, ``ablations.md`` and ``ablations.png``."""
    preset: Preset
    """Size of the model and the recipe of all arms."""
    test: Path | None = None
    """Paired tiles to score on; ``data`` if not given."""
    simulated: Path | None = None
    """Paired tiles of which the arm ``mixed`` draws every second sample; they may lack stains of ``data``."""
    split: Split = "test"
    """Rows to score on: ``test``, or ``val`` to choose settings by."""
    arms: tuple[ArmName, ...] = tuple(arm for arm in ARMS if arm != "mixed")
    sizes: tuple[int | None, ...] = (64, 256, 1024)
    """Numbers of training tiles; None for all that there are."""
    seeds: int = 3
    tile: int | None = 128
    """Tiles are cut to this side, pixels, around their centre; None leaves them whole."""
    test_tiles: int = 128
    sampler_steps: int = 2
    """Steps of the few-step sampler, for the arms that diffuse."""
    learning_rate: float | None = None
    """Instead of each arm's own."""
    resume: bool = True
    """Keep runs that are done already."""

    def __post_init__(self) -> None:
        side = self.preset.train.crop
        if self.tile is not None and (self.tile < side or self.tile % 16):
            raise UsageError(f"--tile {self.tile}: must be a multiple of 16 and hold a crop of {side}")
        if self.sampler_steps not in START_SIGMAS:
            raise UsageError(f"--sampler-steps {self.sampler_steps}: there are {', '.join(map(str, START_SIGMAS))}")
        if not self.sizes or not self.arms or self.seeds < 1:
            raise UsageError("--arms, --sizes and --seeds: name at least one each")
        if "mixed" in self.arms and self.simulated is None:
            raise UsageError("--arms mixed: name the folder of the other tiles with --simulated")

    def runs(self) -> Iterator[Run]:
        """All runs, seed by seed: an interrupted table is whole for the seeds that are done."""
        median = self.sizes[len(self.sizes) // 2]
        for seed in range(self.seeds):
            for size in self.sizes:
                for arm in self.arms:
                    if arm in EVERY_SIZE or size == median:
                        yield Run(arm=arm, tiles=size, seed=seed)

    def recipe(self, run: Run) -> TrainConfig:
        """How a run is trained."""
        rate = self.learning_rate or LEARNING_RATES.get(run.arm, self.preset.train.learning_rate)
        return dataclasses.replace(self.preset.train, seed=run.seed, learning_rate=rate)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run of the table (of ``separate``: one a stain)."""

    arm: ArmName
    tiles: int | None
    """Training tiles; None for all."""
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.tiles or 'all'}-{self.seed}"


def chosen_preset(name: str, *, steps: int | None = None, batch: int | None = None, crop: int | None = None) -> Preset:
    """A preset by name (``small`` is this table's own), with what was asked for instead of its values."""
    preset = SMALL if name == "small" else PRESETS[name]
    asked: dict[str, Any] = {"steps": steps, "batch": batch, "crop": crop}
    changes = {field: value for field, value in asked.items() if value is not None}
    return dataclasses.replace(preset, train=dataclasses.replace(preset.train, **changes))


def bench_ablations(study: AblationStudy, progress: Callable[[str], None]) -> dict[str, Any]:
    """Do every run of the study that is not done yet, then write the table, the chart and ``results.json``.

    Returns:
        the content of ``results.json``.

    Raises:
        DataError: the tiles cannot be used; before any training starts.
        UsageError: the output cannot be written.
        DependencyError: nothing to draw the chart with.
    """
    if find_spec("matplotlib") is None:  # now, not after an hour
        raise DependencyError("matplotlib, which draws the chart, is not installed: pip install 'staindiffuser[train]'")
    from staindiffuser.benchmarks.ablation_report import write_report

    tiles, rows = open_tiles(study, progress)
    simulated = open_simulated(study, tiles) if "mixed" in study.arms else None
    shared = {
        "data": fingerprint(tiles.split("train")),
        "scored_on": fingerprint(rows),
        "scored_tiles": len(rows),
    }
    code = {arm: _code(*_CODE, *(_BASELINES if arm in LEARNING_RATES else _DIFFUSION)) for arm in study.arms}
    runs = list(study.runs())
    records = []
    for number, run in enumerate(runs, 1):
        config = study.recipe(run)
        about = {
            "arm": run.arm,
            "tiles": len(subset(tiles, run.tiles, run.seed).tiles),
            "seed": run.seed,
            "model": dataclasses.asdict(study.preset.model),
            "train": dataclasses.asdict(config),
            "sampler_steps": None if run.arm in LEARNING_RATES else study.sampler_steps,
            "code": code[run.arm],
            **shared,
        }
        if run.arm == "mixed" and simulated is not None:
            about["simulated"] = fingerprint(simulated.split("train"))
        key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        file = study.output / "runs" / f"{run.name}.json"
        record = _finished(file, key) if study.resume else None
        if record is None:
            chosen: PairedTiles | MixedTiles = subset(tiles, run.tiles, run.seed)
            if run.arm == "mixed" and simulated is not None:
                chosen = MixedTiles(parts=(*chosen.parts, simulated), weights=(1.0, 1.0))
            folder = file.with_name(f"{run.name}-{key[:12]}")
            record = {"key": key, "settings": about, **_do(study, run, config, chosen, rows, folder)}
            write_json(file, record)
            progress(f"[{number}/{len(runs)}] {run.name}: {_line(record)}")
        else:
            progress(f"[{number}/{len(runs)}] {run.name}: done before")
        records.append(record)
    return write_report(study, records)


def _line(record: dict[str, Any]) -> str:
    dice = ", ".join(f"{stain} {values['dab_dice']:.3f}" for stain, values in record["stains"].items())
    return f"DAB-Dice {dice}; {record['seconds']:.0f} s ({record['cpu_seconds']:.0f} s of a core)"


def _finished(file: Path, key: str) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if record.get("key") == key else None


def _do(
    study: AblationStudy,
    run: Run,
    config: TrainConfig,
    tiles: PairedTiles | MixedTiles,
    rows: tuple[PairedTile, ...],
    folder: Path,
) -> dict[str, Any]:
    """Train and score; what is kept on the way is in the folder, which goes when it is done."""
    parts = [tiles]
    if run.arm == "separate" and isinstance(tiles, PairedTiles):
        parts = [dataclasses.replace(tiles, stains=(stain,)) for stain in tiles.stains]
    clock, parameters = Clock(), 0
    scores: Scores = {}
    for part in parts:
        model = dataclasses.replace(study.preset.model, stains=measure_stains(part))
        torch.manual_seed(run.seed)
        module = _module(run.arm, model, config)
        clock += _fit(module, part, config, folder / "-".join(part.stains))
        parameters += _trained_parameters(module)
        scores |= _score(module, rows, study.sampler_steps)
    shutil.rmtree(folder)
    return {
        "models": len(parts),
        "parameters": parameters,
        "steps": len(parts) * config.steps,
        "seconds": round(clock.seconds, 1),
        "cpu_seconds": round(clock.cpu_seconds, 1),
        "stains": scores,
    }


@dataclass(frozen=True, kw_only=True)
class Clock:
    """What a run took."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    """Of this process, over all its threads: where other programs have a share of the cores, the better measure."""

    @classmethod
    def now(cls) -> Clock:
        return cls(seconds=time.perf_counter(), cpu_seconds=time.process_time())

    def __add__(self, other: Clock) -> Clock:
        return Clock(seconds=self.seconds + other.seconds, cpu_seconds=self.cpu_seconds + other.cpu_seconds)

    def __sub__(self, other: Clock) -> Clock:
        return Clock(seconds=self.seconds - other.seconds, cpu_seconds=self.cpu_seconds - other.cpu_seconds)


def _fit(module: Regression | Teacher, tiles: PairedTiles | MixedTiles, config: TrainConfig, folder: Path) -> Clock:
    """Train to the end, from where an earlier sitting was stopped; what all sittings took."""
    file = folder / "clock.json"
    before = Clock(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else Clock()
    start = Clock.now()
    try:
        crops = CropDataset(tiles, crop=config.crop, seed=config.seed)
        fit(module, crops, config, RunOptions(output=folder), first=find_snapshot(folder, True))
    finally:
        clock = before + Clock.now() - start
        write_json(file, dataclasses.asdict(clock))
    return clock


class _Unchanged(nn.Module):
    """Replaces task attention: the branch injects the encoder's features as they are."""

    def forward(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        return features


def _module(arm: ArmName, model: ModelConfig, config: TrainConfig) -> Regression | Teacher:
    if arm == "regression":
        return Regression(model, config)
    if arm == "pix2pix":
        return Pix2Pix(model, config)
    module = Teacher(model, dataclasses.replace(config, tasks=("images",)) if arm == "single" else config)
    if arm == "plain":
        for network in (module.net, module.ema):
            for branch in (*network.images.values(), *network.cells.values()):
                branch.add_module("attention", _Unchanged())
    return module


def _trained_parameters(module: Regression | Teacher) -> int:
    """Of the network that stains (and maps cells): no discriminator, no branch that was left out."""
    if isinstance(module, Regression):
        return parameter_count(module.net)
    return sum(parameter_count(getattr(module.net, part)) for part in module.trained)


def _score(module: Regression | Teacher, rows: tuple[PairedTile, ...], steps: int) -> Scores:
    scores: dict[str, StainScore]
    module.cpu().eval()
    if isinstance(module, Teacher):
        scores = evaluate_tiles(module.averaged(), rows, sigmas=START_SIGMAS[steps])
        cells = "cells" in module.tasks
    else:
        cells, stains = False, module.model.stain_names
        scores = {stain: StainScore(mpp=rows[0].mpp) for stain in stains}
        for row in rows:
            data = load_tile(row, stains)
            images = module.stain_tiles(data["he"][None])
            for stain, score in scores.items():
                score.add(virtual=images[stain][0], real=data[stain], mask=data[f"{stain}_mask"])
    return {
        stain: {
            name: value
            for name, value in score.metrics().items()
            if math.isfinite(value) and (cells or not name.startswith("cell_"))  # of a branch that was not trained
        }
        for stain, score in scores.items()
    }


def _code(*parts: str) -> str:
    """Of these parts of the training package; comments and layout do not count."""
    (root,) = staindiffuser.training.__path__
    digest = hashlib.sha256()
    for part in parts:
        folder = Path(root) / part
        for file in sorted(folder.rglob("*.py")) if folder.is_dir() else [folder]:
            digest.update(ast.dump(ast.parse(file.read_text(encoding="utf-8"))).encode())
    return digest.hexdigest()
