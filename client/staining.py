"""Stains one slide: open it, find the tissue, stain and write row by row, publish the result."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from staindiffuser.client import run_record
from staindiffuser.client.blending import Mosaic
from staindiffuser.client.contract import ServedStain, Stainer
from staindiffuser.client.errors import OutputError
from staindiffuser.client.model_view import ModelView
from staindiffuser.client.options import StainingOptions
from staindiffuser.client.pipeline import stained_rows
from staindiffuser.client.preview import PANEL, write_preview
from staindiffuser.client.progress import QuietReporter, Reporter, Stopwatch
from staindiffuser.client.result_files import PREVIEW_FILE, ResultFiles, output_images
from staindiffuser.client.result_folder import ResultFolder
from staindiffuser.client.run_record import RUN_JSON, Request, RunRecord
from staindiffuser.client.tiling import GridTile, TileGrid
from staindiffuser.files import file_sha256
from staindiffuser.imaging.slides import Slide, open_slide
from staindiffuser.imaging.tissue import TissueMask, find_tissue, read_overview

__all__ = ["SlideJob", "stain_slide"]

COARSE = 1.5
"""A pixel size above the model's by this factor causes a warning."""


def stain_slide(
    path: Path,
    output: Path,
    stainer: Stainer,
    options: StainingOptions | None = None,
    reporter: Reporter | None = None,
) -> RunRecord:
    """Stain a slide or a tile and write the result to the folder ``output``.

    Args:
        path: the H&E slide or tile.
        output: the result folder; created if missing.
        stainer: the server, usually a :class:`~staindiffuser.client.StainClient`.
        options: by default, all stains with seed 0.
        reporter: receives messages and progress.

    Returns:
        The contents of ``run.json``.

    Raises:
        SlideError: the input is missing, damaged or unsupported.
        MissingPixelSizeError: the input does not state its pixel size.
        UnknownStainError: the model does not have a requested stain.
        OutputError: the output cannot be written, or already holds a result.
        ServerError: the server failed or was lost. After any of these errors no new file has a final name.
    """
    with SlideJob(path, output, options or StainingOptions()) as job:
        return job.stain(stainer, reporter or QuietReporter())


class SlideJob:
    """One slide and its result folder, both open; use it as a context manager.

    Entering it finds out whether the input and the output are usable, before a server is needed.
    """

    def __init__(self, path: Path, output: Path, options: StainingOptions) -> None:
        """Describe the job; arguments and errors are those of :func:`stain_slide`."""
        self._path, self._output, self._options = path, output, options
        self._open = ExitStack()
        self._folder: ResultFolder | None = None
        """None if a result that may be kept is there."""

    def __enter__(self) -> Self:
        try:
            self._slide = self._open.enter_context(open_slide(self._path))
            self._mpp = self._slide.pixel_size(self._options.mpp)
            self._old = run_record.find_run(self._output) if self._options.resume else None
            if self._old is None:
                self._folder = self._enter_folder()
        except BaseException:
            self._open.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._open.close()

    def stain(self, stainer: Stainer, reporter: Reporter) -> RunRecord:
        """Stain the slide and publish the result, or keep the one that is there; see :func:`stain_slide`."""
        stains = stainer.contract.select(self._options.stains)
        request = Request(
            model_version=stainer.contract.model_version,
            stains=tuple(stain.name for stain in stains),
            seed=self._options.seed,
            mpp=self._options.mpp,
            cells=self._options.cells,
            preview=self._options.preview,
        )
        if self._old is not None and self._is_complete(self._old, request):
            reporter.say(f"{self._output} is already complete: kept")
            return self._old
        folder = self._folder or self._enter_folder()
        try:
            with ThreadPoolExecutor(1, thread_name_prefix="hash") as hasher:
                sha256 = hasher.submit(file_sha256, self._path)
                record = _stain(
                    self._slide, self._mpp, sha256, request, stains, stainer, self._options, reporter, folder
                )
            run_record.write_run(folder.staging, record)
            folder.publish([*record.outputs, RUN_JSON])
        except OSError as error:  # readers and the client raise their own: this is a full or vanished disk
            raise OutputError(f"the output {self._output} cannot be written: {error.strerror or error}") from error
        return record

    def _enter_folder(self) -> ResultFolder:
        overwrite = self._options.overwrite or self._options.resume
        return self._open.enter_context(ResultFolder(self._output, overwrite=overwrite))

    def _is_complete(self, run: RunRecord, request: Request) -> bool:
        return (
            run.request == request
            and all((self._output / name).is_file() for name in run.outputs)
            and run.input.sha256 == file_sha256(self._path)
        )


def _stain(
    slide: Slide,
    mpp: tuple[float, float],
    sha256: Future[str],
    request: Request,
    stains: tuple[ServedStain, ...],
    stainer: Stainer,
    options: StainingOptions,
    reporter: Reporter,
    folder: ResultFolder,
) -> RunRecord:
    """Write every file of the result but ``run.json`` to the staging folder."""
    started, watch, contract = run_record.utc_now(), Stopwatch(), stainer.contract
    view = ModelView(slide, mpp, contract.mpp)
    grid = TileGrid.for_model(contract, *view.size)
    with watch.stage("tissue"):
        mask = find_tissue(read_overview(slide, mpp), view.mpp)
        tiles = _tiles_with_tissue(grid, mask)
    warnings = _warnings(slide, mpp, tiles, contract.mpp)
    for line in [_announcement(slide, mpp, view, grid, tiles), *warnings]:
        reporter.say(line)
    mosaic = Mosaic(grid, output_images(stains, cells=options.cells), mask)
    with ResultFiles(
        folder.staging, slide.path, view, contract, stains, seed=options.seed, cells=options.cells, watch=watch
    ) as files:
        reporter.start(slide.path.name, len(tiles))
        try:
            with stained_rows(view, grid, tiles, mosaic, stainer, stains, options, watch, reporter.advance) as rows:
                for row in rows:
                    files.write_row(row, mosaic)
        finally:
            reporter.stop()
        names = files.finish()
        cell_counts = files.cell_counts
    if options.preview:
        with watch.stage("preview"):
            overview = read_overview(slide, mpp, PANEL)
            write_preview(folder.staging, folder.staging / PREVIEW_FILE, view, overview.pixels, stains, contract)
        names.append(PREVIEW_FILE)
    return RunRecord(
        format=run_record.FORMAT,
        notice=f"{run_record.SYNTHETIC} {contract.notice}",
        input=run_record.InputRecord(
            path=str(slide.path.absolute()),
            sha256=sha256.result(),
            bytes=slide.path.stat().st_size,
            format=slide.format,
            size=slide.size,
            mpp=mpp,
            mpp_from="--mpp" if options.mpp is not None else "file",
            level_read=view.level,
        ),
        model=run_record.model_record(contract),
        request=request,
        stains=stains,
        seed=options.seed,
        steps=contract.steps,
        result=run_record.ResultRecord(size=view.size, mpp=view.mpp, resampled=view.resampled),
        tiles=run_record.TilesRecord(
            total=grid.rows * grid.columns,
            stained=len(tiles),
            side=grid.tile,
            stride=grid.stride,
            margin=grid.margin,
            batch=min(options.batch, contract.max_batch),
            in_flight=options.in_flight,
        ),
        tissue_fraction=round(mask.fraction, 4),
        cells=cell_counts,
        warnings=tuple(warnings),
        server=run_record.ServerRecord(url=stainer.url, version=stainer.server_version),
        started=started,
        seconds=run_record.Seconds(total=round(watch.total, 3), stages_summed_over_threads=watch.seconds()),
        versions=run_record.library_versions(),
        outputs={name: (folder.staging / name).stat().st_size for name in names},
    )


def _tiles_with_tissue(grid: TileGrid, mask: TissueMask) -> list[GridTile]:
    """The tiles of which any part shows in the result, in the grid's order."""
    tiles = []
    for row in range(grid.rows):
        for column in range(grid.columns):
            tile = grid.at(row, column)
            (x0, x1), (y0, y1) = grid.shown(tile.x, grid.width), grid.shown(tile.y, grid.height)
            if x0 < x1 and y0 < y1 and mask.touches(x0, y0, x1 - x0, y1 - y0):
                tiles.append(tile)
    return tiles


def _announcement(
    slide: Slide, mpp: tuple[float, float], view: ModelView, grid: TileGrid, tiles: list[GridTile]
) -> str:
    resampled = f", resampled to {view.size[0]} × {view.size[1]} at {view.mpp[0]:.3f}" if view.resampled else ""
    return (
        f"{slide.path}: {slide.format}, {slide.size[0]} × {slide.size[1]} pixels of {mpp[0]:.3f} µm{resampled}; "
        f"{len(tiles)} of {grid.rows * grid.columns} tiles show tissue"
    )


def _warnings(slide: Slide, mpp: tuple[float, float], tiles: list[GridTile], model_mpp: float) -> list[str]:
    found = []
    if max(mpp) > COARSE * model_mpp:
        found.append(
            f"warning: {slide.path.name} has pixels of {max(mpp):.2f} µm, but the model was trained at "
            f"{model_mpp:g} µm and will lack details that it needs"
        )
    if not tiles:
        found.append(f"warning: no tissue found on {slide.path.name}: the result is empty")
    return found
