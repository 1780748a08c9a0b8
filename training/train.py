"""Train a teacher: tiles in, checkpoint out."""

from __future__ import annotations

import dataclasses
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from staindiffuser import __version__
from staindiffuser.errors import UsageError
from staindiffuser.training.checkpoint import NOTICE, Checkpoint, CheckpointConfig
from staindiffuser.training.config import ModelConfig, Preset, StainConfig, TrainConfig, from_json
from staindiffuser.training.curves import curves_image
from staindiffuser.training.data.targets import load_tile
from staindiffuser.training.diffusion.samplers import START_SIGMAS
from staindiffuser.training.evaluation.evaluate import evaluate_tiles
from staindiffuser.training.journal import Journal, tell
from staindiffuser.training.loop import Fitted, fit
from staindiffuser.training.model.network import DualDiffusion
from staindiffuser.training.model.widening import can_widen, widened
from staindiffuser.training.options import RunOptions, check_run, locked
from staindiffuser.training.receptive import default_margin, effective_radius, theoretical_radius
from staindiffuser.training.snapshots import Snapshot, find_snapshot
from staindiffuser.training.teacher import Teacher
from staindiffuser.training.tiles.paired_tiles import PairedTile
from staindiffuser.training.training_data import TrainingData

__all__ = ["ImageValidation", "how_it_was_trained", "measured", "stains_of", "train"]

VALIDATION_STEPS = 2


def train(preset: Preset, data: Path | Sequence[str], options: RunOptions, *, stains: Sequence[str] = ()) -> Path:
    """Train a teacher on paired tiles.

    Args:
        data: a folder, or several, each with its weight (see :func:`open_tiles`).
        stains: the columns to learn; by default those of the checkpoint that the run begins with, or all.

    Returns:
        the finished checkpoint folder.

    Raises:
        CheckpointError, DataError: a start or data that cannot be used; before any training starts.
        UsageError: the output cannot be written, a finished run is there, or the start does not fit into the preset.
        DivergedError: the training diverged.
    """
    recipe, folder = preset.train, options.output / "checkpoint"
    check_run(recipe, options, options.start)
    start = Checkpoint.load(options.start) if options.start else None
    first = find_snapshot(options.output, options.resume, tell)
    names = tuple(stains) or (start.config.model.stain_names if start else ())
    checked = TrainingData.open(data, recipe, stains=names, decode=options.dry_run or first is None, fold=options.fold)
    model = preset.model
    if not model.stains:
        model = dataclasses.replace(model, stains=_stains(start, first, checked))
    if start and not can_widen(start.config.model, model):
        raise UsageError(
            f"--from {options.start}: its encoder is not the preset's: choose the preset it is of (stains and a "
            "backbone may be added, nothing else)"
        )
    checked.check_fits(model)
    torch.manual_seed(recipe.seed)
    state, fresh = widened(start.network, model) if start else (None, ())
    if fresh:
        tell(f"beginning anew: {', '.join(fresh)}")
    teacher = Teacher(model, recipe, start=state)
    sigmas = START_SIGMAS[VALIDATION_STEPS]
    with locked(options):
        validation = ImageValidation(
            checked.validation, sigmas, by="dab_dice" if "images" in recipe.tasks else "cell_dice"
        )
        fitted = fit(teacher, checked.dataset, recipe, options, first=first, validation=validation, data=checked.digest)
        if fitted is None or not fitted.first:
            return folder
        radius, metrics = measured(fitted.network, checked.validation, sigmas)
        provenance = how_it_was_trained(recipe, checked, fitted)
        if model.backbone != "none" and (start is None or start.config.model.backbone == "none"):
            provenance["encoder begun with"] = "EfficientNet-Lite0, trained on ImageNet (Apache-2.0)"
        if start:
            provenance["begun with"] = {"name": start.config.name, **start.config.provenance}
        if fresh:
            provenance["begun anew"] = list(fresh)
        about = CheckpointConfig(
            name=options.name,
            model=model,
            notice=NOTICE.format(trained_on=options.trained_on),
            margin=default_margin(radius, CheckpointConfig.tile),
            receptive_radius=theoretical_radius(model),
            effective_radius=radius,
            provenance=provenance,
        )
        Checkpoint(
            config=about,
            network=fitted.network.cpu(),
            metrics=metrics,
            curves=curves_image(options.output),
            seen=checked.seen(start.seen if start else None),
        ).save(folder)
    return folder


def _stains(start: Checkpoint | None, first: Snapshot | None, data: TrainingData) -> tuple[StainConfig, ...]:
    """The stains of the data: with the constants of the checkpoint or the snapshot that has them, else measured."""
    known = {stain.name: stain for stain in start.config.model.stains} if start else {}
    found = tuple(known[name] for name in data.tiles.stains if name in known)
    if len(found) == len(data.tiles.stains):
        return found
    return stains_of(first, data) or tuple(known.get(stain.name, stain) for stain in data.measure_stains())


def stains_of(first: Snapshot | None, data: TrainingData) -> tuple[StainConfig, ...]:
    """The stains of the run that left the snapshot, with its constants, if they are those of the data."""
    model = first.run["starts_from"].get("model") if first else None
    stains = from_json(ModelConfig, model, str(first.path)).stains if first and model else ()
    return stains if tuple(stain.name for stain in stains) == data.tiles.stains else ()


@dataclass(frozen=True)
class ImageValidation:
    """DAB-Dice and the other quick metrics on validation tiles, and some of the images for TensorBoard."""

    rows: tuple[PairedTile, ...]
    sigmas: tuple[float, ...]
    shown: int = 4
    by: Literal["dab_dice", "cell_dice"] = "dab_dice"
    """What the best weights are chosen by: of the images, or where only cells are trained, of the cell maps."""

    def __call__(self, network: DualDiffusion, step: int, journal: Journal) -> float:
        """The mean Dice over the stains in which there is something to find; NaN if there is nothing."""
        images: list[Any] = []

        def keep(row: PairedTile, data: dict[str, Any], result: dict[str, Any]) -> None:
            if len(images) < self.shown:
                panels = [data["he"]]
                for stain in network.config.stains:
                    cells = np.repeat(result[f"CELLS_{stain.name.upper()}"], 3, axis=2)
                    panels += [data[stain.name], result[f"STAIN_{stain.name.upper()}"], cells]
                images.append(np.concatenate(panels, axis=1))

        scores = {
            s: score.metrics() for s, score in evaluate_tiles(network, self.rows, sigmas=self.sigmas, seen=keep).items()
        }
        journal.log(
            {
                f"val/{metric}/{stain}": value
                for stain, values in scores.items()
                for metric, value in values.items()
                if self.by == "dab_dice" or metric.startswith("cell_")  # images that are not trained say nothing
            },
            step,
        )
        journal.image("val/he_real_virtual_cells", images, step)
        dice = [v[self.by] for v in scores.values() if math.isfinite(v[self.by])]
        return sum(dice) / len(dice) if dice else math.nan


def how_it_was_trained(recipe: TrainConfig, data: TrainingData, fitted: Fitted) -> dict[str, Any]:
    """A run's part of a checkpoint's provenance."""
    best = fitted.best
    return {
        "recipe": dataclasses.asdict(recipe),
        "data": data.provenance(fitted.data_changes),
        "weights": {
            "of step": fitted.step,
            **({"best validation": round(best.score, 4), "at step": best.step} if best else {}),
        },
        "seconds of the last sitting": round(fitted.seconds, 1),
        "speed": fitted.speed,
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}",
        "versions": {"staindiffuser": __version__, "torch": str(torch.__version__)},
    }


def measured(
    network: DualDiffusion, rows: tuple[PairedTile, ...], sigmas: tuple[float, ...]
) -> tuple[int, dict[str, Any]]:
    """The radius of influence in pixels, and the validation scores, of a finished network."""
    stains = network.config.stain_names
    he = np.stack([load_tile(row, stains)["he"] for row in rows[:8]])
    scores = evaluate_tiles(network, rows, sigmas=sigmas)
    metrics = {name: score.metrics() for name, score in scores.items()}
    about = {"split": "val", "steps": len(sigmas), "tiles": len(rows), "stains": metrics}
    return effective_radius(network, he, sigmas=sigmas), about
