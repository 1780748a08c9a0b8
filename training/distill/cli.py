"""``staindiffuser distill``."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from staindiffuser.training.cli import (
    AcceptDataChange,
    DryRun,
    FoldOption,
    GradientAccumulation,
    KeepName,
    KeepOption,
    LogEvery,
    Progress,
    Resume,
    Track,
    fold_of,
    resume_from,
    stopping,
)

if TYPE_CHECKING:
    from staindiffuser.training.gate import GateRow

__all__ = ["distill"]


class MethodName(StrEnum):
    """How the student is trained."""

    ect = "ect"
    e2e = "e2e"


class WeightingName(StrEnum):
    """Weight of the consistency loss per noise level."""

    step = "step"
    flat = "flat"


class SplitName(StrEnum):
    """Rows that the gate can judge by."""

    val = "val"
    test = "test"


def distill(
    checkpoint: Annotated[Path, typer.Argument(help="The teacher's checkpoint folder.", show_default=False)],
    data: Annotated[
        list[str],
        typer.Option(
            help="Folder of paired tiles (tiles.csv); several are mixed: FOLDER=WEIGHT.",
            metavar="FOLDER",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option(help="Run folder; the same command resumes it.", show_default=False)],
    method: Annotated[
        MethodName, typer.Option(help="ect: easy consistency tuning; e2e: end-to-end one-step fine-tuning.")
    ] = MethodName.ect,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps; an eighth of the teacher's if not given.")] = None,
    batch: Annotated[int | None, typer.Option(help="Crops per step; the teacher's if not given.")] = None,
    gradient_accumulation: GradientAccumulation = None,
    crop: Annotated[int | None, typer.Option(help="Crop size in pixels; the teacher's if not given.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak rate; a fifth of the teacher's if not given.")
    ] = None,
    stages: Annotated[int | None, typer.Option(help="Stages of consistency tuning; 3 if not given.")] = None,
    weighting: Annotated[
        WeightingName | None,
        typer.Option(help="Weight of the consistency loss per noise level: flat (the default), or step, 1 / (t − r)."),
    ] = None,
    consistent_below: Annotated[
        float | None,
        typer.Option(help="At and above this noise level the student learns the expected image; 1.5 if not given."),
    ] = None,
    r_min: Annotated[float | None, typer.Option(help="Noise levels r below this count as 0; 0.1 if not given.")] = None,
    p_mean: Annotated[float | None, typer.Option(help="Mean of ln σ; -1 if not given.")] = None,
    p_std: Annotated[float | None, typer.Option(help="Standard deviation of ln σ; 0.9 if not given.")] = None,
    max_share: Annotated[float | None, typer.Option(help="Share of the draws at the highest noise level.")] = None,
    detail_weight: Annotated[
        float | None, typer.Option(help="Weight of e2e's loss on local spectra; the pixel loss has 1. 30 if not given.")
    ] = None,
    density_weight: Annotated[
        float | None,
        typer.Option(help="Weight of e2e's loss on the stains' densities; the pixel loss has 1. 3 if not given."),
    ] = None,
    edge_weight: Annotated[
        float | None,
        typer.Option(help="Weight of e2e's loss on steps from pixel to pixel; the pixel loss has 1. 3 if not given."),
    ] = None,
    positive_weight: Annotated[
        float | None,
        typer.Option(help="Weight of positive pixels in e2e; negative ones have 1. 2 if not given."),
    ] = None,
    images_from: Annotated[
        str | None,
        typer.Option(
            metavar="STAIN",
            help="Begin every image branch with the teacher's of this stain; by default each begins with its own.",
        ),
    ] = None,
    bf16: Annotated[
        bool | None,
        typer.Option(
            "--bf16/--no-bf16",
            help="Half the digits, where processor or GPU compute in it. By default e2e does as the teacher's training "
            "did, ect without.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides crops and noise.")] = 0,
    workers: Annotated[int | None, typer.Option(help="Loader processes; the teacher's if not given.")] = None,
    search: Annotated[bool, typer.Option(help="Search the noise levels on validation tiles.")] = True,
    search_tiles: Annotated[int, typer.Option(help="Validation tiles for the search.", min=1)] = 8,
    gate_tiles: Annotated[int, typer.Option(help="Tiles for the gate, at most.", min=1)] = 64,
    split: Annotated[SplitName, typer.Option(help="Rows that the gate judges by.")] = SplitName.val,
    at_most: Annotated[
        int, typer.Option(help="Largest number of steps that may ship; more are shown for comparison.", min=1)
    ] = 4,
    undistilled: Annotated[
        bool, typer.Option("--undistilled", help="Show the teacher's own few steps in the table, for comparison.")
    ] = False,
    only_gate: Annotated[
        bool, typer.Option("--only-gate", help="Train nothing: search and judge --student, or the teacher itself.")
    ] = False,
    student: Annotated[
        Path | None, typer.Option(help="With --only-gate: a finished student of this teacher.", show_default=False)
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name written into the checkpoint; the teacher's if not given.")
    ] = None,
    resume: Resume = "auto",
    accept_data_change: AcceptDataChange = False,
    fold: FoldOption = None,
    keep: KeepOption = KeepName.best,
    track: Track = None,
    log_every: LogEvery = 20,
    dry_run: DryRun = False,
    progress: Progress = True,
) -> None:
    """Make a few-step student of a teacher: tune its image branches, search σ, choose the steps by the gate.

    The gate: the fewest steps whose DAB-Dice is within 0.01 of the best and whose radial power is within 20 % of the
    real stain's, for every stain. If none passes, the number of steps that comes closest is stored, marked as failed.

    Example: staindiffuser distill runs/demo/checkpoint --data tiles --output runs/demo-few
    """
    from staindiffuser.errors import UsageError
    from staindiffuser.training.distill.run import GALLERY, JudgeOptions, judge_student
    from staindiffuser.training.distill.run import distill as run
    from staindiffuser.training.options import RunOptions

    if student is not None and not only_gate:
        raise UsageError("--student goes with --only-gate; a student is trained from its teacher")
    judging = JudgeOptions(
        search=search,
        search_tiles=search_tiles,
        gate_tiles=gate_tiles,
        split=split.value,
        at_most=at_most,
        undistilled=undistilled,
        seed=seed,
    )
    if only_gate:
        outcome = judge_student(checkpoint, student, data, output, judging, dry_run=dry_run)
    else:
        asked = {
            "method": method.value,
            "steps": steps,
            "batch": batch,
            "gradient_accumulation": gradient_accumulation,
            "crop": crop,
            "learning_rate": learning_rate,
            "stages": stages,
            "weighting": weighting.value if weighting else None,
            "consistent_below": consistent_below,
            "r_min": r_min,
            "p_mean": p_mean,
            "p_std": p_std,
            "image_max_share": max_share,
            "detail_weight": detail_weight,
            "density_weight": density_weight,
            "edge_weight": edge_weight,
            "positive_weight": positive_weight,
            "images_from": images_from,
            "bf16": bf16,
            "seed": seed,
            "workers": workers,
        }
        changes: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}
        options = RunOptions(
            output=output,
            name=name or "",
            resume=resume_from(resume),
            accept_data_change=accept_data_change,
            fold=fold_of(fold),
            keep=keep.value,
            track=track.value if track else None,
            log_every=log_every,
            progress="bar" if progress else "lines",
            dry_run=dry_run,
        )
        with stopping():
            outcome = run(checkpoint, data, options, judging, **changes)
    if dry_run:
        typer.echo(f"{', '.join(data)}: everything checked, nothing trained")
    elif outcome.verdict is not None:
        _show(outcome.rows)
        typer.echo(outcome.verdict.line())
        typer.echo(f"checkpoint: {outcome.folder}; look at {outcome.folder.parent / GALLERY}")


def _show(rows: Sequence[GateRow]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in ("sampler", "σ", "stain", "DAB-Dice", "radial power"):
        table.add_column(column, justify="left" if column in ("sampler", "σ", "stain") else "right")
    for row in rows:
        label, sigmas = f"{row.role}, k = {row.steps}", ", ".join(f"{s:g}" for s in row.sigmas or ()) or "Heun"
        for stain, values in row.stains.items():
            table.add_row(label, sigmas, stain, f"{values['dab_dice']:.3f}", f"{values['radial_power']:.2f}")
            label = sigmas = ""
    Console().print(table)
