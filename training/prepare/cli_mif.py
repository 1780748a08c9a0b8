"""``staindiffuser prepare mif``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["EPILOG", "mif"]

EPILOG = (
    "Examples:\n\n"
    "`staindiffuser prepare mif --he he --mif mif --channels DAPI,CD3,CD20,PanCK --nuclei DAPI "
    "--markers cd3=CD3,cd20=CD20,ck818=PanCK --he-mpp 0.25 --region-pattern '^(.+)_[0-9]+$' --output tiles`\n\n"
    "`staindiffuser prepare mif --he case1.svs --mif case1.ome.tiff --markers cd3=CD3e --nuclei DNA1 -o tiles`"
)


def mif(
    he: Annotated[Path, typer.Option(help="Folder of H&E tiles, or an H&E slide.", show_default=False)],
    mif: Annotated[
        Path,
        typer.Option(
            help="Folder of fluorescence tiles (PNG, TIFF; the H&E's names), or a multi-channel OME-TIFF "
            "registered to the slide.",
            show_default=False,
        ),
    ],
    markers: Annotated[
        str, typer.Option(help="STAIN=CHANNEL,…: which channel shows which stain's marker.", show_default=False)
    ],
    nuclei: Annotated[str, typer.Option(help="The channel of the nuclei.", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of paired tiles; slides are added to it.", show_default=False)
    ],
    cytoplasmic: Annotated[
        str | None,
        typer.Option(
            help="STAIN,…: whose marker is of the cytoplasm, so that cells are judged by what surrounds their nucleus; "
            "'' for none. If not given, the keratins: ck7, ck20, ck56, ck818 and panck.",
            show_default=False,
        ),
    ] = None,
    channels: Annotated[
        str, typer.Option(help="Names of the channels, in order; needed where the files do not name them.")
    ] = "",
    he_mpp: Annotated[float | None, typer.Option(help="Pixel size of the H&E, µm, if its file does not say.")] = None,
    mif_mpp: Annotated[float | None, typer.Option(help="The same for the fluorescence slide.")] = None,
    mpp: Annotated[float, typer.Option(help="Pixel size of the tiles, µm: the model's.")] = 0.5,
    tile: Annotated[int, typer.Option(help="Side of a slide's tiles, pixels; a multiple of 16.")] = 256,
    slide: Annotated[str | None, typer.Option(help="Name of the slide; the H&E's file name if not given.")] = None,
    region_pattern: Annotated[
        str | None, typer.Option(help="Regular expression; its first group, in a tile's name, is its region.")
    ] = None,
    gains: Annotated[
        Path | None,
        typer.Option(help="CSV with name and gain_CHANNEL: a stretch of each tile's channels, to be undone."),
    ] = None,
    splits: Annotated[
        Path | None, typer.Option(help="CSV with region and split; dealt by the region's name if not given.")
    ] = None,
    val_share: Annotated[float, typer.Option(help="Share of regions dealt to val.")] = 0.1,
    test_share: Annotated[float, typer.Option(help="Share of regions dealt to test.")] = 0.1,
    floor_removed: Annotated[
        float, typer.Option(help="Lowest threshold where the background was removed at the source.")
    ] = 12.0,
    floor_kept: Annotated[float, typer.Option(help="Lowest threshold where it was not.")] = 28.0,
    least_correlation: Annotated[
        float, typer.Option(help="Of hematoxylin and nuclei; tiles below it are dropped.")
    ] = 0.8,
    jobs: Annotated[int, typer.Option("--jobs", "-j", help="Threads; 0 takes one per core, at most 4.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON on stdout.")] = False,
) -> None:
    """Make paired tiles from H&E and multiplex fluorescence of the same section.

    Thresholds are chosen per region and written to OUTPUT/mif. Each marker is drawn as DAB on the H&E's own
    hematoxylin, and each tile gets a mask of its positive cells. Tiles whose nuclei do not lie on the H&E's are dropped
    and counted. An interrupted run continues where it stopped.
    """
    import dataclasses
    import json
    import re

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from staindiffuser.errors import UsageError
    from staindiffuser.training.prepare.mif.markers import Floor
    from staindiffuser.training.prepare.mif.request import MifRequest
    from staindiffuser.training.prepare.mif.run import prepare_mif

    chosen: dict[str, str] = {}
    for value in markers.split(","):
        stain, separator, channel = (part.strip() for part in value.partition("="))
        if not separator or not channel or stain in chosen:
            raise UsageError(f"--markers {markers}: give STAIN=CHANNEL, each stain once, such as cd3=CD3,ck818=PanCK")
        chosen[stain] = channel
    try:
        pattern = re.compile(region_pattern) if region_pattern else None
    except re.error as error:
        raise UsageError(f"--region-pattern {region_pattern}: not a regular expression: {error}") from error
    if pattern is not None and not pattern.groups:
        raise UsageError(f"--region-pattern {region_pattern}: it needs a group in brackets, which is the region")
    request = MifRequest(
        he=he,
        mif=mif,
        output=output,
        markers=chosen,
        nuclei=nuclei,
        cytoplasmic=None if cytoplasmic is None else _names(cytoplasmic),
        channels=_names(channels),
        he_mpp=he_mpp,
        mif_mpp=mif_mpp,
        mpp=mpp,
        tile=tile,
        slide=slide,
        region_pattern=pattern,
        gains=gains,
        splits=splits,
        val_share=val_share,
        test_share=test_share,
        floor=Floor(removed=floor_removed, kept=floor_kept),
        least_correlation=least_correlation,
        jobs=jobs or min(4, os.cpu_count() or 1),
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=as_json) as bar:
        task = bar.add_task("reading", total=None)
        result = prepare_mif(
            request, lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
        )
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(result)))
        return
    typer.echo(
        f"{result.kept} of {result.fields} tiles kept ({result.misaligned} misaligned, {result.empty} without nuclei, "
        f"{result.untold} of faint markers alone), "
        f"{result.written} new, {result.seconds:.1f} s, in {result.output}"
    )
    typer.echo(
        f"median correlation of hematoxylin and {nuclei}: {result.correlation:.2f}; {result.moved} tiles moved to fit"
    )
    for split, count in result.tiles_per_split.items():
        names = [name for name, rules in result.regions.items() if rules.split == split]
        typer.echo(f"{split:>6}: {count} tiles of {len(names)} regions")
    for stain in result.stains:
        weak = [name for name, rules in result.regions.items() if rules.markers[stain].weak]
        if weak:
            typer.echo(f"note: {stain} is absent or weak in {len(weak)} of {len(result.regions)} regions: {weak[0]}, …")
        faint = [name for name, rules in result.regions.items() if stain in rules.left_out]
        if faint:
            typer.echo(
                f"note: {stain} is faint, and left out, in {len(faint)} training regions, where much of it was removed "
                f"with the background: {', '.join(faint)}"
            )


def _names(listed: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in listed.split(",") if name.strip())
