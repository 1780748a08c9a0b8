"""The mean of two checkpoints' weights, where the second was trained further from the first.

What a network gains at home by being trained further, it pays for elsewhere; weights between the two keep most of the
gain at a part of the price (Wortsman et al. 2022, arXiv 2109.01903).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from staindiffuser.errors import UsageError
from staindiffuser.training.checkpoint import Checkpoint, tensors_sha256

__all__ = ["average_checkpoints"]


def average_checkpoints(first: Path, second: Path, output: Path, *, share: float = 0.5, name: str = "") -> Path:
    """Write the checkpoint whose weights are (1 - share) of the first's and ``share`` of the second's, its cell
    branches kept free of a grid as in training.

    Scores, temperatures and thresholds are neither's and are left out.

    Args:
        name: the second's if not given.

    Returns:
        ``output``.

    Raises:
        CheckpointError: one cannot be read.
        UsageError: the two are of different models, or the output cannot be written or is there already.
    """
    if not 0 < share < 1:
        raise UsageError(f"--share {share}: must be between 0 and 1")
    if output.exists():
        raise UsageError(f"--output {output} is there already: choose another")
    one, other = Checkpoint.load(first), Checkpoint.load(second)
    if one.config.model != other.config.model:
        raise UsageError(
            f"{first} and {second} are of different models: weights can be averaged where the second was trained "
            "--from the first"
        )
    before, after = one.network.state_dict(), other.network.state_dict()
    other.network.load_state_dict({key: before[key].lerp(tensor, share) for key, tensor in after.items()})
    other.network.project_heads_("cells")  # the mean of two that have none has a little
    about: dict[str, Any] = {"share of these": share, "SHA-256 of the others": tensors_sha256(before.items())}
    if not _began_with(other.config.provenance, one.config.provenance):
        about["the others"] = one.config.provenance
    config = dataclasses.replace(
        other.config,
        name=name or other.config.name,
        effective_radius=max(one.config.effective_radius, other.config.effective_radius),
        temperatures={},
        thresholds={},
        provenance={**other.config.provenance, "mean of weights": about},
    )
    seen = other.seen | one.seen if other.seen else one.seen
    Checkpoint(config=config, network=other.network, seen=seen).save(output)
    return output


def _began_with(provenance: dict[str, Any], earlier: dict[str, Any]) -> bool:
    """Whether the one's history already has the other's."""
    while begun := provenance.get("begun with"):
        if {key: value for key, value in begun.items() if key != "name"} == earlier:
            return True
        provenance = begun
    return False
