"""A new stain for a finished checkpoint: one new pair of branches on its encoder, which stays as it is to the bit."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors.torch import load_file

from staindiffuser.errors import UsageError
from staindiffuser.training.checkpoint import WEIGHTS, Checkpoint
from staindiffuser.training.config import PRESETS, TrainConfig, from_json
from staindiffuser.training.curves import curves_image
from staindiffuser.training.data.dataset import measure_stains
from staindiffuser.training.evaluation.evaluate import check_data
from staindiffuser.training.loop import (
    RunOptions,
    check_run,
    fit_teacher,
    load_tiles,
    measured,
    validation_rows,
)
from staindiffuser.training.model.network import DualDiffusion
from staindiffuser.training.module import TeacherModule
from staindiffuser.training.settings import choose_recipe
from staindiffuser.training.tiles.stain_names import is_stain_name

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
        data: paired tiles, as :func:`~.loop.train` takes them; only the new stain's columns are read.
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
    recipe = choose_recipe(from_json(TrainConfig, before, f"{base / 'config.json'}: recipe"), file, changes)
    check_run(recipe, options, base)
    tiles = load_tiles(data, recipe, options, stains=(stain,))
    alone = dataclasses.replace(config.model, stains=measure_stains(tiles))
    for part in tiles.parts:
        check_data(part, alone)
    folder = options.output / "checkpoint"
    if options.dry_run:
        return folder
    L.seed_everything(recipe.seed, verbose=False)
    module = TeacherModule(alone, recipe, encoder=checkpoint.network.encoder.state_dict())
    about = fit_teacher(module, tiles, options)
    trained = module.averaged()
    if module.trainer.is_global_zero:
        stored = load_file(base / WEIGHTS)
        model = dataclasses.replace(config.model, stains=config.model.stains + alone.stains)
        network = DualDiffusion(model).eval().requires_grad_(False)
        network.load_state_dict({**trained.cpu().state_dict(), **{n: t.float() for n, t in stored.items()}})
        sigmas = config.sigmas[str(config.steps)]
        radius, scores = measured(trained, validation_rows(tiles, recipe), sigmas)
        label = alone.stains[0].label
        added = config.provenance.get("added stains", {})
        config = dataclasses.replace(
            config,
            name=options.name or config.name,
            model=model,
            notice=f"{config.notice} Its {label} was added later, trained on {options.trained_on}.",
            effective_radius=max(radius, config.effective_radius),
            provenance={**config.provenance, "added stains": {**added, stain: about}},
        )
        old = checkpoint.metrics
        metrics = {
            **old,
            "stains": {**old.get("stains", {}), **scores["stains"]},
            "added stains": {**old.get("added stains", {}), stain: {n: scores[n] for n in ("split", "steps", "tiles")}},
        }
        # In the precision that the file had, its numbers survive the way through float32 and back.
        dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in stored.values()))
        curves = curves_image(options.output)
        Checkpoint(config=config, network=network, metrics=metrics, curves=curves).save(folder, dtype=dtype)
    return folder
