"""Stains the rows of one slide and saves each of them, so that the work survives any interruption."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import staindiffuser
from staindiffuser.client import run_record
from staindiffuser.client.blending import Mosaic
from staindiffuser.client.cells_parquet import PARQUET_FILE, write_parquet
from staindiffuser.client.contract import ServedStain, Stainer
from staindiffuser.client.errors import OutputError
from staindiffuser.client.journal import Journal, Work, WorkRow, read_journal
from staindiffuser.client.names import SlideNames
from staindiffuser.client.options import StainingOptions
from staindiffuser.client.own_cells import OWN_CELLS_FILE, OwnCells, score_own_cells
from staindiffuser.client.pipeline import stained_rows
from staindiffuser.client.preview import PANEL, write_preview
from staindiffuser.client.progress import Reporter, Stopwatch
from staindiffuser.client.quality import QualityMap
from staindiffuser.client.result_files import (
    CELLS_FILE,
    MASK_FILE,
    PREVIEW_FILE,
    ResultFiles,
    WrittenImage,
    output_images,
)
from staindiffuser.client.result_folder import ResultFolder
from staindiffuser.client.run_record import RUN_JSON, Request, RunRecord
from staindiffuser.client.scores import SCORES_FILE, NucleusCounter, Scores, score_stains, write_scores
from staindiffuser.client.slide_plan import SlidePlan
from staindiffuser.files import size_of
from staindiffuser.imaging.image_files import write_png
from staindiffuser.imaging.tissue import mask_image, read_overview

if TYPE_CHECKING:
    from staindiffuser.imaging.dicom_image import DicomSource

__all__ = ["SlideRun"]

SPARE_BYTES = 2**26
"""Free disk space that a row must leave."""


@dataclass(kw_only=True)
class SlideRun:
    """The staining of one slide into a folder that is locked."""

    folder: ResultFolder
    options: StainingOptions
    request: Request
    stains: tuple[ServedStain, ...]
    stainer: Stainer
    plan: SlidePlan
    names: SlideNames
    """Of the slide."""
    own_cells: OwnCells | None = None
    """Scored instead of the H&E's nuclei."""
    reporter: Reporter
    watch: Stopwatch
    started: str = field(default_factory=run_record.utc_now)
    saved_rows: int = 0
    """Rows of the result that are on the disk."""
    resumed_rows: int = 0
    """Those of them that an earlier run has written."""
    quality: QualityMap | None = field(init=False)
    """What the server says about the tiles, if it does."""

    def __post_init__(self) -> None:
        judged = self.stainer.contract.quality
        self.quality = None if judged is None else QualityMap(judged, self.stains, self.plan.grid)

    def finish(self) -> RunRecord:
        """Stain every row that is not saved yet and publish the result.

        Raises:
            OutputError: the folder holds other unfinished work, or the disk is nearly full.
            SlideError: part of the slide is damaged.
            ServerError: the server failed or was lost.
        """
        names, images, cells, scores = self._write(self._saved())
        if scores is not None:
            write_scores(self.folder.work, self.names.shown, scores)
            names.append(SCORES_FILE)
        if scores is not None and "spatialdata" in self.options.formats:
            from staindiffuser.client.spatialdata_folder import SPATIALDATA_FOLDER, write_spatialdata

            with self.watch.stage("spatialdata"):
                work = self.folder.work
                write_spatialdata(work, work / CELLS_FILE, images, scores, self.plan.view.scale)
            names.append(SPATIALDATA_FOLDER)
        if self.options.parquet:
            with self.watch.stage("parquet"):
                write_parquet(self.folder.work / CELLS_FILE, self.folder.work / PARQUET_FILE)
            names.append(PARQUET_FILE)
        if self.options.preview:
            with self.watch.stage("preview"):
                plan, work = self.plan, self.folder.work
                overview = read_overview(plan.slide, plan.mpp, PANEL).pixels
                contract = self.stainer.contract
                write_preview(work, work / PREVIEW_FILE, plan.view, overview, self.stains, contract)
            names.append(PREVIEW_FILE)
        if self.options.save_mask:
            write_png(self.folder.work / MASK_FILE, mask_image(self.plan.mask))
            names.append(MASK_FILE)
        if self.quality is not None:
            names += self.quality.write(self.folder.work)
            for line in self.quality.warnings():
                self.reporter.say(line)
        record = self._record(names, cells, scores)
        run_record.write_run(self.folder.work, record)
        self.folder.publish([*names, RUN_JSON])
        return record

    def _work(self) -> Work:
        return Work(
            input_sha256=self.names.sha256,
            request=self.request,
            batch=self.stainer.contract.tiles_per_request(self.options.batch),
            software=staindiffuser.__version__,
            size=self.plan.view.size,
        )

    def _saved(self) -> list[WorkRow]:
        """The rows of the same work that an earlier run has saved; anything else in the folder is removed."""
        unfinished = read_journal(self.folder.work)
        before, rows = unfinished if unfinished is not None else (None, [])
        changed = run_record.differences(before, self._work()) if before is not None else []
        if changed and not self.options.overwrite:
            raise OutputError(
                f"{self.folder.path} holds unfinished work with other settings ({', '.join(changed)}): finish it with "
                "those, discard it with --overwrite, or use another --output"
            )
        if changed or not rows:
            self.folder.clear()
            return []
        self.reporter.say(f"continuing interrupted work: {len(rows)} of {self.plan.rows} rows are already done")
        return rows

    def _write(self, saved: list[WorkRow]) -> tuple[list[str], Sequence[WrittenImage], dict[str, int], Scores | None]:
        """Stain and write every row that is not saved; return the files' names, the images among them, the cells per
        stain, and the scores."""
        plan, slide = self.plan, self.plan.slide
        mosaic = Mosaic(plan.grid, output_images(self.stains, cells=self.options.cells), plan.mask, plan.left_out)
        with self._open_files(saved) as files, Journal(self.folder.work) as journal:
            if not self.saved_rows:
                journal.start(self._work())
            counter = self._counter(saved[: self.saved_rows]) if self.request.nuclei else None
            nuclei = counter.until(-1) if counter is not None else ()
            self.reporter.start(slide.path.name, len(plan.tiles))
            try:
                with stained_rows(
                    plan.view, plan.grid, plan.tiles, mosaic, self.stainer, self.stains, self.options, self.watch,
                    self.reporter.advance, first_row=self.saved_rows, counter=counter, quality=self.quality,
                ) as rows:  # fmt: skip
                    for row in rows:
                        files.write_row(row, mosaic)
                        nuclei = counter.until(row) if counter is not None else ()
                        saved_row = files.commit(slide.damaged, nuclei)
                        if self.quality is not None:
                            saved_row = dataclasses.replace(saved_row, quality=self.quality.take())
                        journal.add(saved_row)
                        self.saved_rows, self.folder.keep = row + 1, True
                        self._require_space()
            finally:
                self.reporter.stop()
            cells = files.cell_counts
            names = files.finish()
            if self.own_cells is not None:
                with self.watch.stage("own cells"):
                    view = plan.view
                    nuclei = score_own_cells(
                        self.own_cells, self.folder.work, self.stains, size=view.size, scale=view.scale, mpp=view.mpp
                    )
                names.append(OWN_CELLS_FILE)
            scores = score_stains(
                self.stains, cells=cells, positive_pixels=files.positive_pixels, nuclei=nuclei,
                nuclei_tiles=counter.tiles if counter is not None else 0, mask=plan.mask, mpp=plan.view.mpp,
            )  # fmt: skip
            return names, files.written, cells, scores if self.options.cells else None

    def _counter(self, saved: list[WorkRow]) -> NucleusCounter:
        plan = self.plan
        mpp = math.sqrt(plan.view.mpp[0] * plan.view.mpp[1])
        return NucleusCounter(
            plan.grid, plan.tiles, self.stains, plan.mask, mpp,
            saved=saved[-1].nuclei if saved else (), first_row=len(saved),
        )  # fmt: skip

    def _open_files(self, saved: list[WorkRow]) -> ResultFiles:
        """The files of the result, continued after the saved rows, or begun anew if they do not match them."""

        def files(saved: list[WorkRow]) -> ResultFiles:
            return ResultFiles(
                self.folder.work, self.names.shown, self.plan.view, self.stainer.contract, self.stains,
                seed=self.options.seed, cells=self.options.cells, combined=self.options.combined,
                formats=self.options.formats, dicom_source=self._dicom_source(), watch=self.watch,
                done=saved,
            )  # fmt: skip

        try:
            opened = files(saved)
        except (ValueError, FileNotFoundError) as error:
            self.reporter.say(f"the unfinished work in {self.folder.work} is damaged ({error}): starting again")
            self.folder.clear()
            return files([])
        self.saved_rows = self.resumed_rows = len(saved)
        self.plan.slide.add_damaged(saved[-1].damaged if saved else ())
        if self.quality is not None:
            self.quality.restore(scores for row in saved for scores in row.quality)
        return opened

    def _dicom_source(self) -> DicomSource | None:
        slide = self.plan.slide
        if "dicom" not in self.options.formats or not slide.format.startswith("dicom"):
            return None
        from staindiffuser.imaging.dicom_image import read_dicom_source

        return read_dicom_source(slide.files, identity=self.options.keep_names)

    def _require_space(self) -> None:
        """The finished files need as much space again as the unfinished ones."""
        needed = sum(path.stat().st_size for path in self.folder.work.iterdir()) + SPARE_BYTES
        free = shutil.disk_usage(self.folder.work).free
        if free < needed:
            raise OutputError(
                f"the disk of {self.folder.path} is nearly full: {free >> 20} MiB are free, {needed >> 20} are needed; "
                "make room and run the same command again"
            )

    def _record(self, names: list[str], cells: dict[str, int], scores: Scores | None) -> RunRecord:
        plan, options, contract = self.plan, self.options, self.stainer.contract
        slide, view, grid = plan.slide, plan.view, plan.grid
        mpp_from = "--force-mpp" if options.force_mpp else "--mpp" if slide.mpp is None else "file"
        return RunRecord(
            format=run_record.FORMAT,
            notice=f"{run_record.SYNTHETIC} {contract.notice}",
            input=run_record.InputRecord(
                path=str(slide.path.absolute()) if self.names.keep else None,
                sha256=self.names.sha256,
                bytes=sum(path.stat().st_size for path in slide.files),
                format=slide.format,
                size=slide.size,
                mpp=plan.mpp,
                mpp_from=mpp_from,
                level_read=view.level,
            ),
            model=run_record.model_record(contract),
            request=self.request,
            stains=self.stains,
            seed=options.seed,
            steps=contract.steps,
            result=run_record.ResultRecord(size=view.size, mpp=view.mpp, resampled=view.resampled),
            tiles=run_record.TilesRecord(
                total=grid.rows * grid.columns,
                stained=len(plan.tiles),
                side=grid.tile,
                stride=grid.stride,
                margin=grid.margin,
                batch=contract.tiles_per_request(options.batch),
                in_flight=options.in_flight,
            ),
            resumed_rows=self.resumed_rows,
            damaged=slide.damaged,
            tissue_fraction=round(plan.mask.fraction, 4),
            mask=run_record.MaskRecord(
                shown_fraction=round(float(plan.mask.shown.mean()), 4),
                pen_fraction=round(plan.mask.pen_fraction, 4),
                unscanned_fraction=round(plan.mask.unscanned_fraction, 4),
                mpp=(plan.mask.cell[0] * view.mpp[0], plan.mask.cell[1] * view.mpp[1]),
            ),
            cells=cells,
            scores=scores,
            warnings=(
                *(self.names.hidden(line) for line in plan.warnings),
                *(self.quality.warnings() if self.quality is not None else ()),
            ),
            server=run_record.ServerRecord(
                url=self.stainer.url, version=self.stainer.server_version, id=self.stainer.server_id
            ),
            started=self.started,
            seconds=run_record.Seconds(
                total=round(self.watch.total, 3), stages_summed_over_threads=self.watch.seconds()
            ),
            versions=run_record.library_versions(),
            outputs={name: size_of(self.folder.work / name) for name in names},
            quality=None if self.quality is None else self.quality.record(),
        )
