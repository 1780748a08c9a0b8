"""``staindiffuser train``, ``staindiffuser train add-stain`` and ``staindiffuser train average``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["add_stain", "app", "average", "train"]

app = typer.Typer(invoke_without_command=True, subcommand_metavar="[COMMAND]")


class PresetName(StrEnum):
    """Sizes of the model, each with its recipe."""

    debug = "debug"
    demo = "demo"
    base = "base"
    large = "large"


class StrategyName(StrEnum):
    """How several processes share the work."""

    auto = "auto"
    ddp = "ddp"
    fsdp = "fsdp"


class TrackName(StrEnum):
    """Trackers that get the curves too."""

    mlflow = "mlflow"
    wandb = "wandb"


class KeepName(StrEnum):
    """Which weights a run ends with."""

    best = "best"
    last = "last"


Data = Annotated[
    list[str] | None,
    typer.Option(
        help="Folder of paired tiles (tiles.csv). Required; several are mixed: FOLDER=WEIGHT.", metavar="FOLDER"
    ),
]
Stains = Annotated[
    str | None,
    typer.Option(
        help="Columns to learn, comma-separated; by default the --from checkpoint's, or all. Of several folders, one "
        "may lack some of these.",
        show_default=False,
    ),
]
Output = Annotated[Path | None, typer.Option(help="Run folder; the same command resumes it. Required.")]
Steps = Annotated[int | None, typer.Option(help="Optimiser steps, instead of the recipe's.")]
Batch = Annotated[int | None, typer.Option(help="Crops per step over all processes, instead of the recipe's.")]
GradientAccumulation = Annotated[
    int | None, typer.Option(help="Split each step's crops into this many parts, one after the other: less memory.")
]
Crop = Annotated[int | None, typer.Option(help="Crop size in pixels, instead of the recipe's.")]
LearningRate = Annotated[float | None, typer.Option(help="Peak rate, instead of the recipe's.")]
Seed = Annotated[int | None, typer.Option(help="Decides weights, crops and noise, instead of the recipe's.")]
Workers = Annotated[int | None, typer.Option(help="Loader processes, instead of the recipe's.")]
TrainedOn = Annotated[str, typer.Option(help="What every output says the model was trained on.")]
Resume = Annotated[
    str,
    typer.Option(
        help="auto: go on from the run's newest snapshot; never; or begin with this snapshot of another run.",
        metavar="auto|never|PATH",
    ),
]
Strategy = Annotated[
    StrategyName, typer.Option(help="With torchrun: ddp, or fsdp, which shares the weights too (large's own choice).")
]
LogEvery = Annotated[int, typer.Option(help="Steps between two rows of the curves.", min=1)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check data, settings and output; train and write nothing.")]
Progress = Annotated[
    bool, typer.Option(help="A progress bar; otherwise, and where there is no terminal, a line now and then.")
]
FoldOption = Annotated[
    str | None,
    typer.Option(
        help="Cross-validation by patient: validate on this part of train and val, train on the others.",
        metavar="NUMBER/OF",
        show_default=False,
    ),
]
Track = Annotated[
    TrackName | None,
    typer.Option(help="Send the curves to MLflow or Weights & Biases too (an extra each).", show_default=False),
]
KeepOption = Annotated[
    KeepName, typer.Option(help="Weights that the run ends with: of the best validation, or of the last step.")
]
AcceptDataChange = Annotated[
    bool,
    typer.Option("--accept-data-change", help="Go on although the tiles changed since the run began; it is recorded."),
]

TRAINED_ON = "the data named in its card"


@app.callback()
def train(
    ctx: typer.Context,
    data: Data = None,
    output: Output = None,
    preset: Annotated[
        PresetName | None, typer.Option(help="Size and recipe; the settings file's, or demo.", show_default=False)
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Settings, TOML or JSON: preset, and fields of train and model to change.")
    ] = None,
    steps: Steps = None,
    batch: Batch = None,
    gradient_accumulation: GradientAccumulation = None,
    crop: Crop = None,
    learning_rate: LearningRate = None,
    seed: Seed = None,
    workers: Workers = None,
    name: Annotated[str, typer.Option(help="Name written into the checkpoint.")] = "model",
    trained_on: TrainedOn = TRAINED_ON,
    stains: Stains = None,
    start: Annotated[
        Path | None,
        # Not --start: torchrun, in front of the command, would take that for a beginning of its own --start-method.
        typer.Option(
            "--from",
            help="Begin with this checkpoint's weights: of the same encoder; stains and a backbone may be added.",
            show_default=False,
        ),
    ] = None,
    resume: Resume = "auto",
    accept_data_change: AcceptDataChange = False,
    fold: FoldOption = None,
    keep: KeepOption = KeepName.best,
    track: Track = None,
    strategy: Strategy = StrategyName.auto,
    log_every: LogEvery = 20,
    dry_run: DryRun = False,
    progress: Progress = True,
) -> None:
    """Train a dual-diffusion checkpoint on paired tiles, or add a stain to one.

    Example: staindiffuser train --data tiles --output runs/demo --preset demo

    Several GPUs: torchrun --nproc-per-node 8 --no-python staindiffuser train --data tiles --output runs/base
    """
    if ctx.invoked_subcommand is not None:
        return
    data, output = _required(ctx, data, output)

    from staindiffuser.training.options import RunOptions
    from staindiffuser.training.settings import choose_preset
    from staindiffuser.training.train import train as run

    changes = _changes(
        steps=steps,
        batch=batch,
        gradient_accumulation=gradient_accumulation,
        crop=crop,
        learning_rate=learning_rate,
        seed=seed,
        workers=workers,
    )
    size, chosen = choose_preset(preset and preset.value, config, changes)
    options = RunOptions(
        output=output,
        name=name,
        trained_on=trained_on,
        start=start,
        resume=resume_from(resume),
        accept_data_change=accept_data_change,
        fold=fold_of(fold),
        keep=keep.value,
        track=track.value if track else None,
        strategy=_strategy(strategy, size),
        log_every=log_every,
        progress="bar" if progress else "lines",
        dry_run=dry_run,
    )
    with stopping():
        folder = run(chosen, data, options, stains=tuple(filter(None, (stains or "").split(","))))
    _report(folder, data, dry_run=dry_run)


@app.command("add-stain")
def add_stain(
    ctx: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder.", show_default=False)],
    stain: Annotated[str, typer.Option(help="The new stain: its column in the data.", show_default=False)],
    data: Data = None,
    output: Output = None,
    config: Annotated[
        Path | None, typer.Option(help="Settings, TOML or JSON: fields of train that differ from its recipe.")
    ] = None,
    steps: Steps = None,
    batch: Batch = None,
    gradient_accumulation: GradientAccumulation = None,
    crop: Crop = None,
    learning_rate: LearningRate = None,
    seed: Seed = None,
    workers: Workers = None,
    name: Annotated[
        str, typer.Option(help="Name of the new checkpoint; the old one's if not given.", show_default=False)
    ] = "",
    trained_on: TrainedOn = TRAINED_ON,
    resume: Resume = "auto",
    accept_data_change: AcceptDataChange = False,
    fold: FoldOption = None,
    keep: KeepOption = KeepName.best,
    track: Track = None,
    strategy: Strategy = StrategyName.ddp,
    log_every: LogEvery = 20,
    dry_run: DryRun = False,
    progress: Progress = True,
) -> None:
    """Add a stain to a checkpoint: a new pair of branches on its encoder; the old stains do not change by a bit.

    The recipe is the one that the checkpoint was trained by, unless options say otherwise.

    Example: staindiffuser train add-stain runs/mine/checkpoint --stain ki67 --data tiles --output runs/ki67
    """
    data, output = _required(ctx, data, output)

    from staindiffuser.training.add_stain import add_stain as run
    from staindiffuser.training.options import RunOptions

    changes = _changes(
        steps=steps,
        batch=batch,
        gradient_accumulation=gradient_accumulation,
        crop=crop,
        learning_rate=learning_rate,
        seed=seed,
        workers=workers,
    )
    options = RunOptions(
        output=output,
        name=name,
        trained_on=trained_on,
        resume=resume_from(resume),
        accept_data_change=accept_data_change,
        fold=fold_of(fold),
        keep=keep.value,
        track=track.value if track else None,
        strategy=_strategy(strategy, ""),
        log_every=log_every,
        progress="bar" if progress else "lines",
        dry_run=dry_run,
    )
    with stopping():
        folder = run(checkpoint, stain, data, options, file=config, **changes)
    _report(folder, data, dry_run=dry_run)


@app.command("average")
def average(
    first: Annotated[Path, typer.Argument(help="Checkpoint folder.", show_default=False)],
    second: Annotated[Path, typer.Argument(help="One that was trained --from it.", show_default=False)],
    output: Annotated[Path, typer.Option(help="Checkpoint folder to write.", show_default=False)],
    share: Annotated[float, typer.Option(help="Of the second's weights, between 0 and 1.")] = 0.5,
    name: Annotated[
        str, typer.Option(help="Name of the new checkpoint; the second's if not given.", show_default=False)
    ] = "",
) -> None:
    """Average the weights of a checkpoint and of one that was trained further from it.

    Other laboratories' tissue is kept that further training forgets. Where the encoder was trained, images are painted
    anew from the averaged one: staindiffuser distill --method e2e.

    Example: staindiffuser train average runs/mine/checkpoint runs/further/checkpoint --output runs/mean
    """
    from staindiffuser.training.averaging import average_checkpoints

    typer.echo(f"checkpoint: {average_checkpoints(first, second, output, share=share, name=name)}")


def _required(ctx: typer.Context, data: list[str] | None, output: Path | None) -> tuple[list[str], Path]:
    """Both, or the usual complaint: ``train`` needs neither when a subcommand follows it."""
    if not data:
        ctx.fail("Missing option '--data'.")
    if output is None:
        ctx.fail("Missing option '--output'.")
    return data, output


def _changes(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def resume_from(value: str) -> bool | Path:
    """What ``--resume`` says."""
    return {"auto": True, "never": False}.get(value, Path(value))


def fold_of(text: str | None) -> Any:
    """What ``--fold`` says."""
    from staindiffuser.training.tiles.folds import Fold

    return Fold.parse(text) if text else None


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """Say what a run that was asked to stop has saved."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if str(stop) and _first():
            typer.echo(str(stop), err=True)
        raise


def _first() -> bool:
    return os.environ.get("RANK", "0") == "0"  # torchrun's


def _strategy(asked: StrategyName, size: str) -> Any:
    if asked is not StrategyName.auto:
        return asked.value
    return "fsdp" if size == "large" and int(os.environ.get("WORLD_SIZE", "1")) > 1 else "ddp"


def _report(folder: Path, data: list[str], *, dry_run: bool) -> None:
    if not _first():
        return
    if dry_run:
        _show_data(data)
    typer.echo(f"{', '.join(data)}: everything checked, nothing trained" if dry_run else f"checkpoint: {folder}")


def _show_data(data: list[str]) -> None:
    """What ``data check`` shows of each folder."""
    from rich.console import Console

    from staindiffuser.training.check.check import check_tiles
    from staindiffuser.training.check.sheet import worst_tiles
    from staindiffuser.training.check.tables import print_report
    from staindiffuser.training.tiles.mixed_tiles import parse_spec

    for spec in data:
        report = check_tiles(parse_spec(spec)[0], jobs=os.cpu_count() or 1)
        print_report(report, worst_tiles(report.suspicions, 10), Console())
