"""The report of an evaluation: ``report.md`` with a table, a chart, and the best, median and worst tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from staindiffuser.errors import UsageError
from staindiffuser.training.evaluation.cell_scores import CELL_METRICS, CellScore
from staindiffuser.training.evaluation.evaluate import Evaluation, restain
from staindiffuser.training.evaluation.metrics import METRICS, Interval, StainScore

__all__ = ["figure", "write_report"]

_GAP = 8
_CHARTED = (
    "dab_dice",
    "od_correlation",
    "positive_cell_f1",
    "positive_area_error",
    "hausdorff95_um",
    "radial_power",
    "kid_encoder",
    "ssim",
)
CHART = "metrics.png"


def write_report(evaluations: Sequence[Evaluation], folder: Path) -> Path:
    """Write ``report.md`` and its images into ``folder``: one run at one or several step counts.

    Raises:
        UsageError: the folder cannot be written.
    """
    head, stains = evaluations[0].head(), list(evaluations[0].scores)
    lines = [
        f"# {head['model']}: {head['tiles']} {head['split']} tiles",
        "",
        "In brackets the bootstrap 95 % interval over tiles. DAB-Dice is the headline; SSIM, PSNR, KID, FID and LPIPS",
        "correlate poorly with stain accuracy and are given for comparison.",
        "",
    ]
    for name, identity in head["networks"].items():
        sample = f", on {head['kid_tiles']} of the tiles, evenly spread" if name == "encoder" else ""
        lines += [f"Network of `kid_{name}`: {identity}{sample}.", ""]
    if head["margin"]:
        lines += [f"A border of {head['margin']} pixels is stained but not scored, as in serving.", ""]
    for stain in stains:
        lines += [f"## {stain}", "", *_table(evaluations, stain), ""]
        lines += _cell_table([evaluation.cells[stain] for evaluation in evaluations if stain in evaluation.cells])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if len(evaluations) > 1:
            lines += _chart(evaluations, folder / CHART)
        lines += ["## What the metrics are", "", *_legend(evaluations), ""]
        lines += _tiles(evaluations, folder)
        path = folder / "report.md"
        path.write_text("\n".join(lines), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error.strerror}; choose another --report") from error
    return path


def figure(value: float, interval: Interval | None = None) -> str:
    """A metric as text, with its interval: ``0.512 (0.490 to 0.533)``; ``–`` where it is undefined."""
    if interval is None:
        return f"{value:.3f}" if math.isfinite(value) else ("–" if math.isnan(value) else "∞")
    return f"{figure(value)} ({figure(interval[0])} to {figure(interval[1])})"


def _table(evaluations: Sequence[Evaluation], stain: str) -> list[str]:
    columns = [(e.scores[stain].metrics(), e.scores[stain].intervals()) for e in evaluations]
    header = " | ".join(f"{e.steps} step{'s' * (e.steps > 1)}" for e in evaluations)
    lines = [f"| metric | better | {header} |", "|---" * (len(evaluations) + 2) + "|"]
    for metric in METRICS:
        if metric.name in columns[0][0]:
            cells = [figure(values[metric.name], intervals.get(metric.name)) for values, intervals in columns]
            lines.append(f"| {metric.name} | {metric.better} | " + " | ".join(cells) + " |")
    counts = [e.scores[stain].counts() for e in evaluations]
    for name in counts[0]:
        lines.append(f"| {name} (count) | | " + " | ".join(str(count[name]) for count in counts) + " |")
    return lines


def _cell_table(scores: Sequence[CellScore]) -> list[str]:
    """The scores per cell, one column per step count, and the verdict."""
    if not scores:
        return []
    counts = scores[0].counts()
    columns = [(score.metrics(), score.intervals()) for score in scores]
    lines = [
        f"Per cell: {counts['cells']} nuclei found in the H&E, {counts['positive_cells']} of them positive, on "
        f"{counts['slides']} slides. In brackets the bootstrap 95 % interval over slides.",
        "",
        "| per cell |" + " |" * len(scores),
        "|---" * (len(scores) + 1) + "|",
    ]
    for name in CELL_METRICS:
        cells = [figure(values[name], intervals.get(name)) for values, intervals in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    verdict = "more" if scores[-1].passes() else "**not** more"
    lines += ["", f"The cell map tells {verdict} than the hematoxylin of the H&E does (by 0.05 AUROC).", ""]
    return lines


def _legend(evaluations: Sequence[Evaluation]) -> list[str]:
    measured = {name for score in evaluations[0].scores.values() for name in score.metrics()}
    legend = [f"- **{metric.name}**: {metric.meaning}" for metric in METRICS if metric.name in measured]
    if evaluations[0].cells:
        legend += [f"- **{name}** (per cell): {meaning}" for name, meaning in CELL_METRICS.items()]
    return legend


def _tiles(evaluations: Sequence[Evaluation], folder: Path) -> list[str]:
    """Figures of the best, median and worst tile of each stain, ranked at the step count that is served."""
    served = evaluations[0].checkpoint.config.steps
    judge = next((e for e in evaluations if e.steps == served), evaluations[0])
    steps = ", ".join(str(e.steps) for e in evaluations)
    lines = [
        f"## Best, median and worst tiles at {judge.steps} step{'s' * (judge.steps > 1)}",
        "",
        f"From left to right: H&E, real stain, virtual stain (sampler steps: {steps}), cell map.",
        "",
    ]
    for stain, score in judge.scores.items():
        for name, index in _picks(score).items():
            tile = restain(evaluations, index)
            virtual = [result[f"STAIN_{stain.upper()}"] for result in tile.results]
            cell_map = np.repeat(tile.results[0][f"CELLS_{stain.upper()}"], 3, axis=2)
            image = f"{stain}-{name}.png"
            Image.fromarray(_side_by_side(tile.data["he"], tile.data[stain], *virtual, cell_map)).save(folder / image)
            lines += [
                f"**{stain}, {name}**: DAB-Dice {score.tile_dice[index]:.3f}, `{tile.row.he.name}`",
                "",
                f"![{stain}, {name}]({image})",
                "",
            ]
    return lines


def _picks(score: StainScore) -> dict[str, int]:
    """The tiles to show, chosen among those with positive pixels if there are any."""
    shown = [i for i, row in enumerate(score.rows) if row["real"] > 0] or list(range(len(score.rows)))
    dice = score.tile_dice
    order = sorted(shown, key=lambda i: dice[i])
    return {"best": order[-1], "median": order[len(order) // 2], "worst": order[0]}


def _side_by_side(*images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    gap = np.full((images[0].shape[0], _GAP, 3), 255, np.uint8)
    parts = [part for image in images for part in (image, gap)]
    return np.concatenate(parts[:-1], axis=1)


def _chart(evaluations: Sequence[Evaluation], path: Path) -> list[str]:
    """Draw metrics against steps, with their intervals; return the report's lines about the chart."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    stains = list(evaluations[0].scores)
    columns = {s: [(e.scores[s].metrics(), e.scores[s].intervals()) for e in evaluations] for s in stains}
    shown = [name for name in _CHARTED if name in columns[stains[0]][0][0]]
    width = min(4, len(shown))
    rows = -(-len(shown) // width)
    drawing, axes = plt.subplots(rows, width, figsize=(3.5 * width, 3 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.axis("off")
    for axis, name in zip(axes.flat, shown, strict=False):
        for shift, stain in enumerate(stains):
            values = np.array([v[name] for v, _ in columns[stain]])
            bounds = np.array([i.get(name, (v[name], v[name])) for v, i in columns[stain]])
            reach = np.abs(np.nan_to_num(bounds - values[:, None])).T
            positions = np.arange(len(values)) + 0.08 * shift
            axis.errorbar(positions, values, yerr=reach, marker="o", capsize=3, label=stain)
        axis.set(title=name, xlabel="steps", xticks=range(len(evaluations)))
        axis.set_xticklabels([str(e.steps) for e in evaluations])
    axes.flat[0].legend()
    drawing.savefig(path, dpi=100)
    plt.close(drawing)
    return [f"![metrics against steps]({path.name})", ""]
