"""``staindiffuser data check``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")


@app.callback()
def _group() -> None:
    """Look at paired tiles before training on them."""


@app.command(
    epilog="Examples:\n\n`staindiffuser data check tiles`\n\n"
    "`staindiffuser data check tiles --sheet suspicious.jpg --json > check.json`"
)
def check(
    folder: Annotated[Path, typer.Argument(help="Folder of paired tiles.", show_default=False)],
    sheet: Annotated[
        Path | None, typer.Option(help="Write the most suspicious tiles here, as JPEG or PNG, to look at.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Number of suspicious tiles shown.")] = 24,
    jobs: Annotated[int, typer.Option("--jobs", "-j", help="Processes; 0 takes one per core.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON on stdout.")] = False,
) -> None:
    """Show what a folder of paired tiles holds, what is wrong with it, and which tiles to look at.

    Values of the masks, positive share per stain and split, alignment of H&E and IHC, copies and leaks between splits,
    blank and blurred tiles, odd colours, sizes, and stains that are brown where they are negative.

    Exit code 4: the folder cannot be trained on.
    """
    import json

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from staindiffuser.training.check.check import check_tiles
    from staindiffuser.training.check.sheet import worst_tiles, write_sheet
    from staindiffuser.training.check.tables import print_report
    from staindiffuser.training.errors import DataError

    columns = (TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=as_json) as bar:
        task = bar.add_task("tiles", total=None)
        report = check_tiles(
            folder,
            jobs=jobs or os.cpu_count() or 1,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    worst = worst_tiles(report.suspicions, count)
    if as_json:
        typer.echo(json.dumps(report.to_json(), ensure_ascii=False))
    else:
        print_report(report, worst, Console())
    if sheet is not None and worst:
        write_sheet(sheet, worst)
        if not as_json:
            typer.echo(f"{len(worst)} tiles to look at: {sheet}")
    if report.errors:
        more = f" (and {len(report.errors) - 1} more)" if len(report.errors) > 1 else ""
        raise DataError(report.errors[0] + more)
