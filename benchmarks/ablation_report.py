"""What the runs of :mod:`~staindiffuser.benchmarks.ablations` say: means, paired differences, the claim, a chart."""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from scipy import stats

from staindiffuser.errors import UsageError
from staindiffuser.files import write_json

if TYPE_CHECKING:
    from staindiffuser.benchmarks.ablations import AblationStudy

__all__ = ["Difference", "Spread", "claim", "differences", "write_report"]

Record = dict[str, Any]
HEADLINE = "dab_dice"
METRICS = {
    HEADLINE: ("DAB-Dice", 3),
    "od_correlation": ("OD correlation", 3),
    "psnr": ("PSNR, dB", 2),
    "ssim": ("SSIM", 3),
    "radial_power": ("radial power", 2),
}
"""In the table: title and decimals."""
COMPARED = (HEADLINE, "od_correlation")
TITLES = {
    "regression": "U-Net regression",
    "pix2pix": "pix2pix",
    "single": "single task",
    "plain": "plain injection",
    "separate": "stains one by one",
    "mixed": "with simulated tiles",
    "dual": "dual diffusion (ours)",
}
_EXPLAINED = """\
* **U-Net regression**: one U-Net for all stains, mean squared error; as many parameters as the encoder and the image
  branches together.
* **pix2pix**: the same U-Net, mean absolute error (weight 100) and a PatchGAN, whose parameters are not counted.
* **single task**: dual diffusion without the cell branches.
* **plain injection**: dual diffusion whose branches add the encoder's features as they are, without task attention.
* **stains one by one**: dual diffusion, one model a stain, each with the full number of steps.
* **with simulated tiles**: dual diffusion of which every second sample is one of the simulated tiles.
* **dual diffusion (ours)**: one encoder, and an image and a cell branch for each stain, all trained together."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Values of several seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def sd(self) -> float:
        """Standard deviation over seeds; not a number for one seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the mean (Student's t); unbounded for one seed."""
        n = len(self.values)
        if n < 2:
            return -math.inf, math.inf
        half = float(stats.t.ppf(0.975, n - 1)) * self.sd / math.sqrt(n)
        return self.mean - half, self.mean + half

    def text(self, decimals: int, *, sign: bool = False) -> str:
        spread = f" ± {self.sd:.{decimals}f}" if len(self.values) > 1 else ""
        return f"{self.mean:{'+' if sign else ''}.{decimals}f}{spread}"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A metric, mean of the stains, of one arm minus another's at the same number of tiles, seed by seed."""

    metric: str = HEADLINE

    arm: str
    other: str
    tiles: int
    spread: Spread

    @property
    def verdict(self) -> str:
        """``better``, ``worse``, or ``no difference shown`` where the 95 % interval holds 0."""
        low, high = self.spread.interval
        return "better" if low > 0 else "worse" if high < 0 else "no difference shown"


def differences(records: Sequence[Record], arm: str = "dual") -> list[Difference]:
    """``arm`` minus every other arm, at each number of tiles where both ran, over the seeds that both have.

    By DAB-Dice, the headline, and by the correlation of optical densities, which needs no threshold.
    """
    found = []
    for metric in COMPARED:
        known = {(r["settings"]["arm"], r["settings"]["tiles"], r["settings"]["seed"]): r for r in records}
        for other in TITLES:
            for tiles in sorted({t for a, t, _ in known if a == arm}):
                pairs = [
                    _value(record, metric) - _value(known[other, tiles, seed], metric)
                    for (a, t, seed), record in known.items()
                    if (a, t) == (arm, tiles) and other != arm and (other, tiles, seed) in known
                ]
                if pairs:
                    spread = Spread(values=tuple(pairs))
                    found.append(Difference(metric=metric, arm=arm, other=other, tiles=tiles, spread=spread))
    return found


def _value(record: Record, metric: str) -> float:
    """Mean of the stains; 0 where a stain has none, as the correlation with an image of one colour."""
    return statistics.fmean(values.get(metric, 0.0) for values in record["stains"].values())


def claim(found: Sequence[Difference]) -> str:
    """The paper's claim, judged by dual − single: does the segmentation task help, and most when tiles are few?"""
    both = sorted((d for d in found if (d.arm, d.other) == ("dual", "single")), key=lambda d: d.tiles)
    pairs = [d for d in both if d.metric == HEADLINE]
    if not pairs:
        return "The claim that the segmentation task helps when tiles are few was not tested: no pair of such runs."
    few, many = pairs[0], pairs[-1]
    text = "The paper's claim, that the segmentation task helps the stain when tiles are few, "
    low, high = few.spread.interval
    amount = f"with {few.tiles} tiles it changed DAB-Dice by {few.spread.mean:+.3f}"
    if len(few.spread.values) > 1:
        amount += f" (95 % interval {low:+.3f} to {high:+.3f} over {len(few.spread.values)} seeds)"
    if few.verdict == "better":
        text += f"**holds in this test**: {amount}."
        if many is not few:
            shift = few.spread.mean - many.spread.mean
            how = "less" if shift > 0 else "no less"
            text += f" With {many.tiles} tiles the change was {how}: {many.spread.mean:+.3f}, {many.verdict}."
    elif few.verdict == "worse":
        text += f"**does not hold in this test; the segmentation task hurt**: {amount}."
    else:
        text += f"**is not shown by this test**: {amount}."
    if few.verdict != "better" and many is not few:
        text += f" With {many.tiles} tiles it was {many.spread.mean:+.3f}, {many.verdict}."
    for d in both:
        if d.metric != HEADLINE and d.tiles == few.tiles:
            text += f" By {METRICS[d.metric][0]} with {d.tiles} tiles: {d.spread.text(3, sign=True)}, {d.verdict}."
    return text


def write_report(study: AblationStudy, records: Sequence[Record]) -> dict[str, Any]:
    """Write ``results.json``, ``ablations.md`` and ``ablations.png``; returns the content of the first.

    Raises:
        UsageError: the output cannot be written.
    """
    found = differences(records)
    findings = [claim(found), *(_sentence(difference) for difference in found if difference.metric == HEADLINE)]
    report = {
        "findings": findings,
        "differences": [
            {
                "metric": d.metric,
                "arm": d.arm,
                "other": d.other,
                "tiles": d.tiles,
                "values": list(d.spread.values),
                "mean": d.spread.mean,
                "interval_95": [None if math.isinf(bound) else bound for bound in d.spread.interval],
                "verdict": d.verdict,
            }
            for d in found
        ],
        "hardware": _hardware(),
        "runs": list(records),
    }
    write_json(study.output / "results.json", report)
    try:
        (study.output / "ablations.md").write_text(_markdown(study, records, found), encoding="utf-8")
        _draw(records, found, study.output / "ablations.png")
    except OSError as error:
        raise UsageError(f"{study.output} cannot be written: {error.strerror}; choose another --output") from error
    return report


def _sentence(d: Difference) -> str:
    low, high = d.spread.interval
    interval = f", 95 % interval {low:+.3f} to {high:+.3f}" if math.isfinite(low) else ""
    return (
        f"{TITLES[d.arm]} − {TITLES[d.other]}, {d.tiles} tiles: {d.spread.text(3, sign=True)} DAB-Dice{interval}: "
        f"{d.verdict}"
    )


def _hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {platform.machine()}, torch threads: {torch.get_num_threads()}"


def _markdown(study: AblationStudy, records: Sequence[Record], found: Sequence[Difference]) -> str:
    stains = list(records[0]["stains"])
    scored = records[0]["settings"]["scored_tiles"]
    seeds = f"over {study.seeds} seeds" if study.seeds > 1 else "of one seed"
    return f"""\
# Baselines and ablations

Written by `staindiffuser bench ablations`. Every arm saw the same tiles, crops and augmentations in the same order and
made the same number of optimiser steps; what differs is named below. The numbers compare methods at a small size and a
short budget: they are no measure of the best that each could reach.

{claim(found)}

![DAB-Dice over training tiles, and dual minus single](ablations.png)

Mean ± standard deviation {seeds}; {" / ".join(stains)}. Scored on {scored} tiles of slides that no arm trained on,
pooled over all pixels. Radial power is 1 for an image as sharp and as noisy as the real stain. Seconds are of
training; in brackets, those that cores of the processor worked on it.

{_table(records, stains)}

Differences, mean of the stains, paired by seed, so on the same tiles and crops; 95 % interval by Student's t:

{_pairs(found)}

{_EXPLAINED}

{_settings(study, records)}
"""


def _table(records: Sequence[Record], stains: Sequence[str]) -> str:
    titles = " | ".join(title for title, _ in METRICS.values())
    lines = [
        f"| arm | tiles | {titles} | parameters | steps | seconds a run |",
        "|---|--:|" + "---|" * len(METRICS) + "--:|--:|--:|",
    ]
    for arm, tiles in _rows(records):
        same = [r for r in records if _is(r, arm, tiles)]
        cells = []
        for metric, (_, decimals) in METRICS.items():
            per_stain = [_over_seeds(same, stain, metric) for stain in stains]
            cells.append(" / ".join(spread.text(decimals) if spread else "–" for spread in per_stain))
        models = same[0]["models"]
        times = f"{models} × " if models > 1 else ""
        seconds, cpu = (statistics.fmean(r[name] for r in same) for name in ("seconds", "cpu_seconds"))
        lines.append(
            f"| {TITLES[arm]} | {tiles:,} | {' | '.join(cells)} | {times}{same[0]['parameters'] // models:,} | "
            f"{times}{same[0]['steps'] // models:,} | {seconds:.0f} ({cpu:.0f}) |"
        )
    return "\n".join(lines)


def _pairs(found: Sequence[Difference]) -> str:
    lines = [
        "| difference | tiles | in | mean ± sd | 95 % interval | each seed | |",
        "|---|--:|---|--:|--:|--:|---|",
    ]
    for d in found:
        low, high = d.spread.interval
        interval = f"{low:+.3f} to {high:+.3f}" if math.isfinite(low) else "–"
        seeds = ", ".join(f"{value:+.3f}" for value in d.spread.values)
        lines.append(
            f"| {TITLES[d.arm]} − {TITLES[d.other]} | {d.tiles:,} | {METRICS[d.metric][0]} | "
            f"{d.spread.text(3, sign=True)} | {interval} | {seeds} | {d.verdict} |"
        )
    return "\n".join(lines)


def _settings(study: AblationStudy, records: Sequence[Record]) -> str:
    train, model = study.preset.train, study.preset.model
    rates = {r["settings"]["arm"]: r["settings"]["train"]["learning_rate"] for r in records}
    cut = f"cut to {study.tile} × {study.tile} pixels" if study.tile else "whole"
    widths = [", ".join(map(str, part.channels)) for part in (model.encoder, model.image, model.cells)]
    return f"""\
Settings: tiles {cut}; {train.steps:,} steps of {train.batch} crops of {train.crop} × {train.crop} pixels; Adam,
{train.warmup} steps of warm-up, the last {train.cooldown:.0%} of the steps cooling down; moving average of the weights;
ln σ ~ N({train.p_mean}, {train.p_std}²) and {study.sampler_steps} sampler steps where there is diffusion.
Peak learning rates: {", ".join(f"{TITLES[arm]} {rates[arm]:g}" for arm in TITLES if arm in rates)}.
Channels per level: encoder {widths[0]}; image branch {widths[1]}; cell branch {widths[2]}.
Each seed draws its own tiles, weights, crops and noise; its larger sets of tiles hold the smaller ones.
Machine: {_hardware()}."""


def _rows(records: Sequence[Record]) -> list[tuple[str, int]]:
    there = {(r["settings"]["arm"], r["settings"]["tiles"]) for r in records}
    return [(arm, tiles) for arm in TITLES for tiles in sorted({t for a, t in there if a == arm})]


def _over_seeds(records: Sequence[Record], stain: str, metric: str) -> Spread | None:
    values = tuple(r["stains"][stain][metric] for r in records if metric in r["stains"][stain])
    return Spread(values=values) if values else None


def _draw(records: Sequence[Record], found: Sequence[Difference], file: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", width_ratios=(3, 2))
    for index, arm in enumerate(TITLES):
        sizes = [tiles for a, tiles in _rows(records) if a == arm]
        spreads = [Spread(values=tuple(_value(r, HEADLINE) for r in records if _is(r, arm, tiles))) for tiles in sizes]
        if sizes:
            beside = 1.03 ** (index - 2.5)  # so that arms at the same number do not hide each other
            (line,) = left.plot(
                [beside * tiles for tiles in sizes], [s.mean for s in spreads], marker="o", label=TITLES[arm]
            )
            for tiles, spread in zip(sizes, spreads, strict=True):
                left.plot([beside * tiles] * len(spread.values), spread.values, "_", color=line.get_color(), alpha=0.6)
    left.set(title="DAB-Dice, mean of the stains; a dash a seed", xlabel="training tiles")
    left.legend(fontsize="small")
    pairs = [d for d in found if (d.other, d.metric) == ("single", HEADLINE)]
    right.axhline(0, color="grey", linewidth=0.8)
    for d in pairs:
        right.plot([d.tiles] * len(d.spread.values), d.spread.values, "o", color="tab:brown", alpha=0.6)
    right.plot([d.tiles for d in pairs], [d.spread.mean for d in pairs], color="tab:brown")
    right.set(title="DAB-Dice, dual − single, paired by seed", xlabel="training tiles")
    for axis in (left, right):
        sizes = sorted({r["settings"]["tiles"] for r in records})
        axis.set_xscale("log")
        axis.set_xticks(sizes, [str(tiles) for tiles in sizes])
        axis.minorticks_off()
    figure.savefig(file, dpi=100)
    plt.close(figure)


def _is(record: Record, arm: str, tiles: int) -> bool:
    return (record["settings"]["arm"], record["settings"]["tiles"]) == (arm, tiles)
