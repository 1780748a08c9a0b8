"""``staindiffuser train`` and ``staindiffuser evaluate``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["evaluate", "train"]


class PresetName(StrEnum):
    """Sizes of the model, each with its recipe."""

    debug = "debug"
    demo = "demo"
    base = "base"
    large = "large"


class SplitName(StrEnum):
    """Splits of a folder of paired tiles."""

    train = "train"
    val = "val"
    test = "test"


def train(
    data: Annotated[Path, typer.Option(help="Folder of paired tiles (tiles.csv).", show_default=False)],
    output: Annotated[Path, typer.Option(help="Run folder; the same command resumes it.", show_default=False)],
    preset: Annotated[PresetName, typer.Option(help="Size and recipe.")] = PresetName.demo,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps, instead of the preset's.")] = None,
    batch: Annotated[int | None, typer.Option(help="Crops per step, instead of the preset's.")] = None,
    crop: Annotated[int | None, typer.Option(help="Crop size in pixels, instead of the preset's.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak rate, instead of the preset's.")] = None,
    seed: Annotated[int, typer.Option(help="Decides weights, crops and noise.")] = 0,
    workers: Annotated[int | None, typer.Option(help="Loader processes, instead of the preset's.")] = None,
    name: Annotated[str, typer.Option(help="Name written into the checkpoint.")] = "model",
    trained_on: Annotated[
        str, typer.Option(help="What every output says the model was trained on.")
    ] = "the data named in its card",
    resume: Annotated[bool, typer.Option(help="Go on from the run's last snapshot.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check data and settings, train nothing.")] = False,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Train a dual-diffusion checkpoint on paired tiles.

    Example: staindiffuser train --data tiles --output runs/demo --preset demo
    """
    import dataclasses

    from staindiffuser.training.config import PRESETS
    from staindiffuser.training.loop import RunOptions
    from staindiffuser.training.loop import train as run

    chosen = PRESETS[preset.value]
    asked = {
        "steps": steps,
        "batch": batch,
        "crop": crop,
        "seed": seed,
        "workers": workers,
        "learning_rate": learning_rate,
    }
    changes: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    chosen = dataclasses.replace(chosen, train=dataclasses.replace(chosen.train, **changes))
    options = RunOptions(
        output=output, name=name, trained_on=trained_on, resume=resume, progress=progress, dry_run=dry_run
    )
    folder = run(chosen, data, options)
    typer.echo(f"{data}: everything checked, nothing trained" if dry_run else f"checkpoint: {folder}")


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder.", show_default=False)],
    data: Annotated[Path, typer.Option(help="Folder of paired tiles.", show_default=False)],
    steps: Annotated[int, typer.Option(help="Sampler steps: 1, 2 or 4, or 18 for the teacher's.")] = 2,
    split: Annotated[SplitName, typer.Option(help="Rows to score.")] = SplitName.test,
    limit: Annotated[int | None, typer.Option(help="At most this many tiles.")] = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here as JSON.")] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write report.md here, with the best, median and worst tiles.")
    ] = None,
) -> None:
    """Score a checkpoint on paired tiles that it never saw.

    Per stain: DAB-Dice, optical-density correlation, positive-area error, cell-map Dice, radial power, SSIM, PSNR.

    Example: staindiffuser evaluate runs/demo/checkpoint --data tiles --steps 2 --json scores.json --report scores
    """
    from rich.console import Console
    from rich.table import Table

    from staindiffuser.files import write_json
    from staindiffuser.training.checkpoint import Checkpoint
    from staindiffuser.training.data.pairs import PairedTiles
    from staindiffuser.training.evaluate import evaluate as score
    from staindiffuser.training.report import write_report

    evaluation = score(
        Checkpoint.load(checkpoint),
        PairedTiles.load(data),
        steps=steps,
        split=split.value,
        limit=limit,
        seed=seed,
    )
    result = evaluation.summary()
    if json_file is not None:
        write_json(json_file, result)
    if report is not None:
        typer.echo(f"report: {write_report(evaluation, report)}")
    table = Table(title=f"{result['model']}, {result['steps']} steps, {result['tiles']} {split.value} tiles")
    stains = result["stains"]
    table.add_column("metric")
    for stain in stains:
        table.add_column(stain, justify="right")
    for metric in next(iter(stains.values())):
        table.add_row(metric, *(f"{values[metric]:.3f}" for values in stains.values()))
    Console().print(table)
