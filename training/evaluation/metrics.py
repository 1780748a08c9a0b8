"""How good a virtual stain is: metrics of a set of tiles, and their bootstrap intervals.

Only sums and counts are kept per tile (``tile_metrics.py``); a metric is a formula over their totals, so a bootstrap
over tiles is nearly free. DAB-Dice is the headline. SSIM, PSNR, KID, FID and LPIPS correlate poorly with stain accuracy
(arXiv 2511.04615) and are given for comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.training.evaluation.tile_metrics import Reference, Row, measure_cells, measure_image, radial_power

__all__ = ["METRICS", "METRIC_NAMES", "Interval", "Metric", "StainScore", "radial_power"]

Values = NDArray[np.float64]
Sums = Mapping[str, Values]
"""Totals over the tiles of a set by name: scalars, or one value per bootstrap draw."""
Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One figure about a set of tiles."""

    name: str
    better: str
    """``higher``, ``lower``, or the value of a perfect stain."""
    meaning: str
    """What it is, its unit, how it is pooled, and how tiles without positives count."""
    column: str | None = None
    """The sum that it needs; None for a metric of the set as a whole."""
    formula: Callable[[Sums], Values] = field(default=lambda _: np.array(np.nan))


def _ratio(above: Values, below: Values) -> Values:
    """``above / below``; NaN where ``below`` is 0."""
    return np.divide(above, below, out=np.full(np.shape(below), np.nan), where=np.asarray(below) > 0)


def _dice(both: str, a: str, b: str) -> Callable[[Sums], Values]:
    return lambda s: _ratio(2 * s[both], s[a] + s[b])


def _mean(total: str) -> Callable[[Sums], Values]:
    return lambda s: _ratio(s[total], s[f"{total}_tiles"])


def _correlation(s: Sums) -> Values:
    n, x, y = s["od_n"], s["od_x"], s["od_y"]
    spread = (n * s["od_xx"] - x * x) * (n * s["od_yy"] - y * y)
    return _ratio(n * s["od_xy"] - x * y, np.sqrt(np.maximum(spread, 0)))


def _psnr(s: Sums) -> Values:
    return np.where((s["psnr_tiles"] == 0) & (s["psnr_same"] > 0), np.inf, _mean("psnr")(s))


METRICS: tuple[Metric, ...] = (
    Metric(
        name="dab_dice",
        better="higher",
        meaning="Dice of the DAB-positive areas, pooled over all pixels: a tile without positives counts only by what "
        "was painted on it.",
        column="both",
        formula=_dice("both", "virtual", "real"),
    ),
    Metric(
        name="iou",
        better="higher",
        meaning="Intersection over union of the same areas, pooled likewise.",
        column="both",
        formula=lambda s: _ratio(s["both"], s["virtual"] + s["real"] - s["both"]),
    ),
    Metric(
        name="hausdorff95_um",
        better="lower",
        meaning="95th percentile of the distance between the edges of the same areas, µm: mean over the tiles on which "
        "both have positives; the others have no such distance and are left out.",
        column="hausdorff",
        formula=_mean("hausdorff"),
    ),
    Metric(
        name="od_correlation",
        better="higher",
        meaning="Pearson's r of the DAB optical densities, pooled over all pixels.",
        column="od_n",
        formula=_correlation,
    ),
    Metric(
        name="positive_area_error",
        better="0",
        meaning="(virtual − real) / real DAB-positive area, areas summed over the set: −0.5 is half as much.",
        column="both",
        formula=lambda s: _ratio(s["virtual"] - s["real"], s["real"]),
    ),
    Metric(
        name="positive_cell_f1",
        better="higher",
        meaning="F1 of the positive cells of the virtual image: watershed instances of its coarse mask against those "
        "of the tile's, centroids within 6 µm, each cell used once; counts pooled over the set, so that a tile without "
        "positive cells counts only by those that were found on it.",
        column="cells_found",
        formula=_dice("cells_matched", "cells_found", "cells_real"),
    ),
    Metric(
        name="cell_dice",
        better="higher",
        meaning="Dice of the cell map against the coarse mask, outside its ignore band, pooled over all pixels.",
        column="map_both",
        formula=_dice("map_both", "map_virtual", "map_real"),
    ),
    Metric(
        name="cell_f1",
        better="higher",
        meaning="F1 of the cell map's cells (those that the client writes), matched and pooled likewise.",
        column="map_cells_found",
        formula=_dice("map_cells_matched", "map_cells_found", "map_cells_real"),
    ),
    Metric(
        name="radial_power",
        better="1",
        meaning="Power between 0.125 and 0.5 cycles per pixel over the real stain's, each summed over the set: below 1 "
        "is blurred, above 1 is noisy.",
        column="power_real",
        formula=lambda s: _ratio(s["power_virtual"], s["power_real"]),
    ),
    Metric(
        name="grid_power",
        better="1",
        meaning="Power at the frequency of the pixel shuffle (two pixels, along the axes) over that of lower ones "
        "beside it, each summed over the set: above 1 is a faint grid. The real stain's own is somewhat below 1.",
        column="grid_around",
        formula=lambda s: _ratio(s["grid_peak"], s["grid_around"]),
    ),
    Metric(
        name="glass_difference",
        better="0",
        meaning="Mean difference from white, in grey levels, over all pixels where the H&E shows bare glass.",
        column="glass_values",
        formula=lambda s: _ratio(s["glass_difference"], s["glass_values"]),
    ),
    Metric(
        name="ssim",
        better="higher",
        meaning="Structural similarity of the colour images (windows of 7 pixels), mean over tiles.",
        column="ssim",
        formula=_mean("ssim"),
    ),
    Metric(
        name="psnr",
        better="higher",
        meaning="Peak signal to noise ratio, dB, mean over the tiles that are not equal to the last bit.",
        column="psnr",
        formula=_psnr,
    ),
    Metric(
        name="kid_encoder",
        better="lower",
        meaning="Kernel distance (KID's) between the sets of images in the features of a frozen encoder of ours, not "
        "of the usual network: compare only values of the same encoder. A stain is not compared with the real one "
        "of its own tile. Unbiased, so it can be below 0; its interval comes from halves of the set.",
    ),
    Metric(name="kid_inception", better="lower", meaning="KID on Inception-v3, the pairs of the same tile left out."),
    Metric(
        name="fid_inception",
        better="lower",
        meaning="FID on Inception-v3: depends on the number of tiles; below about 2,000 prefer KID. No interval.",
    ),
    Metric(
        name="lpips",
        better="lower",
        meaning="LPIPS on AlexNet, mean over tiles.",
        column="lpips",
        formula=_mean("lpips"),
    ),
)
_COUNTS = {
    "hausdorff_tiles": "hausdorff_tiles",
    "real_cells": "cells_real",
    "image_cells": "cells_found",
    "map_cells": "map_cells_found",
}
METRIC_NAMES = tuple(metric.name for metric in METRICS)


@dataclass
class StainScore:
    """One stain's tiles as they are scored, and the metrics of the set so far."""

    mpp: float = 0.5
    """Pixel size, µm."""
    detail: bool = False
    """Also compute the slower metrics of edges and cells."""
    rows: list[Row] = field(default_factory=list)
    """The measurements, per tile."""
    whole: dict[str, tuple[float, Interval | None]] = field(default_factory=dict)
    """Metrics of the set as a whole, and their 95 % intervals."""

    def add(
        self,
        *,
        virtual: UInt8Array,
        real: UInt8Array,
        mask: UInt8Array,
        cells: UInt8Array | None = None,
        he: UInt8Array | None = None,
    ) -> None:
        """Add a tile: images uint8 [H, W, 3]; coarse mask and, if the model has one, cell map uint8 [H, W]."""
        reference = Reference(real, mask, self.mpp, he)
        row = measure_image(virtual, reference, detail=self.detail)
        self.rows.append(row if cells is None else row | measure_cells(cells, reference, detail=self.detail))

    @property
    def tile_dice(self) -> list[float]:
        """DAB-Dice of each single tile (1 where neither image has a positive pixel), to pick tiles for a figure."""
        areas = [(row["both"], row["virtual"] + row["real"]) for row in self.rows]
        return [2 * both / both_areas if both_areas else 1.0 for both, both_areas in areas]

    def metrics(self) -> dict[str, float]:
        """The :data:`METRICS` that were measured, by name; NaN where they are undefined."""
        columns, table = self._table()
        values = _metrics(dict(zip(columns, table.sum(axis=0), strict=True)))
        merged = {name: float(value) for name, value in values.items()} | {n: v for n, (v, _) in self.whole.items()}
        return {name: merged[name] for name in METRIC_NAMES if name in merged}

    def counts(self) -> dict[str, int]:
        """Sample sizes: tiles with a Hausdorff distance, and positive cells in the real and virtual images."""
        columns, table = self._table()
        totals = dict(zip(columns, table.sum(axis=0), strict=True))
        return {name: int(totals[column]) for name, column in _COUNTS.items() if column in totals}

    def intervals(self, *, samples: int = 1000, seed: int = 0) -> dict[str, Interval]:
        """95 % intervals of :meth:`metrics`: percentiles of a bootstrap over tiles (Efron and Tibshirani 1993)."""
        if not self.rows:
            return {}
        columns, table = self._table()
        tiles, rng = len(table), np.random.default_rng(seed)
        draws = np.stack([rng.multinomial(tiles, np.full(tiles, 1 / tiles)) @ table for _ in range(samples)])
        values = _metrics({name: draws[:, i] for i, name in enumerate(columns)})
        merged = {name: _percentiles(value) for name, value in values.items()}
        merged |= {name: interval for name, (_, interval) in self.whole.items() if interval is not None}
        return {name: merged[name] for name in METRIC_NAMES if name in merged}

    def _table(self) -> tuple[tuple[str, ...], NDArray[np.float64]]:
        """Names of all sums, and their values [tiles, sums]; 0 where a tile has none."""
        columns = tuple(dict.fromkeys(name for row in self.rows for name in row))
        table = np.array([[row.get(name, 0.0) for name in columns] for row in self.rows], dtype=np.float64)
        return columns, table.reshape(len(self.rows), len(columns))


def _metrics(sums: dict[str, Any]) -> dict[str, Values]:
    return {metric.name: metric.formula(sums) for metric in METRICS if metric.column in sums}


def _percentiles(draws: Values) -> Interval:
    """The central 95 % of the draws that are not NaN."""
    known = draws[~np.isnan(draws)]
    if not known.size:
        return float("nan"), float("nan")
    low, high = np.quantile(known, [0.025, 0.975], method="nearest")
    return float(low), float(high)
