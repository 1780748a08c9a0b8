"""``staindiffuser stain``: H&E slides and tiles to virtual stains."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["stain"]


def stain(
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="INPUT...", help="H&E slides (all that OpenSlide opens, OME-TIFF) or tiles (PNG, JPEG, TIFF)."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder for the result; several inputs get a folder each in it. (default: ./<slide>-stained)",
        ),
    ] = None,
    server: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="gRPC address of a server that is running.")
    ] = None,
    repository: Annotated[
        Path | None,
        typer.Option(
            metavar="REPO",
            help="Serve this model repository for as long as it takes. (default: the demonstration model)",
        ),
    ] = None,
    stains: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Which stains. (default: all the model has)")
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides the noise: the same seed gives the same pixels.")] = 0,
    mpp: Annotated[
        float | None, typer.Option(help="µm per pixel of the input, where the file does not say or is wrong.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Tiles in a request.")] = 4,
    in_flight: Annotated[int, typer.Option(help="Requests with the server at a time.")] = 3,
    timeout: Annotated[
        float, typer.Option(help="Seconds after which an unanswered request counts as a lost server.")
    ] = 300.0,
    cells: Annotated[bool, typer.Option("--cells/--no-cells", help="Make cell maps and cells.geojson.gz.")] = True,
    preview: Annotated[bool, typer.Option("--preview", help="Also draw preview.png.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a result that is there.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep complete results of the same slide, model and options.")
    ] = False,
    proxy: Annotated[bool, typer.Option("--proxy", help="Reach the server through http_proxy.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what run.json says on stdout, one line a slide.")
    ] = False,
) -> None:
    """Stain H&E slides or tiles virtually. Synthetic images, for research use only.

    Examples:

    staindiffuser stain slide.svs

    staindiffuser stain *.svs --output stained --stains ck818 --server 127.0.0.1:8001
    """
    from staindiffuser.client.command import Server, run_command
    from staindiffuser.client.options import StainingOptions
    from staindiffuser.errors import UsageError

    try:
        options = StainingOptions(
            stains=None
            if stains is None
            else tuple(name.strip().lower() for name in stains.split(",") if name.strip()),
            seed=seed,
            mpp=mpp,
            batch=batch,
            in_flight=in_flight,
            cells=cells,
            preview=preview,
            overwrite=overwrite,
            resume=resume,
        )
        target = Server(address=server, repository=repository, timeout=timeout, use_proxy=proxy)
    except ValueError as error:
        raise UsageError(str(error)) from error
    code = run_command(inputs, output, target, options, as_json=as_json)
    if code:
        raise typer.Exit(code)
