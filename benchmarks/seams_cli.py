"""``staindiffuser bench seams``: its options and its table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from staindiffuser.benchmarks.reporting import JsonFile, hand_over

__all__ = ["seams"]


def seams(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder, such as checkpoints/demo.")],
    slide: Annotated[Path, typer.Argument(help="H&E slide that states its pixel size.")],
    margin: Annotated[list[int] | None, typer.Option(min=0, help="Margin in pixels. Repeatable.")] = None,
    tile: Annotated[
        int | None, typer.Option(min=64, help="Side of a tile, pixels; the checkpoint's if absent.")
    ] = None,
    x: Annotated[int, typer.Option(min=0, help="Left edge of the region, pixels at the model's pixel size.")] = 0,
    y: Annotated[int, typer.Option(min=0, help="Upper edge of the region.")] = 0,
    side: Annotated[int, typer.Option(min=64, help="Side of the region.")] = 768,
    json_file: JsonFile = None,
) -> None:
    """A region in tiles against the same region as one large tile, by margin: how much the grid of tiles shows."""
    from staindiffuser.benchmarks.seams import bench_seams

    report = bench_seams(
        checkpoint,
        slide,
        margin or (0, 16, 32, 48, 64, 96),
        tile=tile,
        corner=(x, y),
        side=side,
        progress=lambda line: typer.echo(line, err=True),
    )
    if hand_over(report, json_file):
        return
    for line in report.lines():
        typer.echo(line)
