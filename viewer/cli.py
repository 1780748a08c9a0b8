"""The commands ``view``, ``report`` and ``qupath``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["qupath", "report", "view"]

Results = Annotated[
    list[Path],
    typer.Argument(metavar="RESULT...", help="Folders that `stain` wrote, or folders that hold such folders."),
]
Slides = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="PATH",
        help="Where the H&E slides lie now, file or folder; repeat it. (default: where they were stained, and beside "
        "the result)",
    ),
]


def view(
    results: Results,
    slides: Slides = None,
    truth: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[STAIN=]FILE", help="A real stain that is registered to the H&E, to compare with; repeat it."
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but loopback needs the token that is printed.")
    ] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="0 for a free one. (default: 8127, or a free one)")] = None,
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File that holds the token, instead of a random one.")
    ] = None,
) -> None:
    """Look at results in a browser: H&E beside every stain, cells, scores of regions. Ctrl-C ends.

    Nothing is converted or uploaded. The images are synthetic, for research use only.

    Examples:

    staindiffuser view slide-stained

    staindiffuser view stained/ --slides /scans

    staindiffuser view slide-stained --truth cd3=cd3-registered.ome.tiff
    """
    from staindiffuser.viewer.errors import ViewerUsageError
    from staindiffuser.viewer.server import view_results

    token = None
    if token_file is not None:
        try:
            token = token_file.read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise ViewerUsageError(f"--token-file {token_file} cannot be read: {error}") from error
        if len(token) < 16:
            raise ViewerUsageError(f"--token-file {token_file}: a token needs at least 16 characters")
    view_results(
        results,
        slides=tuple(slides or ()),
        host=host,
        port=port,
        token=token,
        truth=tuple(truth or ()),
        say=lambda line: typer.echo(line, err=True),
    )


def report(results: Results, slides: Slides = None) -> None:
    """Write report.html into each result, on two printed pages; and one of the batch into a folder of results.

    Example: staindiffuser report stained/
    """
    from staindiffuser.client.run_record import RUN_JSON
    from staindiffuser.viewer.report import write_reports
    from staindiffuser.viewer.results import find_results

    for place in results:
        batch = None if (place / RUN_JSON).is_file() else place
        for path in write_reports(find_results([place]), tuple(slides or ()), batch):
            typer.echo(path)


def qupath(results: Results, slides: Slides = None) -> None:
    """Write a script into each result that opens it in QuPath: images with names and types, cells with classes.

    Example: staindiffuser qupath slide-stained
    """
    from staindiffuser.client.run_record import read_run
    from staindiffuser.errors import InputError
    from staindiffuser.viewer.qupath import write_qupath_script
    from staindiffuser.viewer.results import find_results, source_slide

    for entry in find_results(results):
        if entry.error is not None:
            typer.echo(f"{entry.title} is left out: {entry.error}", err=True)
            continue
        run = read_run(entry.folder)
        slide = None
        try:
            slide = source_slide(run, entry.folder, tuple(slides or ()))
        except (InputError, OSError) as error:
            typer.echo(f"without its H&E: {error} (--slides)", err=True)
        typer.echo(write_qupath_script(entry.folder, run, slide))
