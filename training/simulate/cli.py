"""``staindiffuser simulate``: paired tiles and slides of simulated tissue."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    help="Simulate tissue: paired H&E and IHC tiles, or a pyramidal slide. It means nothing medically.",
    rich_markup_mode="markdown",
)


@app.command(
    epilog="Examples:\n\n`staindiffuser simulate tiles --output tiles --count 2000`\n\n"
    "`staindiffuser simulate tiles --output cd3-tiles --count 500 --stains cd3 --seed 7 --jobs 2 --json`"
)
def tiles(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; made if it does not exist.")],
    count: Annotated[int, typer.Option(help="Number of tiles.")] = 1000,
    size: Annotated[int, typer.Option(help="Edge of a tile in pixels (0.5 µm each); a multiple of 16.")] = 256,
    seed: Annotated[int, typer.Option(help="Tile i of a seed is the same everywhere.")] = 0,
    first: Annotated[int, typer.Option(help="Index of the first tile.")] = 0,
    stains: Annotated[str, typer.Option(help="Comma-separated; cd3 and ck818 are simulated.")] = "cd3,ck818",
    val_share: Annotated[float, typer.Option(help="Share of slides for validation.")] = 0.1,
    test_share: Annotated[float, typer.Option(help="Share of slides for the test split.")] = 0.1,
    masks: Annotated[bool, typer.Option("--masks/--no-masks", help="Also write the coarse masks.")] = True,
    jobs: Annotated[int, typer.Option("--jobs", "-j", help="Processes; 0 takes one per core.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON on stdout.")] = False,
) -> None:
    """Write paired tiles: H&E, IHC per stain, coarse masks, and `tiles.csv`.

    Interrupted runs continue where they stopped: what is there and matches is kept.
    """
    import dataclasses
    import json

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from staindiffuser.training.simulate.folder import TilesRequest, write_tiles

    request = TilesRequest(
        output=output, count=count, size=size, seed=seed, first=first, val_share=val_share, test_share=test_share,
        stains=tuple(stain.strip() for stain in stains.split(",") if stain.strip()), masks=masks,
        jobs=jobs or os.cpu_count() or 1,
    )  # fmt: skip
    columns = (
        TextColumn("simulating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=as_json) as bar:
        task = bar.add_task("tiles", total=count, rate="")

        def progress(done: int, total: int) -> None:
            speed = bar.tasks[0].speed
            bar.update(task, completed=done, total=total, rate=f"{speed:.0f} tiles/s" if speed else "")

        result = write_tiles(request, progress)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(result)))
    else:
        typer.echo(f"{result.tiles} tiles in {result.output} ({result.written} new, {result.seconds:.1f} s)")


@app.command(
    epilog="Examples:\n\n`staindiffuser simulate slide --output slide.ome.tiff`\n\n"
    "`staindiffuser simulate slide --output big.ome.tiff --width 20000 --height 15000 --seed 3 --ihc --jobs 2`"
)
def slide(
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write, such as slide.ome.tiff.")],
    width: Annotated[int, typer.Option(help="Pixels of 0.5 µm.")] = 4096,
    height: Annotated[int, typer.Option(help="Pixels of 0.5 µm.")] = 3072,
    seed: Annotated[int, typer.Option(help="Every pixel follows from it.")] = 0,
    ihc: Annotated[bool, typer.Option("--ihc", help="Also write the true IHC slides, one file per stain.")] = False,
    jobs: Annotated[int, typer.Option("--jobs", "-j", help="Processes; 0 takes one per core.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the files written as JSON on stdout.")] = False,
) -> None:
    """Write a simulated H&E slide: a tiled pyramidal OME-TIFF that OpenSlide opens, in bounded memory."""
    import json

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from staindiffuser.training.simulate.slide_file import SlideRequest, write_slide

    request = SlideRequest(
        output=output, width=width, height=height, seed=seed, ihc=ihc, jobs=jobs or os.cpu_count() or 1
    )
    columns = (TextColumn("simulating"), BarColumn(), TextColumn("{task.percentage:.0f} %"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=as_json) as bar:
        task = bar.add_task("slide", total=None)
        files = write_slide(request, lambda done, total: bar.update(task, completed=done, total=total))
    if as_json:
        typer.echo(json.dumps({"files": [str(file) for file in files]}))
    else:
        for file in files:
            typer.echo(str(file))
