"""A new stain for a finished checkpoint: one new pair of branches on its encoder, which stays as it is to the bit."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from staindiffuser.errors import UsageError
from staindiffuser.training.checkpoint import WEIGHTS, Checkpoint
from staindiffuser.training.config import PRESETS, TrainConfig, from_json
from staindiffuser.training.curves import curves_image
from staindiffuser.training.journal import tell
from staindiffuser.training.loop import Fitted, fit
from staindiffuser.training.model.network import DualDiffusion
from staindiffuser.training.options import RunOptions, check_run, locked
from staindiffuser.training.settings import choose_recipe
from staindiffuser.training.snapshots import find_snapshot
from staindiffuser.training.teacher import TASKS, Teacher
from staindiffuser.training.tiles.stain_names import is_stain_name
from staindiffuser.training.train import ImageValidation, how_it_was_trained, measured, stains_of
from staindiffuser.training.training_data import TrainingData

__all__ = ["add_stain"]


def add_stain(
    base: Path,
    stain: str,
    data: Path | Sequence[str],
    options: RunOptions,
    *,
    file: Path | None = None,
    **changes: Any,
) -> Path:
    """Train a pair of branches for ``stain`` on the encoder of the checkpoint in ``base``.

    The new checkpoint has the old stains and the new one. What it holds of the old ones is copied from the stored
    file, and a branch does not see another, so their outputs do not change by a bit; nor does the margin that tiles
    are served with. The new stain is sampled like the old ones.

    Args:
        data: paired tiles, as :func:`~.train.train` takes them; only the new stain's columns are read.
        options: an empty ``name`` is the old checkpoint's.
        file, changes: what is to differ from the recipe that the checkpoint was trained by; see :mod:`settings`.

    Returns:
        the new checkpoint folder.

    Raises:
        CheckpointError, ConfigError, DataError: what was given cannot be used; before any training starts.
        UsageError: the stain cannot be named so or is there already; the output cannot be written.
    """
    checkpoint = Checkpoint.load(base)
    config = checkpoint.config
    if not is_stain_name(stain):
        raise UsageError(f"--stain {stain}: a name is lower-case letters, digits and _ ([a-z][a-z0-9_]*)")
    if stain in (s.name for s in config.model.stains):
        raise UsageError(f"--stain {stain}: {base} has it already")
    before = config.provenance.get("recipe", dataclasses.asdict(PRESETS["demo"].train))
    recipe = choose_recipe(
        from_json(TrainConfig, _with_images(before), f"{base / 'config.json'}: recipe"), file, changes
    )
    check_run(recipe, options, base)
    first = find_snapshot(options.output, options.resume, tell)
    checked = TrainingData.open(
        data, recipe, stains=(stain,), decode=options.dry_run or first is None, fold=options.fold
    )
    alone = dataclasses.replace(config.model, stains=stains_of(first, checked) or checked.measure_stains())
    checked.check_fits(alone)
    torch.manual_seed(recipe.seed)
    teacher = Teacher(alone, recipe, encoder=checkpoint.network.encoder.state_dict())
    sigmas = config.sigmas[str(config.steps)]
    with locked(options):
        validation = ImageValidation(checked.validation, sigmas)
        fitted = fit(teacher, checked.dataset, recipe, options, first=first, validation=validation, data=checked.digest)
        if fitted and fitted.first:
            _save(base, checkpoint, recipe, checked, fitted, options)
    return options.output / "checkpoint"


def _with_images(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of a pair of branches: the checkpoint's last one may have been of its cells alone, and what a cell map
    is none the worse for makes images soft or shows them seams.

    Args:
        recipe: fields of :class:`TrainConfig`.
    """
    if "images" in recipe.get("tasks", TASKS):
        return dict(recipe)
    both = {**recipe, "tasks": TASKS, "mosaic": 0.0, "jigsaw": 0.0, "white_glass": True}
    return {**both, "augmentation": "wide"} if recipe["augmentation"] == "wider" else both


def _save(
    base: Path, checkpoint: Checkpoint, recipe: TrainConfig, data: TrainingData, fitted: Fitted, options: RunOptions
) -> None:
    """Write the old checkpoint with the new stain."""
    config, trained = checkpoint.config, fitted.network.cpu()
    added = trained.config.stains[0]
    stored = load_file(base / WEIGHTS)
    model = dataclasses.replace(config.model, stains=(*config.model.stains, added))
    network = DualDiffusion(model).eval().requires_grad_(False)
    network.load_state_dict({**trained.state_dict(), **checkpoint.network.state_dict()})
    radius, scores = measured(trained, data.validation, config.sigmas[str(config.steps)])
    earlier = config.provenance.get("added stains", {})
    about = {**earlier, added.name: how_it_was_trained(recipe, data, fitted)}
    old = checkpoint.metrics
    metrics = {
        **old,
        "stains": {**old.get("stains", {}), **scores["stains"]},
        "added stains": {
            **old.get("added stains", {}),
            added.name: {n: scores[n] for n in ("split", "steps", "tiles")},
        },
    }
    config = dataclasses.replace(
        config,
        name=options.name or config.name,
        model=model,
        notice=f"{config.notice} Its {added.label} was added later, trained on {options.trained_on}.",
        effective_radius=max(radius, config.effective_radius),
        provenance={**config.provenance, "added stains": about},
    )
    # In the precision that the file had, its numbers survive the way through float32 and back.
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in stored.values()))
    Checkpoint(
        config=config,
        network=network,
        metrics=metrics,
        curves=curves_image(options.output),
        seen=data.seen(checkpoint.seen),
    ).save(options.output / "checkpoint", dtype=dtype)
