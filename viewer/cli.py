"""The command ``view``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["view"]


def view(
    results: Annotated[
        list[Path],
        typer.Argument(metavar="RESULT...", help="Folders that `stain` wrote, or folders that hold such folders."),
    ],
    slides: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH",
            help="Where the H&E slides lie now, file or folder; repeat it. (default: where "
            "they were stained, and beside the result)",
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
        say=lambda line: typer.echo(line, err=True),
    )
