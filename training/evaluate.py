"""Score a checkpoint on paired tiles that it never saw."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from staindiffuser.errors import UsageError
from staindiffuser.training.checkpoint import Checkpoint
from staindiffuser.training.config import ModelConfig
from staindiffuser.training.data.dataset import load_tile
from staindiffuser.training.data.pairs import PairedTile, PairedTiles, Split
from staindiffuser.training.errors import DataError
from staindiffuser.training.infer import HEUN_STEPS, Sampler, stain_tiles
from staindiffuser.training.metrics import StainScore
from staindiffuser.training.model.network import DualDiffusion

__all__ = ["Evaluation", "check_data", "evaluate", "evaluate_tiles", "sampler_of"]


def check_data(tiles: PairedTiles, model: ModelConfig) -> None:
    """Refuse data that the model cannot use: another pixel size, a stain that is missing, an odd tile size.

    Raises:
        DataError: naming the row and the field.
    """
    path = tiles.folder / "tiles.csv"
    for stain in model.stains:
        if stain.name not in tiles.stains:
            raise DataError(f"{path}: no column {stain.name!r}, which the model was trained for; it has {tiles.stains}")
    for tile in tiles.tiles:
        if abs(tile.mpp / model.mpp - 1) > 0.02:
            raise DataError(
                f"{path}, row {tile.row}: mpp is {tile.mpp}, the model's is {model.mpp}; resample the tiles first"
            )


def sampler_of(checkpoint: Checkpoint, steps: int) -> Sampler:
    """Noise levels for ``steps`` steps: the checkpoint's few-step ones, or None (Heun) for 18.

    Raises:
        UsageError: the checkpoint has no sampler of that many steps.
    """
    if steps == HEUN_STEPS:
        return None
    try:
        return checkpoint.config.sigmas[str(steps)]
    except KeyError:
        known = ", ".join([*checkpoint.config.sigmas, str(HEUN_STEPS)])
        raise UsageError(f"--steps {steps}: this checkpoint has samplers of {known} steps") from None


def evaluate_tiles(
    network: DualDiffusion,
    rows: Sequence[PairedTile],
    *,
    sigmas: Sampler,
    seed: int = 0,
    batch: int = 4,
    seen: Callable[[PairedTile, dict[str, Any], dict[str, Any]], None] | None = None,
) -> dict[str, StainScore]:
    """Stain ``rows`` and score each stain.

    Args:
        seed: of the noise; every tile has the origin (0, 0) and the seed ``seed`` + its place in the list.
        seen: called with each tile, its data and its results (for pictures).
    """
    stains = tuple(stain.name for stain in network.config.stains)
    scores = {stain: StainScore() for stain in stains}
    for start in range(0, len(rows), batch):
        chunk = rows[start : start + batch]
        data = [load_tile(row, stains) for row in chunk]
        results = stain_tiles(
            network,
            np.stack([d["he"] for d in data]),
            sigmas=sigmas,
            seeds=np.arange(seed + start, seed + start + len(chunk), dtype=np.int64)[:, None],
            origins=np.zeros((len(chunk), 2), np.int64),
        )
        for i, row in enumerate(chunk):
            result = {name: array[i] for name, array in results.items()}
            for stain in stains:
                scores[stain].add(
                    virtual=result[f"STAIN_{stain.upper()}"],
                    real=data[i][stain],
                    cells=result[f"CELLS_{stain.upper()}"][..., 0],
                    mask=data[i][f"{stain}_mask"],
                )
            if seen:
                seen(row, data[i], result)
    return scores


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A scored checkpoint."""

    checkpoint: Checkpoint
    rows: tuple[PairedTile, ...]
    split: Split
    steps: int
    seed: int
    seconds: float
    scores: Mapping[str, StainScore]

    def summary(self) -> dict[str, Any]:
        """Everything but pictures, ready for JSON; ``intervals_95`` are bootstrap intervals over tiles."""
        return {
            "model": self.checkpoint.config.name,
            "steps": self.steps,
            "split": self.split,
            "tiles": len(self.rows),
            "seed": self.seed,
            "seconds": round(self.seconds, 2),
            "stains": {name: score.metrics() for name, score in self.scores.items()},
            "intervals_95": {name: score.intervals() for name, score in self.scores.items()},
        }

    def restain(self, index: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """The data of tile ``index`` and the results that it was scored by."""
        stains = tuple(stain.name for stain in self.checkpoint.config.model.stains)
        data = load_tile(self.rows[index], stains)
        results = stain_tiles(
            self.checkpoint.network,
            data["he"][None],
            sigmas=sampler_of(self.checkpoint, self.steps),
            seeds=np.array([[self.seed + index]]),
            origins=np.zeros((1, 2), np.int64),
        )
        return data, {name: result[0] for name, result in results.items()}


def evaluate(
    checkpoint: Checkpoint,
    tiles: PairedTiles,
    *,
    steps: int,
    split: Split = "test",
    limit: int | None = None,
    seed: int = 0,
) -> Evaluation:
    """Score a checkpoint; see :func:`evaluate_tiles`.

    Raises:
        DataError: the split is empty or the data does not fit the model.
        UsageError: no sampler of that many steps.
    """
    check_data(tiles, checkpoint.config.model)
    rows = tiles.split(split)[:limit]
    if not rows:
        raise DataError(f"{tiles.folder / 'tiles.csv'}: no rows in split {split!r}; choose another with --split")
    start = time.perf_counter()
    scores = evaluate_tiles(checkpoint.network, rows, sigmas=sampler_of(checkpoint, steps), seed=seed)
    return Evaluation(
        checkpoint=checkpoint,
        rows=rows,
        split=split,
        steps=steps,
        seed=seed,
        seconds=time.perf_counter() - start,
        scores=scores,
    )
