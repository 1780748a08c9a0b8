"""The curves of a training run, drawn from its ``csv/metrics.csv``: ``python -m staindiffuser.training.curves RUN``."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from staindiffuser.training.errors import DataError

__all__ = ["CURVES", "METRICS", "curves_image", "draw_curves", "read_curves", "read_rows"]

METRICS = Path("csv", "metrics.csv")
CURVES = "curves.png"
"""The image of the curves, in the run folder and beside the checkpoint's card."""
Curve = tuple[NDArray[np.int64], NDArray[np.float64]]


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a ``metrics.csv``: ``step`` and whatever was logged there. Rows that were cut off are left out.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    whole = text[: text.rfind("\n") + 1]  # a last line without its end has lost digits
    rows = []
    for row in csv.DictReader(whole.replace("\0", "").splitlines()):
        values = {name: value for name, value in row.items() if name and value}
        try:
            int(values["step"])
            for value in values.values():
                float(value)
        except (KeyError, ValueError, TypeError):
            continue
        rows.append(values)
    return rows


def read_curves(run: Path) -> dict[str, Curve]:
    """Every logged quantity of a run folder: name → (steps, values); they may be of different lengths.

    Raises:
        DataError: the folder holds no run.
    """
    path = run / METRICS
    if not path.is_file():
        raise DataError(f"{path} is missing: {run} is not a run folder")
    points: dict[str, list[tuple[int, float]]] = {}
    for row in read_rows(path):
        for name, value in row.items():
            if name != "step":
                points.setdefault(name, []).append((int(row["step"]), float(value)))
    return {name: (np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])) for name, pairs in points.items()}


def curves_image(run: Path) -> Path | None:
    """Draw the curves into the run's folder, for its checkpoint; None for a run too short to have any."""
    if not (run / METRICS).is_file():
        return None
    draw_curves(run, run / CURVES)
    return run / CURVES


def draw_curves(run: Path, output: Path) -> None:
    """Draw the weighted error per branch (smoothed), the same at high noise, and the validation Dice.

    Raises:
        DataError: the folder holds no run.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    curves = read_curves(run)
    panels = [("error/", "weighted error, all noise levels"), ("error_high_sigma/", "weighted error, σ ≥ 2")]
    # One-step fine-tuning has no noise levels to tell apart.
    panels = [panel for panel in panels if any(name.startswith(panel[0]) for name in curves)]
    shown = len(panels) + 1
    figure, drawn = plt.subplots(1, shown, figsize=(5 * shown, 4), layout="constrained", squeeze=False)
    axes = drawn[0]
    for axis, (prefix, title) in zip(axes, panels, strict=False):
        for name, (steps, values) in sorted(curves.items()):
            if name.startswith(prefix):
                window = min(25, len(values))
                smooth = np.convolve(values, np.ones(window) / window, mode="valid")
                axis.plot(steps[window - 1 :], smooth, label=name.removeprefix(prefix))
        axis.set(title=title, xlabel="step", ylim=(0, None))
        axis.legend()
    for name, (steps, values) in sorted(curves.items()):
        if name.startswith(("val/dab_dice/", "val/cell_dice/")):
            axes[-1].plot(steps, values, marker="o", label=name.removeprefix("val/"))
    axes[-1].set(title="validation, moving average of the weights", xlabel="step", ylim=(0, 1))
    if axes[-1].lines:  # a short run ends before its first validation
        axes[-1].legend()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=100)
    plt.close(figure)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Draw the curves of a training run.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--output", type=Path, default=Path(CURVES), help="default: %(default)s")
    chosen = parser.parse_args()
    draw_curves(chosen.run, chosen.output)


if __name__ == "__main__":
    main()
