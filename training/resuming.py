"""What a run was begun with stands in its snapshots, so that another run does not go on from them unnoticed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import lightning as L
import torch

from staindiffuser.errors import UsageError
from staindiffuser.training.config import TrainConfig

__all__ = ["KEY", "begun_with", "check_snapshot"]

KEY = "begun_with"
"""Where it stands in a snapshot."""
_FREE = {"accumulate", "workers", "checkpoint_minutes", "checkpoint_steps", "validate_every", "validation_tiles"}
"""Fields of a recipe that may change on the way: they do not decide what is learned."""


def begun_with(module: L.LightningModule, config: TrainConfig) -> dict[str, Any]:
    """What decides a run besides its tiles: the kind of module, what it starts from, and the recipe."""
    own = getattr(module, "starts_from", {})
    return {"kind": type(module).__name__, "starts_from": own, "recipe": dataclasses.asdict(config)}


def check_snapshot(path: Path, run: dict[str, Any], *, same_recipe: bool) -> None:
    """Refuse a snapshot of another run.

    Args:
        path: the snapshot.
        run: :func:`begun_with` of the run that is to go on from it.
        same_recipe: whether that is the very run that left it.

    Raises:
        UsageError: it is no snapshot, or one of another run.
    """
    try:
        # weights_only: it is this user's own, and holds the state of the optimiser and of the loop besides tensors.
        snapshot = torch.load(path, map_location="cpu", weights_only=False, mmap=True)
    except Exception as error:
        raise UsageError(f"{path} cannot be resumed from: {error}") from error
    before = snapshot.get(KEY) if isinstance(snapshot, dict) else None
    if not isinstance(before, dict):
        raise UsageError(f"{path} is not a snapshot of a run of this version: choose another --output or --resume")
    if before["kind"] != run["kind"]:
        raise UsageError(f"{path} is of another kind of run ({before['kind']}): choose another --output")
    for what, value in run["starts_from"].items():
        if before["starts_from"].get(what) != value:
            raise UsageError(f"{path}: the run was begun with another {what}: choose another --output")
    if same_recipe:
        for name, value in run["recipe"].items():
            old = before["recipe"].get(name)
            if name not in _FREE and old != value:
                raise UsageError(
                    f"{path}: the run was begun with {name} = {old!r}, not {value!r}: choose another --output "
                    "(and --resume this snapshot, to start from its weights)"
                )
