"""``staindiffuser prepare pairs``."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["EPILOG", "pairs"]

EPILOG = (
    "Examples:\n\n"
    "`staindiffuser prepare pairs --he case1-he.svs --ihc cd3=case1-cd3.svs --output tiles`\n\n"
    "`staindiffuser prepare pairs --he he.ndpi --ihc cd3=cd3.ndpi --ihc ck818=ck.ndpi -o tiles --split val`\n\n"
    "`staindiffuser prepare pairs --he he.png --he-mpp 0.5 --ihc cd3=ihc.png --ihc-mpp 0.5 "
    "--landmarks cd3=he.csv,ihc.csv -o tiles --dry-run`"
)


class SplitName(StrEnum):
    """Splits of a folder of paired tiles."""

    train = "train"
    val = "val"
    test = "test"


def pairs(
    he: Annotated[Path, typer.Option(help="The H&E slide.", show_default=False)],
    ihc: Annotated[
        list[str],
        typer.Option(help="STAIN=SLIDE, the IHC of the same or the next section; may be repeated.", show_default=False),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Folder of paired tiles; slides are added to it.", show_default=False),
    ],
    tile: Annotated[int, typer.Option(help="Edge of a tile, pixels; a multiple of 16.")] = 256,
    mpp: Annotated[float, typer.Option(help="Pixel size of the tiles, µm: the model's.")] = 0.5,
    he_mpp: Annotated[float | None, typer.Option(help="Pixel size of the H&E, µm, if its file does not say.")] = None,
    ihc_mpp: Annotated[float | None, typer.Option(help="The same for the IHC.")] = None,
    landmarks: Annotated[
        list[str] | None,
        typer.Option(help="STAIN=HE.csv,IHC.csv: points of both slides, to measure the error (ANHIR's layout)."),
    ] = None,
    slide: Annotated[str | None, typer.Option(help="Name of the slide; the H&E's file name if not given.")] = None,
    patient: Annotated[str | None, typer.Option(help="Whose tissue it is: a patient is never in two splits.")] = None,
    split: Annotated[SplitName | None, typer.Option(help="Split of the slide; dealt by its name if not given.")] = None,
    val_share: Annotated[float, typer.Option(help="Share of slides dealt to val.")] = 0.1,
    test_share: Annotated[float, typer.Option(help="Share of slides dealt to test.")] = 0.1,
    min_tissue: Annotated[float, typer.Option(help="Share of a tile that must be tissue.")] = 0.25,
    jobs: Annotated[int, typer.Option("--jobs", "-j", help="Threads; 0 takes one per core, at most 4.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Register and report, cut no tiles.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON on stdout.")] = False,
) -> None:
    """Register an H&E slide with its IHC slides and cut them into paired tiles.

    The sections may be rotated by any angle, and parts may be missing. A registration that cannot be trusted is
    refused. Tiles that are blank, blurred, misregistered or without their IHC are dropped and counted; look at the
    figures in OUTPUT/pairs. An interrupted run goes on where it stopped.
    """
    import dataclasses
    import json

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from staindiffuser.errors import UsageError
    from staindiffuser.training.prepare.request import PairRequest
    from staindiffuser.training.prepare.slide_pairs import prepare_pair

    slides: dict[str, Path] = {}
    for value in ihc:
        stain, separator, path = value.partition("=")
        if not separator or not path or stain in slides:
            raise UsageError(f"--ihc {value}: give STAIN=SLIDE, each stain once, such as cd3=slide.svs")
        slides[stain] = Path(path)
    points: dict[str, tuple[Path, Path]] = {}
    for value in landmarks or ():
        stain, separator, files = value.partition("=")
        names = files.split(",")
        if not separator or len(names) != 2 or not all(names) or stain in points:
            raise UsageError(f"--landmarks {value}: give STAIN=HE.csv,IHC.csv, each stain once")
        points[stain] = (Path(names[0]), Path(names[1]))
    request = PairRequest(
        he=he,
        ihc=slides,
        output=output,
        slide=slide,
        patient=patient,
        tile=tile,
        mpp=mpp,
        he_mpp=he_mpp,
        ihc_mpp=ihc_mpp,
        landmarks=points,
        split=None if split is None else split.value,
        val_share=val_share,
        test_share=test_share,
        least_tissue=min_tissue,
        jobs=jobs or min(4, os.cpu_count() or 1),
        dry_run=dry_run,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=as_json) as bar:
        task = bar.add_task("reading", total=None)
        result = prepare_pair(
            request, lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
        )
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(result)))
        return
    for stain, part in result.stains.items():
        error = ""
        if part.target_error is not None:
            error = (
                f", landmarks off by {part.target_error.median:.2%} of the diagonal (median; largest "
                f"{part.target_error.maximum:.2%}, before {part.target_error.before:.2%})"
            )
        typer.echo(
            f"{stain}: score {part.score:.2f}, {part.agreement:.0%} of the blocks agree, "
            f"rotated by {part.rotation:.1f}°{error}; image: {output / part.image}"
        )
    if dry_run:
        typer.echo("no tiles cut (--dry-run)")
        return
    lost = ", ".join(f"{count} {reason}" for reason, count in result.dropped.items() if count)
    typer.echo(
        f"{result.slide} ({result.split}): {result.kept} of {result.tiles} tiles kept"
        f"{f' ({lost} dropped)' if lost else ''}, {result.written} new, {result.seconds:.1f} s, in {result.output}"
    )
