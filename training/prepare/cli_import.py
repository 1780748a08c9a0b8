"""``staindiffuser prepare import``."""

from __future__ import annotations

import os
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from staindiffuser.errors import UsageError

__all__ = ["EPILOG", "LayoutName", "import_"]

EPILOG = (
    "Examples:\n\n`staindiffuser prepare import --layout bci BCI_dataset --output bci-tiles`\n\n"
    "`staindiffuser prepare import --layout mist MIST --stain her2 --mpp 0.5 --output her2-tiles --resplit`\n\n"
    "`staindiffuser prepare import --layout folder pairs --mpp 0.25 --slide-pattern '^(case[0-9]+)' -o tiles --dry-run`"
)


class LayoutName(StrEnum):
    """Layouts that can be imported."""

    bci = "bci"
    mist = "mist"
    hemit = "hemit"
    pix2pix = "pix2pix"
    deepliif = "deepliif"
    folder = "folder"


class MaskCodeName(StrEnum):
    """Codes of masks."""

    auto = "auto"
    grey = "grey"
    ones = "ones"
    labels = "labels"


def import_(
    source: Annotated[Path, typer.Argument(help="The data set's folder.", show_default=False)],
    layout: Annotated[LayoutName, typer.Option(help="How the folder is laid out.", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write; made if it does not exist.", show_default=False)
    ],
    mpp: Annotated[
        float | None, typer.Option(help="The source's pixel size, µm; its publication's if it states one.")
    ] = None,
    stain: Annotated[
        list[str] | None, typer.Option(help="Names the stain, or chooses among several; may be repeated.")
    ] = None,
    tile: Annotated[int, typer.Option(help="Edge of a tile, pixels of 0.5 µm; a multiple of 16.")] = 256,
    val_share: Annotated[
        float, typer.Option(help="Share of the training slides for val, if the source has none.")
    ] = 0.1,
    test_share: Annotated[float, typer.Option(help="The same for test.")] = 0.0,
    resplit: Annotated[
        bool, typer.Option("--resplit", help="Deal whole slides anew, whatever the source says.")
    ] = False,
    slide_pattern: Annotated[
        str | None, typer.Option(help="Regular expression; its first group, in an image's name, is the slide.")
    ] = None,
    patient_pattern: Annotated[
        str | None, typer.Option(help="The same for the patient: patients are then never split.")
    ] = None,
    swap: Annotated[bool, typer.Option("--swap", help="pix2pix: the H&E is the right image.")] = False,
    channels: Annotated[
        str, typer.Option(help="hemit: what the label's red, green and blue channels are.")
    ] = "panck,cd3,dapi",
    mask_code: Annotated[
        MaskCodeName,
        typer.Option(help="Values of the source's masks: grey (255 is positive), ones, labels, or told from all."),
    ] = MaskCodeName.auto,
    jobs: Annotated[int, typer.Option("--jobs", "-j", help="Processes; 0 takes one per core.")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all but the images' pixels, write nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON on stdout.")] = False,
) -> None:
    """Import a public data set of paired images as paired tiles.

    Layouts: bci (HE/train, IHC/train, …), mist (TrainValAB/trainA, …), hemit (train/input, train/label, …),
    pix2pix (H&E and IHC side by side), deepliif (rows of six images), folder (he and one folder per stain, with
    equal names).

    Images are resampled to 0.5 µm per pixel and cut into tiles. Splits stay the source's and never share a slide.
    Masks that the source does not have are made from DAB optical density. An interrupted import goes on where it
    stopped.
    """
    import dataclasses
    import json

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from staindiffuser.training.prepare.importing import ImportRequest, import_tiles
    from staindiffuser.training.prepare.layouts import Asked
    from staindiffuser.training.tiles.mask_codes import MASK_CODES

    request = ImportRequest(
        layout=layout.value,
        source=source,
        output=output,
        asked=Asked(
            stains=tuple(name.lower() for name in stain or ()),
            slide_pattern=_pattern("--slide-pattern", slide_pattern),
            patient_pattern=_pattern("--patient-pattern", patient_pattern),
            swap=swap,
            channels=tuple(name.strip().lower() for name in channels.split(",")),
        ),
        mpp=mpp,
        tile=tile,
        val_share=val_share,
        test_share=test_share,
        resplit=resplit,
        mask_code=next((code for code in MASK_CODES if code == mask_code.value), None),
        jobs=jobs or os.cpu_count() or 1,
    )
    columns = (TextColumn("importing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=as_json or dry_run) as bar:
        task = bar.add_task("pairs", total=None)
        result = import_tiles(
            request, lambda done, total: bar.update(task, completed=done, total=total), dry_run=dry_run
        )
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(result) | {"dry_run": dry_run}))
        return
    done = "would be written" if dry_run else f"({result.written} new, {result.seconds:.1f} s)"
    typer.echo(f"{result.pairs} pairs of {', '.join(result.stains)}: {result.tiles} tiles in {result.output} {done}")
    for split, count in result.tiles_per_split.items():
        typer.echo(f"{split:>6}: {count} tiles of {result.slides[split]} slides")
    typer.echo(f"pixels: {result.source_mpp:g} → {result.mpp:g} µm")
    for note in result.notes:
        typer.echo(f"note: {note}")


def _pattern(option: str, text: str | None) -> re.Pattern[str] | None:
    if not text:
        return None
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise UsageError(f"{option} {text}: not a regular expression: {error}") from error
    if not pattern.groups:
        raise UsageError(f"{option} {text}: it needs a group in brackets, which is the {option[2:].split('-')[0]}")
    return pattern
