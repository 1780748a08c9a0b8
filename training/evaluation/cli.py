"""``staindiffuser evaluate``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from staindiffuser.files import check_file, check_folder

__all__ = ["evaluate"]


class SplitName(StrEnum):
    """Splits of a folder of paired tiles."""

    train = "train"
    val = "val"
    test = "test"


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder.", show_default=False)],
    data: Annotated[Path, typer.Option(help="Folder of paired tiles.", show_default=False)],
    steps: Annotated[
        str | None,
        typer.Option(
            help="Sampler steps, one number or several with commas: 1, 2 or 4, or 18 for the teacher's.",
            show_default="what the checkpoint is served with",
        ),
    ] = None,
    split: Annotated[SplitName, typer.Option(help="Rows to score.")] = SplitName.test,
    limit: Annotated[
        int | None, typer.Option(help="At most this many tiles, evenly spread over the split.", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Noise seed.")] = 0,
    margin: Annotated[
        int,
        typer.Option(help="Leave a border of this many pixels out of the scores, as serving crops it.", min=0),
    ] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Skip the slow metrics: edges, cells and KID.")] = False,
    encoder: Annotated[
        Path | None,
        typer.Option(
            "--kid-encoder",
            help="Checkpoint whose encoder measures KID: name the same one to compare checkpoints.",
            show_default="the checkpoint's own",
        ),
    ] = None,
    networks: Annotated[
        bool,
        typer.Option(
            "--networks", help="Also KID and FID on Inception-v3 and LPIPS on AlexNet (extra 'metrics'; their weights)."
        ),
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", callback=check_file, help="Write the result here as JSON.")
    ] = None,
    record: Annotated[
        str | None,
        typer.Option(
            help="Write the scores per cell into the checkpoint (metrics, card, notice), as measured on this data.",
            metavar="DATA",
            show_default=False,
        ),
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Instead of scoring, fit the temperatures of the cell maps on the validation split, and write them "
            "into the checkpoint.",
        ),
    ] = False,
    thresholds: Annotated[
        bool,
        typer.Option(
            "--thresholds",
            help="Instead of scoring, choose the thresholds of the cell maps on the validation split, and write them "
            "into the checkpoint.",
        ),
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(callback=check_folder, help="Write report.md here, with the best, median and worst tiles."),
    ] = None,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Score a checkpoint on paired tiles that it never saw, at one or several step counts.

    Per stain, with bootstrap 95 % intervals: DAB-Dice, IoU, Hausdorff 95, optical-density correlation, positive-area
    error, positive-cell F1, cell-map Dice and F1, radial power, SSIM, PSNR, KID on a frozen encoder. Per cell, on
    nuclei found in the H&E: AUROC and F1 beside baselines that need no network, and calibration. The report defines
    each metric and says how it is pooled.

    Example: staindiffuser evaluate runs/demo/checkpoint --data tiles --steps 1,2,4,18 --json s.json --report scores
    """
    if calibrate and thresholds:
        from staindiffuser.errors import UsageError

        raise UsageError("--calibrate and --thresholds: calibrate first, then choose thresholds of the new map")
    if calibrate or thresholds:
        change = _calibrate if calibrate else _choose_thresholds
        change(checkpoint=checkpoint, data=data, limit=limit, seed=seed, json_file=json_file, progress=progress)
        return
    import dataclasses

    import torch
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from staindiffuser.errors import UsageError
    from staindiffuser.files import write_json
    from staindiffuser.training.checkpoint import Checkpoint
    from staindiffuser.training.evaluation.evaluate import evaluate_steps, summarize
    from staindiffuser.training.evaluation.feature_distances import Networks, our_encoder, published_networks
    from staindiffuser.training.evaluation.record import record_cells
    from staindiffuser.training.evaluation.report import figure, write_report
    from staindiffuser.training.evaluation.slides import spread_of
    from staindiffuser.training.tiles.paired_tiles import PairedTiles

    if record is not None and (quick or limit is not None):
        raise UsageError("--record writes the scores per cell of the whole split: leave out --quick and --limit")
    if quick and encoder is not None:
        raise UsageError("--quick leaves out KID, and --kid-encoder asks for it: give one of the two")
    numbers = _numbers(steps) if steps is not None else ()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Checkpoint.load(checkpoint)
    tiles = PairedTiles.load(data)
    asked = published_networks(device=device) if networks else Networks()
    if not quick:
        ours = our_encoder(model if encoder is None else Checkpoint.load(encoder), device=device)
        asked = dataclasses.replace(asked, features=(ours, *asked.features))
    model.network.to(device)
    screen = Console(stderr=True)
    with Progress(console=screen, disable=not (progress and screen.is_terminal), transient=True) as bar:
        task = bar.add_task("tiles", total=None)
        evaluations = evaluate_steps(
            model,
            tiles,
            steps=numbers or (model.config.steps,),
            split=split.value,
            limit=limit,
            seed=seed,
            batch=16 if device == "cuda" else 4,
            detail=not quick,
            networks=asked,
            margin=margin,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    head = evaluations[0].head()
    for stain in evaluations[0].scores:
        table = Table("metric", title=f"{head['model']}, {stain}, {head['tiles']} {split.value} tiles")
        for evaluation in evaluations:
            table.add_column(f"{evaluation.steps} step{'s' * (evaluation.steps > 1)}", justify="right")
        columns = [evaluation.scores[stain].metrics() for evaluation in evaluations]
        for metric in columns[0]:
            table.add_row(metric, *(figure(values[metric]) for values in columns))
        per_cell = [evaluation.cells[stain].metrics() for evaluation in evaluations if stain in evaluation.cells]
        if per_cell:
            table.add_section()
        for metric in per_cell[0] if per_cell else ():
            table.add_row(f"per cell: {metric}", *(figure(values[metric]) for values in per_cell))
        Console().print(table)
        for evaluation in evaluations:
            if spread := spread_of(evaluation.slides(stain)):
                steps_of = f"{evaluation.steps} step{'s' * (evaluation.steps > 1)}"
                typer.echo(f"{stain}, {steps_of}: DAB-Dice per slide: {spread.line()}")
    if head["trained_on"] and any(head["trained_on"].values()):
        counts = ", ".join(f"{count} {what}" for what, count in head["trained_on"].items() if count)
        typer.echo(f"warning: of {head['tiles']} tiles the model was trained on {counts}: no unseen tissue", err=True)
    if record is not None:
        served = next((e for e in evaluations if e.steps == model.config.steps), evaluations[0])
        recorded = record_cells(served, checkpoint, data=record)
        typer.echo(f"recorded in {checkpoint}; its notice: {recorded.config.notice}")
    if json_file is not None:  # after the table, which is not lost if the disk is full
        write_json(json_file, summarize(evaluations))
    if report is not None:
        typer.echo(f"report: {write_report(evaluations, report)}")


def _calibrate(**given: Any) -> None:
    from staindiffuser.training.evaluation.calibration import calibrate

    def line(one: Any) -> str:
        return (
            f"temperature {one.temperature:g}, calibration error {one.error_before:.3f} → "
            f"{one.error_after:.3f} on {one.cells} cells, {one.positive_cells} of them positive"
        )

    _on_validation(calibrate, line, **given)


def _choose_thresholds(**given: Any) -> None:
    from staindiffuser.training.evaluation.thresholds import choose_thresholds
    from staindiffuser.training.gate import shown

    def line(one: Any) -> str:
        gain = f", difference {one.gain_95[0]:.3f} to {one.gain_95[1]:.3f}" if one.gain_95 else ""
        return (
            f"threshold {one.threshold:g}; F1 {shown(one.f1_at_half)} at one half, "
            f"{shown(one.f1_at_candidate)} at {one.candidate:g}{gain}; best {shown(one.f1_at_best)} at {one.best:g} ("
            f"{one.cells} cells of {one.slides} slides, {one.positive_cells} positive)"
        )

    _on_validation(choose_thresholds, line, **given)


def _on_validation(
    choose: Callable[..., Mapping[str, Any]],
    line: Callable[[Any], str],
    *,
    checkpoint: Path,
    data: Path,
    limit: int | None,
    seed: int,
    json_file: Path | None,
    progress: bool,
) -> None:
    """Show what ``choose`` finds for each stain on the validation split, and writes into the checkpoint."""
    import dataclasses

    from rich.console import Console
    from rich.progress import Progress

    from staindiffuser.files import write_json
    from staindiffuser.training.tiles.paired_tiles import PairedTiles

    screen = Console(stderr=True)
    with Progress(console=screen, disable=not (progress and screen.is_terminal), transient=True) as bar:
        task = bar.add_task("tiles", total=None)
        found = choose(
            checkpoint,
            PairedTiles.load(data),
            limit=limit,
            seed=seed,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    for stain, one in found.items():
        typer.echo(f"{stain}: {line(one)}")
    if json_file is not None:
        write_json(json_file, {stain: dataclasses.asdict(one) for stain, one in found.items()})


def _numbers(text: str) -> tuple[int, ...]:
    from staindiffuser.errors import UsageError

    try:
        numbers = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise UsageError(f"--steps {text}: give a number of steps, or several with commas, such as 1,2,4,18") from None
    return numbers
