"""One slide, from the file to the result: open → find tissue → stain and write → publish."""

from __future__ import annotations

import json
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from staindiffuser.client.blending import Mosaic
from staindiffuser.client.contract import ServedStain, Stainer
from staindiffuser.client.errors import OutputError
from staindiffuser.client.options import StainingOptions
from staindiffuser.client.output import RUN_JSON, ResultFolder, read_run
from staindiffuser.client.pipeline import run_pipeline
from staindiffuser.client.preview import PANEL, write_preview
from staindiffuser.client.progress import QuietReporter, Reporter, Stopwatch
from staindiffuser.client.resample import ModelView
from staindiffuser.client.result import PREVIEW_FILE, ResultWriter, planes_of
from staindiffuser.client.run import FORMAT, SYNTHETIC, model_record, now, versions
from staindiffuser.client.tiling import GridTile, TileGrid
from staindiffuser.files import file_sha256
from staindiffuser.imaging.pixel_size import PixelSize
from staindiffuser.imaging.slides import Slide, open_slide
from staindiffuser.imaging.tissue import TissueMask, find_tissue, read_overview

__all__ = ["StainingOptions", "stain_slide"]

COARSE = 1.5
"""Input pixels larger than the model's by more than this deserve a warning."""


def stain_slide(
    path: Path,
    output: Path,
    stainer: Stainer,
    options: StainingOptions | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """ServedStain a slide or a tile into the folder ``output``.

    Args:
        path: the H&E slide or tile.
        output: a folder; made where it is missing.
        stainer: the server, usually a :class:`~staindiffuser.client.StainClient`.
        options: what and how; by default all stains with seed 0.
        reporter: hears of the progress.

    Returns:
        What ``run.json`` says.

    Raises:
        SlideError: the input is missing, damaged or unsupported.
        MissingPixelSizeError: it does not say how large its pixels are.
        UnknownStainError: the model does not have a stain.
        OutputError: the output cannot be written, or holds a result.
        ServerError: the server failed or was lost. In all cases nothing new stands under a final name.
    """
    options, reporter = options or StainingOptions(), reporter or QuietReporter()
    stains = stainer.contract.select(options.stains)
    with open_slide(path) as slide:
        mpp = slide.pixel_size(options.mpp)
        if options.resume and (done := _finished(path, output, stainer, options, stains)):
            reporter.say(f"{output} is complete already: kept")
            return done
        with ResultFolder(output, overwrite=options.overwrite or options.resume) as folder:
            try:
                return _stain(slide, mpp, stains, stainer, options, reporter, folder)
            except OSError as error:  # readers and the client raise their own: this is a full or vanished disk
                raise OutputError(f"the output {output} cannot be written: {error.strerror or error}") from error


def _stain(
    slide: Slide,
    mpp: PixelSize,
    stains: tuple[ServedStain, ...],
    stainer: Stainer,
    options: StainingOptions,
    reporter: Reporter,
    folder: ResultFolder,
) -> dict[str, Any]:
    started, watch, contract = now(), Stopwatch(), stainer.contract
    view = ModelView(slide, mpp, contract.mpp)
    grid = TileGrid.for_model(contract, *view.size)
    with ThreadPoolExecutor(1, thread_name_prefix="hash") as hasher:
        sha256 = hasher.submit(file_sha256, slide.path)
        with watch.stage("tissue"):
            overview = read_overview(slide, mpp)
            mask = find_tissue(overview, view.mpp)
            tiles = _tiles_with_tissue(grid, mask)
        warnings = _warnings(slide, mpp, view, tiles, contract.mpp)
        for line in [_announcement(slide, mpp, view, grid, tiles), *warnings]:
            reporter.say(line)
        mosaic = Mosaic(grid, planes_of(stains, cells=options.cells), mask)
        with ResultWriter(
            folder.staging, slide.path, view, contract, stains, seed=options.seed, cells=options.cells, watch=watch
        ) as writer:

            def write_row(row: int, workers: Executor) -> None:
                writer.write_row(row, mosaic, workers)

            reporter.start(slide.path.name, len(tiles))
            try:
                run_pipeline(view, grid, tiles, mosaic, stainer, stains, options, write_row, watch, reporter.advance)
            finally:
                reporter.stop()
            names = writer.finish()
            cell_counts = writer.cell_counts
        if options.preview:
            with watch.stage("preview"):
                overview = read_overview(slide, mpp, PANEL)
                write_preview(folder.staging, folder.staging / PREVIEW_FILE, view, overview.pixels, stains, contract)
            names.append(PREVIEW_FILE)
        record: dict[str, Any] = {
            "format": FORMAT,
            "notice": f"{SYNTHETIC} {contract.notice}",
            "input": {
                "path": str(slide.path.absolute()),
                "sha256": sha256.result(),
                "bytes": slide.path.stat().st_size,
                "format": slide.format,
                "size": list(slide.size),
                "mpp": list(mpp),
                "mpp_from": "--mpp" if options.mpp is not None else "file",
                "level_read": view.level,
            },
            "model": model_record(contract),
            "request": _request(stainer, options, stains),
        }
    record |= {
        "stains": [{"name": stain.name, "label": stain.label} for stain in stains],
        "seed": options.seed,
        "steps": contract.steps,
        "result": {"size": list(view.size), "mpp": list(view.mpp), "resampled": view.resampled},
        "tiles": {
            "total": grid.rows * grid.columns,
            "stained": len(tiles),
            "side": grid.tile,
            "stride": grid.stride,
            "margin": grid.margin,
            "batch": min(options.batch, contract.max_batch),
            "in_flight": options.in_flight,
        },
        "tissue_fraction": round(mask.fraction, 4),
        "cells": cell_counts,
        "warnings": warnings,
        "server": {"url": stainer.url, "version": stainer.server_version},
        "started": started,
        "seconds": {"total": round(watch.total, 3), "stages_summed_over_threads": watch.seconds()},
        "versions": versions(),
        "outputs": {name: (folder.staging / name).stat().st_size for name in names},
    }
    text = json.dumps(record, indent=1, ensure_ascii=False)
    (folder.staging / RUN_JSON).write_text(text + "\n", encoding="utf-8")
    folder.publish([*names, RUN_JSON])
    return record


def _tiles_with_tissue(grid: TileGrid, mask: TissueMask) -> list[GridTile]:
    tiles = []
    for row in range(grid.rows):
        for column in range(grid.columns):
            tile = grid.at(row, column)
            (x0, x1), (y0, y1) = grid.shown(tile.x, grid.width), grid.shown(tile.y, grid.height)
            if x0 < x1 and y0 < y1 and mask.touches(x0, y0, x1 - x0, y1 - y0):
                tiles.append(tile)
    return tiles


def _finished(
    path: Path, output: Path, stainer: Stainer, options: StainingOptions, stains: tuple[ServedStain, ...]
) -> dict[str, Any] | None:
    """The run of a complete result of the same input and options."""
    run = read_run(output)
    if run is None or run.get("request") != _request(stainer, options, stains):
        return None
    if not all((output / name).is_file() for name in run.get("outputs", {})):
        return None
    return run if run.get("input", {}).get("sha256") == file_sha256(path) else None


def _request(stainer: Stainer, options: StainingOptions, stains: tuple[ServedStain, ...]) -> dict[str, Any]:
    """Everything that decides the result, beside the input's bytes."""
    return {
        "model_version": stainer.contract.model_version,
        "stains": [stain.name for stain in stains],
        "seed": options.seed,
        "mpp": options.mpp,
        "cells": options.cells,
        "preview": options.preview,
    }


def _announcement(slide: Slide, mpp: PixelSize, view: ModelView, grid: TileGrid, tiles: list[GridTile]) -> str:
    resampled = f", resampled to {view.size[0]} × {view.size[1]} at {view.mpp[0]:.3f}" if view.resampled else ""
    return (
        f"{slide.path}: {slide.format}, {slide.size[0]} × {slide.size[1]} pixels of {mpp[0]:.3f} µm{resampled}; "
        f"{len(tiles)} of {grid.rows * grid.columns} tiles show tissue"
    )


def _warnings(slide: Slide, mpp: PixelSize, view: ModelView, tiles: list[GridTile], model_mpp: float) -> list[str]:
    found = []
    if max(mpp) > COARSE * model_mpp:
        found.append(
            f"warning: {slide.path.name} has pixels of {max(mpp):.2f} µm, the model was made for {model_mpp:g} µm: "
            "details it needs are not there"
        )
    if not tiles:
        found.append(f"warning: no tissue was found on {slide.path.name}: the result is empty")
    return found
