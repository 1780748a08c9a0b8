"""An evaluation to look at: ``report.md`` with metrics and intervals, and the best, median and worst tiles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from staindiffuser.errors import UsageError
from staindiffuser.training.evaluate import Evaluation
from staindiffuser.training.metrics import METRIC_NAMES, StainScore

__all__ = ["write_report"]

_GAP = 8


def write_report(evaluation: Evaluation, folder: Path) -> Path:
    """Write ``report.md`` and its pictures into ``folder``.

    Raises:
        UsageError: the folder cannot be written.
    """
    summary = evaluation.summary()
    lines = [
        f"# {summary['model']}: {summary['tiles']} {summary['split']} tiles, {summary['steps']} steps",
        "",
        "Pooled over all pixels; in brackets the bootstrap 95 % interval over tiles. DAB-Dice is the headline; SSIM",
        "and PSNR correlate poorly with stain accuracy and stand here for comparison.",
        "",
        "| metric | " + " | ".join(summary["stains"]) + " |",
        "|---" * (len(summary["stains"]) + 1) + "|",
    ]
    for metric in METRIC_NAMES:
        cells = []
        for stain, values in summary["stains"].items():
            low, high = summary["intervals_95"][stain][metric]
            cells.append(f"{values[metric]:.3f} ({low:.3f} to {high:.3f})")
        lines.append(f"| {metric} | " + " | ".join(cells) + " |")
    lines += ["", "Below, from left to right: H&E, real stain, virtual stain, cell map.", ""]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stain, score in evaluation.scores.items():
            for name, index in _picks(score).items():
                data, result = evaluation.restain(index)
                cell_map = np.repeat(result[f"CELLS_{stain.upper()}"], 3, axis=2)
                strip = _side_by_side(data["he"], data[stain], result[f"STAIN_{stain.upper()}"], cell_map)
                picture = f"{stain}-{name}.png"
                Image.fromarray(strip).save(folder / picture)
                tile = evaluation.rows[index].he.name
                lines += [
                    f"**{stain}, {name}**: DAB-Dice {score.tile_dice[index]:.3f}, `{tile}`",
                    "",
                    f"![{stain}, {name}]({picture})",
                    "",
                ]
        path = folder / "report.md"
        path.write_text("\n".join(lines), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error.strerror}; choose another --report") from error
    return path


def _picks(score: StainScore) -> dict[str, int]:
    """The tiles to show, among those with something to find: one without a positive pixel shows little."""
    shown = [i for i, sums in enumerate(score.sums) if sums[2] > 0] or list(range(len(score.sums)))
    order = sorted(shown, key=lambda i: score.tile_dice[i])
    return {"best": order[-1], "median": order[len(order) // 2], "worst": order[0]}


def _side_by_side(*pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    gap = np.full((pictures[0].shape[0], _GAP, 3), 255, np.uint8)
    parts = [part for picture in pictures for part in (picture, gap)]
    return np.concatenate(parts[:-1], axis=1)
