"""The options of ``staindiffuser stain``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["check", "info", "send", "stain"]


def stain(
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="INPUT...",
            help="H&E slides (all that OpenSlide reads, DICOM, OME-TIFF, OME-Zarr), tiles (PNG, JPEG, TIFF), folders "
            "of them, or lists (.csv with the columns slide, mpp, output).",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Result folder; with several inputs, the parent of one folder each. (default: ./<slide>-stained)",
        ),
    ] = None,
    server: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST:PORT", help="gRPC address of a running server; repeat it to use several."),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Model to use, where a server offers several, or NAME@VERSION. (default: the only or current one)",
        ),
    ] = "",
    repository: Annotated[
        Path | None,
        typer.Option(
            metavar="REPO",
            help="Model repository to serve meanwhile, or a shipped model's name. (default: demo)",
        ),
    ] = None,
    fast: Annotated[
        bool | None,
        typer.Option(
            "--fast/--exact",
            help="A model that ships: the fastest engines of this CPU, measured once (default), or float32, whose "
            "pixels are the same on every machine, give or take one grey level.",
            show_default=False,
        ),
    ] = None,
    stains: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Stains to produce. (default: all that the model has)")
    ] = None,
    threshold: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Probability from which the cell map of a stain shows a cell, such as cd3=0.4; repeat it for several. "
            "(default: what the model says, else 0.5)",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise: the same seed gives the same pixels.")] = 0,
    mpp: Annotated[float | None, typer.Option(help="Pixel size in µm of inputs that do not state their own.")] = None,
    force_mpp: Annotated[
        bool, typer.Option("--force-mpp", help="Use --mpp even if the input states another pixel size.")
    ] = False,
    batch: Annotated[
        int | None, typer.Option(help="Tiles per request. (default: what suits the server, 1 on a CPU, 4 on a GPU)")
    ] = None,
    in_flight: Annotated[int, typer.Option(help="Concurrent requests per server.")] = 3,
    timeout: Annotated[
        float, typer.Option(help="Seconds to wait for an answer before the server counts as lost.")
    ] = 300.0,
    patience: Annotated[
        float, typer.Option(help="Seconds to wait for a lost server to come back with the same model.")
    ] = 30.0,
    urgent: Annotated[
        bool, typer.Option("--urgent", help="Go before all other work that waits in the server's queue.")
    ] = False,
    cells: Annotated[
        bool, typer.Option("--cells/--no-cells", help="Write cell maps, cells.geojson.gz, scores.csv.")
    ] = True,
    parquet: Annotated[
        bool, typer.Option("--parquet", help="Also write the cells as GeoParquet, cells.parquet (needs pyarrow).")
    ] = False,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            metavar="ome-zarr|dicom|spatialdata",
            help="Also write the images as OME-Zarr or DICOM, or images, cells and scores as SpatialData (needs "
            "pyarrow); repeat it for several.",
        ),
    ] = None,
    cells_from: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Score these cells (GeoJSON or GeoParquet, level-0 pixels) instead of nuclei: own-cells.csv.",
        ),
    ] = None,
    combined: Annotated[
        bool,
        typer.Option("--combined", help="Also write all stains as channels of one image, combined.ome.tiff."),
    ] = False,
    nuclei: Annotated[
        bool,
        typer.Option("--nuclei/--no-nuclei", help="Count the H&E's nuclei too: scores.csv then has the share stained."),
    ] = True,
    allow_damaged: Annotated[
        bool,
        typer.Option("--allow-damaged", help="Leave out damaged tiles instead of refusing the slide."),
    ] = False,
    mask: Annotated[
        str,
        typer.Option(
            metavar="auto|none|FILE.geojson",
            help="Stain the tissue that is found, everything, or polygons (QuPath's export, level-0 pixels).",
        ),
    ] = "auto",
    icc: Annotated[
        str,
        typer.Option(
            metavar="ignore|srgb",
            help="Take colours as the scanner wrote them, or convert them to sRGB by the slide's ICC profile.",
        ),
    ] = "ignore",
    save_mask: Annotated[bool, typer.Option("--save-mask", help="Also write tissue.png: what was found.")] = False,
    preview: Annotated[bool, typer.Option("--preview", help="Also write preview.png.")] = False,
    keep_names: Annotated[
        bool,
        typer.Option(
            "--keep-names",
            help="Write slides' names and paths into results and logs, and a DICOM slide's patient, study and specimen "
            "into DICOM; by default only a hash of their content.",
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing result.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep complete results of the same slide, model and options.")
    ] = False,
    proxy: Annotated[bool, typer.Option("--proxy", help="Reach the server through http_proxy.")] = False,
    tls_ca: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Use TLS; PEM file of the authority behind the server.")
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(metavar="FILE", help="PEM file of this client's certificate.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="PEM file of its key.")] = None,
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File that holds the token for the server.")
    ] = None,
    ray: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS", help="Spread the slides over the machines of this Ray cluster (HOST:PORT, or auto)."
        ),
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Do everything up to the first request, and estimate disk and memory.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one line per slide on stdout: its run.json, or its error.")
    ] = False,
) -> None:
    """Stain H&E slides or tiles virtually. The images are synthetic, for research use only.

    Examples:

    staindiffuser stain slide.svs

    staindiffuser stain *.svs --output stained --stains ck818 --server 127.0.0.1:8001

    staindiffuser stain slide.svs --mask tumour.geojson --save-mask
    """
    import shlex
    import sys

    from staindiffuser.client.command import run_command
    from staindiffuser.client.credentials import Credentials
    from staindiffuser.client.options import StainingOptions
    from staindiffuser.client.target import Target
    from staindiffuser.errors import UsageError

    names = None if stains is None else tuple(name.strip().lower() for name in stains.split(",") if name.strip())
    try:
        options = StainingOptions(
            stains=names,
            thresholds=_thresholds(threshold or ()),
            seed=seed,
            mpp=mpp,
            force_mpp=force_mpp,
            batch=batch,
            in_flight=in_flight,
            cells=cells,
            nuclei=nuclei,
            parquet=parquet,
            combined=combined,
            formats=tuple(formats or ()),
            cells_from=cells_from,
            allow_damaged=allow_damaged,
            mask=mask,
            save_mask=save_mask,
            icc=icc,
            preview=preview,
            keep_names=keep_names,
            overwrite=overwrite,
            resume=resume,
        )
        credentials = Credentials(authority=tls_ca, certificate=tls_cert, key=tls_key, token_file=token_file)
        target = Target(
            addresses=tuple(server or ()),
            repository=repository,
            fast=fast,
            timeout=timeout,
            patience=patience,
            urgent=urgent,
            model=model,
            use_proxy=proxy,
            credentials=credentials,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    command = shlex.join(["staindiffuser", *sys.argv[1:]])
    code = run_command(inputs, output, target, options, as_json=as_json, dry_run=dry_run, command=command, cluster=ray)
    if code:
        raise typer.Exit(code)


def _thresholds(given: Iterable[str]) -> dict[str, float]:
    """``cd3=0.4`` and the like; raises ValueError."""
    found = {}
    for text in given:
        name, _, value = text.partition("=")
        try:
            found[name.strip().lower()] = float(value)
        except ValueError:
            raise ValueError(f"--threshold {text}: give a stain and a probability, such as cd3=0.4") from None
    return found


def info(
    slide: Annotated[Path, typer.Argument(help="A slide or tile.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Show a slide's id (in results and logs), format, size, levels, pixel size and files, and what is odd about it.

    Example: staindiffuser info slide.svs
    """
    from staindiffuser.client.inspection import slide_info

    found = slide_info(slide)
    if as_json:
        import json

        typer.echo(json.dumps(found, ensure_ascii=False))
        return
    for name, value in found.items():
        text = "\n          ".join(map(str, value)) if isinstance(value, list) else value
        typer.echo(f"{name:9} {'unknown' if text is None else text or '–'}")


def check(
    slides: Annotated[list[Path], typer.Argument(metavar="SLIDE...", help="Slides, tiles, folders or lists.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per slide instead of text.")] = False,
) -> None:
    """Read every tile of every level, and say whether the slide can be stained.

    Exit code: 0 if all can, 1 if some cannot, 4 if none can. Example: staindiffuser check scans/
    """
    import json

    from staindiffuser.client.inputs import find_inputs
    from staindiffuser.client.inspection import check_slide
    from staindiffuser.errors import EXIT_SOME_FAILED, InputError

    errors: list[InputError] = []
    found = find_inputs(slides, None)
    for slide in found:
        line: dict[str, object] = {"slide": str(slide.path), "ok": True}
        try:
            text = check_slide(slide.path, slide.mpp)
        except InputError as error:
            errors.append(error)
            text, line = f"error: {error}", {**line, "ok": False, "error": str(error), "exit_code": error.exit_code}
            if len(errors) == len(found) and not as_json:
                raise
        typer.echo(json.dumps(line, ensure_ascii=False) if as_json else text)
    if errors:
        raise typer.Exit(errors[-1].exit_code if len(errors) == len(found) else EXIT_SOME_FAILED)


def send(
    results: Annotated[list[Path], typer.Argument(metavar="RESULT...", help="Result folders with DICOM.")],
    to: Annotated[
        str, typer.Option("--to", metavar="URL", help="DICOMweb service, such as https://archive/dicom-web.")
    ],
    tls_ca: Annotated[
        Path | None, typer.Option(metavar="FILE", help="PEM file of the authority behind the archive.")
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(metavar="FILE", help="PEM file of this client's certificate.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="PEM file of its key.")] = None,
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File that holds the token for the archive.")
    ] = None,
) -> None:
    """Store the DICOM of results (`stain --format dicom`) in an archive, by DICOMweb.

    Example: staindiffuser send slide-stained --to http://localhost:8042/dicom-web
    """
    from staindiffuser.client.credentials import Credentials
    from staindiffuser.client.sending import find_instances, send_instances
    from staindiffuser.errors import UsageError

    try:
        credentials = Credentials(authority=tls_ca, certificate=tls_cert, key=tls_key, token_file=token_file)
    except ValueError as error:
        raise UsageError(str(error)) from error
    send_instances(find_instances(results), to, credentials, lambda line: typer.echo(line, err=True))
