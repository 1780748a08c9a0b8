"""Is the right cell called positive? Scores per cell, on nuclei that are found in the H&E and not in our own output.

A cell is positive if most of its nucleus is in the tile's coarse mask. Four scores try to tell positive cells: the cell
map (mean probability over the nucleus), the virtual image (mean DAB density over the nucleus and a ring around it), and
two baselines that need no network: the nucleus' hematoxylin density and the eosin density around it. On real tissue
hematoxylin alone tells CD3-positive cells with an AUROC of 0.65 to 0.87, so a score means little without it.

Intervals are from a bootstrap over slides (or regions): cells and tiles of a slide are not independent.

Shapes: N cells.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.instances import HALF
from staindiffuser.imaging.nuclei import grown, label_means, nuclei_of_he
from staindiffuser.imaging.optical_density import DAB_THRESHOLD, dab_density, he_densities
from staindiffuser.training.evaluation.metrics import Interval

__all__ = [
    "CELL_METRICS",
    "GATE_MARGIN",
    "CellScore",
    "Nuclei",
    "auroc",
    "calibration_error",
    "measure_nuclei",
    "reliability",
]

Values = NDArray[np.float64]

CELL_METRICS: Mapping[str, str] = {
    "map_auroc": "Area under the ROC curve of the cell map: how often a positive cell scores above a negative one.",
    "image_auroc": "The same of the virtual image's DAB density.",
    "hematoxylin_auroc": "The same of the baseline: hematoxylin density of the nucleus, in the H&E.",
    "eosin_auroc": "The same of the baseline: eosin density of the cell, in the H&E.",
    "map_f1": "F1 of the positive cells where the cell map says at least the model's threshold, one half or as chosen.",
    "map_best_f1": "F1 at the threshold that is best on these cells: an upper bound, not a result.",
    "map_best_threshold": "That threshold.",
    "image_best_f1": "As map_best_f1, of the virtual image's DAB density.",
    "calibration_error": "Expected calibration error of the cell map: mean distance, over ten bins of equal width "
    "weighted by their cells, of its mean probability and the share of positive cells.",
    "all_positive_dice": "DAB-Dice of an image that is brown everywhere: the floor of DAB-Dice on this set.",
    "area_bias": "Mean over tiles of the virtual minus the real positive area, shares of the tile (Bland and Altman).",
    "area_spread": "1.96 standard deviations of that difference: half the width of the limits of agreement.",
}
GATE_MARGIN = 0.05
"""By how much the AUROC of the cell map must exceed hematoxylin's for a stain to be worth more than the H&E."""
BINS = 10


@dataclass(frozen=True, kw_only=True)
class Nuclei:
    """The cells of a tile, found in its H&E."""

    nuclei: NDArray[np.int32]
    cells: NDArray[np.int32]
    hematoxylin: Values
    """[N]"""
    eosin: Values


def measure_nuclei(he: UInt8Array, mpp: float) -> Nuclei:
    """Find the nuclei of an H&E tile, uint8 [H, W, 3], and measure the two baselines on them."""
    densities = he_densities(he)
    nuclei = nuclei_of_he(densities[..., 0], mpp)
    cells = grown(nuclei, mpp)
    return Nuclei(
        nuclei=nuclei,
        cells=cells,
        hematoxylin=label_means(nuclei, densities[..., 0]),
        eosin=label_means(cells, densities[..., 1]),
    )


@dataclass
class CellScore:
    """The cells of a set of tiles for one stain, collected tile by tile."""

    threshold: float = HALF
    """Of the cell map."""
    slides: list[str] = field(default_factory=list)
    """Per tile, its slide or region."""
    tiles: list[dict[str, Values]] = field(default_factory=list)
    """Per tile: ``truth`` (0 or 1), ``map``, ``image``, ``hematoxylin``, ``eosin``, each [N]; ``areas`` [2]: the
    virtual and the real positive share."""

    def add(
        self, slide: str, found: Nuclei, *, real: UInt8Array, mask: UInt8Array, virtual: UInt8Array, cells: UInt8Array
    ) -> None:
        """Add a tile.

        Args:
            found: its nuclei.
            real, virtual: uint8 [H, W, 3].
            mask: the coarse mask, uint8 [H, W].
            cells: the cell map, uint8 [H, W].
        """
        density = dab_density(virtual)
        areas = [float((image >= DAB_THRESHOLD).mean()) for image in (density, dab_density(real))]
        self.slides.append(slide)
        self.tiles.append(
            {
                "truth": (label_means(found.nuclei, mask >= 128) > 0.5).astype(np.float64),
                "map": label_means(found.nuclei, cells) / 255,
                "image": label_means(found.cells, density),
                "hematoxylin": found.hematoxylin,
                "eosin": found.eosin,
                "areas": np.array(areas),
            }
        )

    def counts(self) -> dict[str, int]:
        """Sample sizes: cells, those that are positive, and slides."""
        truth = self._joined(range(len(self.tiles)))["truth"]
        return {"cells": len(truth), "positive_cells": int(truth.sum()), "slides": len(set(self.slides))}

    def metrics(self) -> dict[str, float]:
        """:data:`CELL_METRICS` by name; NaN where they are undefined (no positive cell, or no negative one)."""
        return self._metrics(range(len(self.tiles)))

    def intervals(self, *, samples: int = 200, seed: int = 0) -> dict[str, Interval]:
        """95 % intervals of :meth:`metrics`: percentiles of a bootstrap over slides."""
        by_slide: dict[str, list[int]] = {}
        for number, slide in enumerate(self.slides):
            by_slide.setdefault(slide, []).append(number)
        names, rng = list(by_slide), np.random.default_rng(seed)
        draws: dict[str, list[float]] = {}
        for _ in range(samples if len(names) > 1 else 0):
            chosen = [tile for name in rng.choice(names, len(names)) for tile in by_slide[name]]
            for metric, value in self._metrics(chosen).items():
                draws.setdefault(metric, []).append(value)
        return {metric: _central(np.array(values)) for metric, values in draws.items()}

    def passes(self) -> bool:
        """Whether the cell map tells positive cells better than hematoxylin alone, by :data:`GATE_MARGIN`."""
        found = self.metrics()
        return found["map_auroc"] >= found["hematoxylin_auroc"] + GATE_MARGIN

    def reliability(self) -> list[tuple[float, float, int]]:
        """See :func:`reliability`, of the cell map."""
        joined = self._joined(range(len(self.tiles)))
        return reliability(joined["truth"], joined["map"])

    def _joined(self, tiles: Sequence[int]) -> dict[str, Values]:
        chosen = [self.tiles[tile] for tile in tiles]
        if not chosen:
            return {name: np.zeros(0) for name in ("truth", "map", "image", "hematoxylin", "eosin")}
        return {name: np.concatenate([tile[name] for tile in chosen]) for name in chosen[0] if name != "areas"}

    def _metrics(self, tiles: Sequence[int]) -> dict[str, float]:
        joined = self._joined(tiles)
        truth = joined["truth"]
        best, threshold = _best_f1(truth, joined["map"])
        areas = np.array([self.tiles[tile]["areas"] for tile in tiles]).reshape(-1, 2)
        difference, real = areas[:, 0] - areas[:, 1], float(areas[:, 1].mean()) if len(areas) else math.nan
        return {
            "map_auroc": auroc(truth, joined["map"]),
            "image_auroc": auroc(truth, joined["image"]),
            "hematoxylin_auroc": auroc(truth, joined["hematoxylin"]),
            "eosin_auroc": auroc(truth, joined["eosin"]),
            "map_f1": _f1(truth, joined["map"] >= self.threshold),
            "map_best_f1": best,
            "map_best_threshold": threshold,
            "image_best_f1": _best_f1(truth, joined["image"])[0],
            "calibration_error": calibration_error(truth, joined["map"]),
            "all_positive_dice": 2 * real / (1 + real),
            "area_bias": float(difference.mean()) if len(areas) else math.nan,
            "area_spread": 1.96 * float(difference.std(ddof=1)) if len(areas) > 1 else math.nan,
        }


def auroc(truth: Values, score: Values) -> float:
    """Area under the ROC curve, from the rank sum (Mann and Whitney 1947), ties counted half; NaN for one class."""
    positive = int(truth.sum())
    negative = len(truth) - positive
    if not positive or not negative:
        return math.nan
    ranks = stats.rankdata(score)[truth > 0]
    return float((ranks.sum() - positive * (positive + 1) / 2) / (positive * negative))


def reliability(truth: Values, probability: Values) -> list[tuple[float, float, int]]:
    """Mean probability, share of positives and number of cells, of each of ten bins that is not empty."""
    bins = np.minimum((probability * BINS).astype(np.int64), BINS - 1)
    return [
        (float(probability[inside].mean()), float(truth[inside].mean()), int(inside.sum()))
        for inside in (bins == number for number in range(BINS))
        if inside.any()
    ]


def calibration_error(truth: Values, probability: Values) -> float:
    """Expected calibration error (Naeini et al. 2015); NaN without cells."""
    if not len(truth):
        return math.nan
    return sum(abs(said - is_) * count for said, is_, count in reliability(truth, probability)) / len(truth)


def _f1(truth: Values, called: NDArray[np.bool_]) -> float:
    below = float(called.sum() + truth.sum())
    return 2 * float(truth[called].sum()) / below if below else math.nan


def _best_f1(truth: Values, score: Values) -> tuple[float, float]:
    """The best F1 over all thresholds, and its threshold."""
    if not truth.sum():
        return math.nan, math.nan
    order = np.argsort(-score, kind="stable")
    f1 = 2 * np.cumsum(truth[order]) / (np.arange(1, len(truth) + 1) + truth.sum())
    best = int(f1.argmax())
    return float(f1[best]), float(score[order][best])


def _central(draws: Values) -> Interval:
    known = draws[~np.isnan(draws)]
    if not known.size:
        return math.nan, math.nan
    low, high = np.quantile(known, [0.025, 0.975], method="nearest")
    return float(low), float(high)
