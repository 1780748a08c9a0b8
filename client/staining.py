"""Stains one slide: open it, find the tissue, stain and write row by row, publish the result."""

from __future__ import annotations

import math
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from staindiffuser.client import run_record
from staindiffuser.client.blending import Mosaic, Rectangle
from staindiffuser.client.contract import ServedStain, Stainer
from staindiffuser.client.errors import FileNameError, OutputError
from staindiffuser.client.model_view import ModelView
from staindiffuser.client.options import StainingOptions
from staindiffuser.client.pipeline import stained_rows
from staindiffuser.client.preview import PANEL, write_preview
from staindiffuser.client.progress import QuietReporter, Reporter, Stopwatch
from staindiffuser.client.result_files import PREVIEW_FILE, ResultFiles, output_images
from staindiffuser.client.result_folder import ResultFolder
from staindiffuser.client.run_record import RUN_JSON, Request, RunRecord, slide_sha256
from staindiffuser.client.tiling import GridTile, TileGrid
from staindiffuser.imaging.errors import PixelSizeError
from staindiffuser.imaging.pixel_size import SAME_PIXEL_SIZE
from staindiffuser.imaging.slides import Slide, open_slide
from staindiffuser.imaging.tissue import TissueMask, find_tissue, read_overview

__all__ = ["SlideJob", "stain_slide"]

COARSE, UPSAMPLING = 1.5, 2.0
"""Input pixels larger than the model's by the first factor cause a warning, by the second a refusal."""


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
        PixelSizeError: ``mpp`` contradicts the input's own pixel size, or the pixels are too large for the model.
        FileNameError: a name is not UTF-8.
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
            _require_utf8(self._path, self._output)
            self._slide = self._open.enter_context(open_slide(self._path, allow_damaged=self._options.allow_damaged))
            force = None if self._options.force_mpp else "--force-mpp"
            self._mpp = self._slide.pixel_size(self._options.mpp, force=force)
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
            allow_damaged=self._options.allow_damaged,
            preview=self._options.preview,
        )
        if self._old is not None and self._is_complete(self._old, request):
            reporter.say(f"{self._output} is already complete: kept")
            return self._old
        folder = self._folder or self._enter_folder()
        try:
            with ThreadPoolExecutor(1, thread_name_prefix="hash") as hasher:
                sha256 = hasher.submit(slide_sha256, self._slide.files)
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
            and run.input.sha256 == slide_sha256(self._slide.files)
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
    _require_fine_pixels(slide, mpp, contract.mpp)
    view = ModelView(slide, mpp, contract.mpp)
    grid = TileGrid.for_model(contract, *view.size)
    with watch.stage("tissue"):
        mask = find_tissue(read_overview(slide, mpp), view.mpp)
        tiles = _tiles_with_tissue(grid, mask)
    warnings = _warnings(slide, mpp, tiles, contract.mpp)
    for line in [_announcement(slide, mpp, view, grid, tiles), *warnings]:
        reporter.say(line)
    mosaic = Mosaic(grid, output_images(stains, cells=options.cells), mask, lambda: _left_out(slide, view))
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
            bytes=sum(path.stat().st_size for path in slide.files),
            format=slide.format,
            size=slide.size,
            mpp=mpp,
            mpp_from=_mpp_source(slide, options),
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
        damaged=slide.damaged,
        tissue_fraction=round(mask.fraction, 4),
        cells=cell_counts,
        warnings=tuple(warnings),
        server=run_record.ServerRecord(url=stainer.url, version=stainer.server_version, id=stainer.server_id),
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


def _require_utf8(*paths: Path) -> None:
    """Refuse names that JSON and OME-XML cannot hold."""
    for path in paths:
        try:
            str(path).encode("utf-8")
        except UnicodeEncodeError:
            raise FileNameError(f"the name {str(path)!a} is not valid UTF-8: rename the file or folder") from None


def _require_fine_pixels(slide: Slide, mpp: tuple[float, float], model_mpp: float) -> None:
    """Refuse an input that would be upsampled so much that the model cannot see nuclei in it."""
    if max(mpp) > UPSAMPLING * model_mpp * (1 + SAME_PIXEL_SIZE):
        raise PixelSizeError(
            f"{slide.path} has pixels of {max(mpp):.4g} µm, but the model needs {model_mpp:g} µm and at most "
            f"{UPSAMPLING:g} times that: scan at a higher magnification, or correct the pixel size with --mpp"
        )


def _mpp_source(slide: Slide, options: StainingOptions) -> str:
    if options.force_mpp:
        return "--force-mpp"
    return "file" if slide.mpp is not None else "--mpp"


def _left_out(slide: Slide, view: ModelView) -> list[Rectangle]:
    """The damaged regions in pixels of the result, rounded outwards."""
    rectangles = []
    for region in slide.damaged:
        width, height = slide.level_sizes[region.level]
        x, y = view.size[0] / width, view.size[1] / height
        right, bottom = region.x + region.width, region.y + region.height
        rectangles.append(
            (math.floor(region.x * x), math.floor(region.y * y), math.ceil(right * x), math.ceil(bottom * y))
        )
    return rectangles


def _announcement(
    slide: Slide, mpp: tuple[float, float], view: ModelView, grid: TileGrid, tiles: list[GridTile]
) -> str:
    resampled = f", resampled to {view.size[0]} × {view.size[1]} at {view.mpp[0]:.3f}" if view.resampled else ""
    return (
        f"{slide.path}: {slide.format}, {slide.size[0]} × {slide.size[1]} pixels of {mpp[0]:.3f} µm{resampled}; "
        f"{len(tiles)} of {grid.rows * grid.columns} tiles show tissue"
    )


def _warnings(slide: Slide, mpp: tuple[float, float], tiles: list[GridTile], model_mpp: float) -> list[str]:
    found = [f"warning: {note}" for note in slide.notes]
    if max(mpp) > COARSE * model_mpp:
        found.append(
            f"warning: {slide.path.name} has pixels of {max(mpp):.2f} µm, but the model was trained at "
            f"{model_mpp:g} µm and will lack details that it needs"
        )
    if not tiles:
        found.append(f"warning: no tissue found on {slide.path.name}: the result is empty")
    return found
