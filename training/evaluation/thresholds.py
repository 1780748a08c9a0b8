"""The threshold of a stain's cell map: from which probability on it shows a cell, chosen on validation tiles.

What counts is the F1 of positive cells, whose probability is the mean of the map over their nucleus, as in
``cell_scores``. A probability may be right and one half still be the wrong place to cut: for calibrated probabilities
the best is half of the F1 that it reaches (Lipton et al., ECML 2014), so the harder a stain, the lower. But there the
F1 hardly depends on the threshold, and the number of cells does: so of those whose F1 is within 0.01 of the best the
one nearest to one half is taken. And few slides choose badly: one half stays unless the gain over it is above zero in a
bootstrap over slides (its 95 % interval). A stain with too few cells, or one slide, keeps the threshold that it had.

Shapes: S slides; T thresholds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from staindiffuser.imaging.instances import HALF
from staindiffuser.training.checkpoint import Checkpoint
from staindiffuser.training.evaluation.calibration import FEWEST
from staindiffuser.training.evaluation.cell_scores import CellScore
from staindiffuser.training.evaluation.evaluate import evaluate_steps
from staindiffuser.training.evaluation.metrics import Interval
from staindiffuser.training.evaluation.record import save_again
from staindiffuser.training.journal import tell
from staindiffuser.training.tiles.paired_tiles import PairedTiles

__all__ = ["ChosenThreshold", "best_threshold", "choose_thresholds"]

CANDIDATES = np.arange(5, 96) / 100
NEAR = 0.01
"""Below the best F1 (ours)."""
SAMPLES = 1000
_AT_HALF = int(np.flatnonzero(CANDIDATES == HALF)[0])


@dataclass(frozen=True, kw_only=True)
class ChosenThreshold:
    """Of one stain."""

    threshold: float
    kept: bool = False
    """It is the one from before: there were too few cells or slides to choose by."""
    candidate: float = HALF
    """The one nearest to one half whose F1 is near the best."""
    best: float = HALF
    """That of the best F1."""
    f1_at_half: float | None = None
    """None with too few cells."""
    f1_at_candidate: float | None = None
    f1_at_best: float | None = None
    gain_95: Interval | None = None
    """Interval of the candidate's F1 minus that of one half; None with one slide, or too few cells."""
    cells: int
    positive_cells: int
    slides: int


def choose_thresholds(
    folder: Path,
    tiles: PairedTiles,
    *,
    limit: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Mapping[str, ChosenThreshold]:
    """Choose the thresholds of a checkpoint's cell maps on validation tiles, and write them into the checkpoint.

    Args:
        folder: the checkpoint's.
        tiles: whose validation split is used.
        limit: at most this many tiles, evenly spread.
        seed: noise seed of the first tile.
        progress: called with the number of tiles done and the total.

    Returns:
        What was chosen, by stain.

    Raises:
        CheckpointError, DataError: something cannot be read, or there are no validation tiles of the model's stains.
    """
    checkpoint = Checkpoint.load(folder)
    (evaluation,) = evaluate_steps(
        checkpoint,
        tiles,
        steps=[checkpoint.config.steps],
        split="val",
        limit=limit,
        seed=seed,
        progress=progress,
    )
    found = {stain: best_threshold(score) for stain, score in evaluation.cells.items()}
    for stain, one in found.items():
        if one.kept:
            tell(f"{stain}: too few cells or slides to choose by; its threshold stays {one.threshold:g}")
    record = {
        "split": "val",
        "tiles": len(evaluation.rows),
        "stains": {stain: dataclasses.asdict(one) for stain, one in found.items()},
    }
    thresholds = {stain: one.threshold for stain, one in found.items() if one.threshold != HALF}
    chosen = dataclasses.replace(
        checkpoint,
        config=dataclasses.replace(checkpoint.config, thresholds=thresholds),
        metrics={**checkpoint.metrics, "thresholds": record},
    )
    save_again(chosen, folder)
    return found


def best_threshold(score: CellScore) -> ChosenThreshold:
    """The threshold near the best F1, if slides agree that it is better than one half; the old one if none can say."""
    counts = score.counts()
    chosen = ChosenThreshold(
        threshold=score.threshold,
        kept=True,
        cells=counts["cells"],
        positive_cells=counts["positive_cells"],
        slides=counts["slides"],
    )
    if min(counts["positive_cells"], counts["cells"] - counts["positive_cells"]) < FEWEST:
        return chosen
    counts_3ST = _counted(score)
    f1_T = _f1(counts_3ST.sum(axis=1))
    best = int(f1_T.argmax())
    near = np.flatnonzero(f1_T >= f1_T[best] - NEAR)
    candidate = int(near[np.abs(near - _AT_HALF).argmin()])
    chosen = dataclasses.replace(
        chosen,
        candidate=float(CANDIDATES[candidate]),
        best=float(CANDIDATES[best]),
        f1_at_half=float(f1_T[_AT_HALF]),
        f1_at_candidate=float(f1_T[candidate]),
        f1_at_best=float(f1_T[best]),
    )
    slides = counts_3ST.shape[1]
    if slides < 2:
        return chosen
    drawn = np.random.default_rng(0).integers(slides, size=(SAMPLES, slides))
    f1 = np.stack([_f1(counts_3ST[:, slides_of_it].sum(axis=1)) for slides_of_it in drawn])
    low, high = np.quantile(f1[:, candidate] - f1[:, _AT_HALF], [0.025, 0.975]).tolist()
    threshold = chosen.candidate if low > 0 else HALF
    return dataclasses.replace(chosen, threshold=threshold, kept=False, gain_95=(low, high))


def _counted(score: CellScore) -> NDArray[np.float64]:
    """Per slide and threshold, cells that are positive and called so, that are called so, and that are: [3, S, T]."""
    names = {name: number for number, name in enumerate(dict.fromkeys(score.slides))}
    counts = np.zeros((3, len(names), len(CANDIDATES)))
    for slide, tile in zip(score.slides, score.tiles, strict=True):
        above_NT = tile["map"][:, None] >= CANDIDATES
        counts[:, names[slide]] += np.stack(
            [tile["truth"] @ above_NT, above_NT.sum(axis=0), np.full(len(CANDIDATES), tile["truth"].sum())]
        )
    return counts


def _f1(counts_3T: NDArray[np.float64]) -> NDArray[np.float64]:
    both, called, true = counts_3T
    result: NDArray[np.float64] = 2 * both / np.maximum(called + true, 1)
    return result
