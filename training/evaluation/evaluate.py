"""Score a checkpoint on paired tiles that it never saw."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from staindiffuser.errors import UsageError
from staindiffuser.files import finite
from staindiffuser.imaging.instances import HALF
from staindiffuser.training.checkpoint import Checkpoint
from staindiffuser.training.config import ModelConfig
from staindiffuser.training.data.targets import load_tile
from staindiffuser.training.errors import DataError
from staindiffuser.training.evaluation.cell_scores import CellScore, measure_nuclei
from staindiffuser.training.evaluation.feature_distances import Networks
from staindiffuser.training.evaluation.metrics import StainScore
from staindiffuser.training.evaluation.scoring import KID_TILES, ScoredTile, Stainer, inner, score_tiles
from staindiffuser.training.evaluation.slides import SlideScore, scores_by_slide
from staindiffuser.training.infer import HEUN_STEPS, Sampler, stain_tiles_with
from staindiffuser.training.model.network import DualDiffusion
from staindiffuser.training.tiles.paired_tiles import PairedTile, PairedTiles, Split, spread

__all__ = [
    "Evaluation",
    "check_data",
    "evaluate",
    "evaluate_steps",
    "evaluate_tiles",
    "restain",
    "sampler_of",
    "summarize",
]


def check_data(tiles: PairedTiles, model: ModelConfig) -> None:
    """Refuse data that the model cannot use: a stain is missing, or the pixel size differs.

    Raises:
        DataError: names the row and the field.
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


def _stainer(network: DualDiffusion, samplers: Sequence[Sampler]) -> Stainer:
    """A stainer for tiles whose origin is (0, 0)."""
    return lambda he, seeds: stain_tiles_with(
        network, he, samplers=samplers, seeds=seeds, origins=np.zeros((len(he), 2), np.int64)
    )


def evaluate_tiles(
    network: DualDiffusion,
    rows: Sequence[PairedTile],
    *,
    sigmas: Sampler,
    seed: int = 0,
    batch: int = 4,
    seen: Callable[[PairedTile, dict[str, Any], dict[str, Any]], None] | None = None,
) -> dict[str, StainScore]:
    """Stain ``rows`` with one sampler and score each stain by the quick metrics.

    Args:
        seed: noise seed of the first tile; tile n gets ``seed`` + n. Every tile has the origin (0, 0).
        seen: called with each tile, its data and its results, for figures.
    """
    return score_tiles(
        _stainer(network, [sigmas]),
        rows,
        stains=network.config.stain_names,
        seed=seed,
        batch=batch,
        seen=None if seen is None else lambda tile: seen(tile.row, tile.data, tile.results[0]),
    )[0]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A checkpoint scored at one step count."""

    checkpoint: Checkpoint
    rows: tuple[PairedTile, ...]
    split: Split
    steps: int
    seed: int
    seconds: float
    """Wall-clock time of the whole run, all step counts together."""
    scores: Mapping[str, StainScore]
    margin: int = 0
    """Width of the border that was stained but not scored, pixels."""
    networks: Mapping[str, str] = field(default_factory=dict)
    """Feature networks: name to weights."""
    cells: Mapping[str, CellScore] = field(default_factory=dict)
    """Scores per cell; empty in a quick evaluation."""
    trained_on: Mapping[str, int] | None = None
    """How many of the tiles the model was trained on, by content, slide and patient; None if that is not known."""

    def head(self) -> dict[str, Any]:
        """What all step counts of a run share."""
        return {
            "model": self.checkpoint.config.name,
            "split": self.split,
            "tiles": len(self.rows),
            "kid_tiles": min(len(self.rows), KID_TILES),
            "seed": self.seed,
            "margin": self.margin,
            "seconds": round(self.seconds, 2),
            "networks": dict(self.networks),
            "trained_on": self.trained_on and dict(self.trained_on),
        }

    def slides(self, stain: str) -> list[SlideScore]:
        """A stain's score on each slide."""
        return scores_by_slide(self.rows, self.scores[stain])

    def figures(self) -> dict[str, Any]:
        """The metrics per stain; ``intervals_95`` are bootstrap intervals over tiles. Undefined values are None.

        ``counts`` are the sample sizes behind them: see :meth:`StainScore.counts`.
        """
        return {
            "steps": self.steps,
            "stains": {stain: finite(score.metrics()) for stain, score in self.scores.items()},
            "intervals_95": {stain: finite(score.intervals()) for stain, score in self.scores.items()},
            "counts": {stain: score.counts() for stain, score in self.scores.items()},
            "cells": {stain: _cell_figures(score) for stain, score in self.cells.items()},
            "slides": {stain: [slide.figures() for slide in self.slides(stain)] for stain in self.scores},
        }

    def summary(self) -> dict[str, Any]:
        """All numbers, ready for JSON."""
        return self.head() | self.figures()


def _cell_figures(score: CellScore) -> dict[str, Any]:
    """The scores per cell of one stain, ready for JSON."""
    return {
        "threshold": score.threshold,
        "metrics": finite(score.metrics()),
        "intervals_95": finite(score.intervals()),
        "counts": score.counts(),
        "reliability": score.reliability(),
        "better_than_hematoxylin": score.passes(),
    }


def summarize(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """All step counts of a run, ready for JSON: what they share, and their ``results``."""
    return evaluations[0].head() | {"results": [evaluation.figures() for evaluation in evaluations]}


def restain(evaluations: Sequence[Evaluation], index: int) -> ScoredTile:
    """Stain tile ``index`` again, as it was when it was scored; one result per evaluation of the run."""
    first = evaluations[0]
    row = first.rows[index]
    data = load_tile(row, tuple(first.scores))
    stainer = _stainer(first.checkpoint.network, [sampler_of(e.checkpoint, e.steps) for e in evaluations])
    results = stainer(data["he"][None], np.array([[first.seed + index]]))
    return ScoredTile(
        row=row,
        number=index,
        data=inner(data, first.margin),
        results=[inner({name: a[0] for name, a in r.items()}, first.margin) for r in results],
    )


def evaluate(
    checkpoint: Checkpoint,
    tiles: PairedTiles,
    *,
    steps: int,
    split: Split = "test",
    limit: int | None = None,
    seed: int = 0,
) -> Evaluation:
    """Score a checkpoint at one step count; see :func:`evaluate_steps`."""
    return evaluate_steps(checkpoint, tiles, steps=[steps], split=split, limit=limit, seed=seed)[0]


def evaluate_steps(
    checkpoint: Checkpoint,
    tiles: PairedTiles,
    *,
    steps: Sequence[int],
    split: Split = "test",
    limit: int | None = None,
    seed: int = 0,
    batch: int = 4,
    detail: bool = True,
    networks: Networks | None = None,
    margin: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Evaluation, ...]:
    """Score a checkpoint at several step counts, on the same tiles and from the same noise.

    Args:
        limit: at most this many tiles, evenly spread over the split.
        detail: also compute the slower metrics of edges and cells.
        networks: feature networks for KID, FID and LPIPS.
        margin: width of the border that is stained but not scored, pixels.
        progress: called with the number of tiles done and the total.

    Raises:
        DataError: the split is empty or the data does not fit the model.
        UsageError: no sampler of that many steps.
    """
    check_data(tiles, checkpoint.config.model)
    samplers = [sampler_of(checkpoint, k) for k in steps]
    stains = checkpoint.config.model.stain_names
    rows = tuple(row for row in tiles.split(split) if row.has_images(stains))
    if not rows:
        raise DataError(
            f"{tiles.folder / 'tiles.csv'}: no rows in split {split!r} with an image of {', '.join(stains)}; choose "
            "another with --split"
        )
    if limit is not None:
        rows = spread(rows, limit)
    done = 0
    thresholds = checkpoint.config.thresholds
    cells = [{stain: CellScore(threshold=thresholds.get(stain, HALF)) for stain in stains if detail} for _ in samplers]

    def seen(tile: ScoredTile) -> None:
        nonlocal done
        done += 1
        if detail:
            _add_cells(cells, tile)
        if progress is not None:
            progress(done, len(rows))

    trained_on = checkpoint.seen.overlap(rows) if checkpoint.seen else None
    start = time.perf_counter()
    scores = score_tiles(
        _stainer(checkpoint.network, samplers),
        rows,
        stains=checkpoint.config.model.stain_names,
        samplers=len(samplers),
        seed=seed,
        batch=batch,
        detail=detail,
        networks=networks,
        margin=margin,
        thresholds=thresholds,
        seen=seen,
    )
    seconds = time.perf_counter() - start
    return tuple(
        Evaluation(
            checkpoint=checkpoint,
            rows=rows,
            split=split,
            steps=k,
            seed=seed,
            seconds=seconds,
            scores=score,
            margin=margin,
            networks=networks.identities() if networks else {},
            cells=of_cells,
            trained_on=trained_on,
        )
        for k, score, of_cells in zip(steps, scores, cells, strict=True)
    )


def _add_cells(cells: Sequence[Mapping[str, CellScore]], tile: ScoredTile) -> None:
    """Score the cells of a tile: per sampler and stain."""
    found = measure_nuclei(tile.data["he"], tile.row.mpp)
    for scores, result in zip(cells, tile.results, strict=True):
        for stain, score in scores.items():
            score.add(
                tile.row.slide,
                found,
                real=tile.data[stain],
                mask=tile.data[f"{stain}_mask"],
                virtual=result[f"STAIN_{stain.upper()}"],
                cells=result[f"CELLS_{stain.upper()}"][..., 0],
            )
