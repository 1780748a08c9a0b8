"""Stains one slide: open it, find the tissue, stain and write row by row, publish the result."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from staindiffuser.client import run_record
from staindiffuser.client.cells_parquet import require_pyarrow
from staindiffuser.client.contract import ModelContract, ServedStain, Stainer
from staindiffuser.client.errors import FileNameError, OutputError
from staindiffuser.client.names import SlideNames
from staindiffuser.client.options import StainingOptions
from staindiffuser.client.own_cells import read_own_cells
from staindiffuser.client.progress import QuietReporter, Reporter, Stopwatch
from staindiffuser.client.result_folder import ResultFolder
from staindiffuser.client.run_record import Request, RunRecord
from staindiffuser.client.slide_plan import SlidePlan, plan_slide
from staindiffuser.client.slide_run import SlideRun
from staindiffuser.errors import InputError
from staindiffuser.files import file_sha256
from staindiffuser.imaging.annotations import read_regions
from staindiffuser.imaging.errors import SlideReadError
from staindiffuser.imaging.instances import HALF
from staindiffuser.imaging.slides import open_slide

__all__ = ["SlideJob", "stain_slide"]


def stain_slide(
    path: Path,
    output: Path,
    stainer: Stainer,
    options: StainingOptions | None = None,
    reporter: Reporter | None = None,
) -> RunRecord:
    """Stain a slide or a tile and write the result to the folder ``output``.

    Work that was interrupted is continued: the result has the same pixels as without the interruption.

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
        OutputError: the output cannot be written, or holds another result or other unfinished work.
        ServerError: the server failed or was lost. After any of these errors no new file has a final name.
    """
    with SlideJob(path, output, options or StainingOptions()) as job:
        return job.stain(stainer, reporter or QuietReporter())


class SlideJob:
    """One slide and its result folder, both open; use it as a context manager.

    Entering it finds out whether the input and the output are usable, before a server is needed.
    """

    def __init__(self, path: Path, output: Path, options: StainingOptions, names: SlideNames | None = None) -> None:
        """Describe the job; arguments and errors are those of :func:`stain_slide`."""
        self._names = names or SlideNames(path, keep=options.keep_names)
        self._path, self._output, self._options = path, output, options
        self._open = ExitStack()
        self.run: SlideRun | None = None
        """Known once staining has begun."""
        self.kept = False
        """An existing result was kept."""

    def __enter__(self) -> Self:
        try:
            _require_utf8(self._path, self._output)
            if self._options.parquet or "spatialdata" in self._options.formats:
                require_pyarrow()
            self._slide = self._open.enter_context(open_slide(self._path, allow_damaged=self._options.allow_damaged))
            self._names.files = self._slide.files
            self._mask = _mask_identity(self._options.mask)
            given = self._options.cells_from
            self._own_cells = read_own_cells(given) if given is not None else None
            self._cells_from = file_sha256(given) if given is not None else None
            force = None if self._options.force_mpp else "--force-mpp"
            self._mpp = self._slide.pixel_size(self._options.mpp, force=force)
            self._old = run_record.find_run(self._output) if self._options.resume else None
            if self._old is None:
                self._folder = self._open.enter_context(ResultFolder(self._output, overwrite=self._options.overwrite))
        except BaseException:
            self._open.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._open.close()

    def stain(self, stainer: Stainer, reporter: Reporter) -> RunRecord:
        """Stain the slide and publish the result, or return the one that is there; see :func:`stain_slide`."""
        options, contract = self._options, stainer.contract
        stains = contract.select(options.stains, options.thresholds)
        request = Request(
            model_version=contract.model_version,
            stains=tuple(stain.name for stain in stains),
            seed=options.seed,
            mpp=options.mpp,
            cells=options.cells,
            allow_damaged=options.allow_damaged,
            preview=options.preview,
            keep_names=options.keep_names,
            nuclei=options.cells and options.nuclei and options.cells_from is None,
            cells_from=self._cells_from,
            parquet=options.parquet,
            combined=options.combined,
            formats=options.formats,
            mask=self._mask,
            save_mask=options.save_mask,
            icc=options.icc,
            thresholds={stain.name: stain.threshold for stain in stains if stain.threshold != HALF},
        )
        if self._old is not None:
            self._require_same(self._old, request)
            self.kept = True
            reporter.say(f"{self._output} is already complete: kept")
            return self._old
        try:
            return self._stain(stains, request, stainer, reporter)
        except SlideReadError:
            raise
        except InputError:
            if self.run is not None:
                self._folder.keep = False  # the slide is damaged: staining it again would fail again
            raise
        except OSError as error:  # readers and the client raise their own: this is a full or vanished disk
            raise OutputError(f"the output {self._output} cannot be written: {error.strerror or error}") from error

    def plan(self, contract: ModelContract) -> SlidePlan:
        """What :meth:`stain` would do first; raises the same errors."""
        contract.select(self._options.stains, self._options.thresholds)
        return plan_slide(self._slide, self._mpp, contract, Stopwatch(), self._options.mask, self._options.icc)

    def _stain(
        self, stains: tuple[ServedStain, ...], request: Request, stainer: Stainer, reporter: Reporter
    ) -> RunRecord:
        watch = Stopwatch()
        with ThreadPoolExecutor(1, thread_name_prefix="hash") as hasher:
            hasher.submit(lambda: self._names.sha256)  # while the tissue is found
            plan = plan_slide(self._slide, self._mpp, stainer.contract, watch, self._options.mask, self._options.icc)
            for line in [plan.announcement(), *plan.warnings]:
                reporter.say(line)
            run = SlideRun(
                folder=self._folder,
                options=self._options,
                request=request,
                stains=stains,
                stainer=stainer,
                plan=plan,
                names=self._names,
                own_cells=self._own_cells,
                reporter=reporter,
                watch=watch,
            )
            self.run = run
            return run.finish()

    def _require_same(self, run: RunRecord, request: Request) -> None:
        """Raise OutputError unless an existing result is what this job would produce."""
        changed = run_record.differences(run.request, request)
        missing = [name for name in run.outputs if not (self._output / name).exists()]
        if missing:
            changed.append(f"missing {', '.join(missing)}")
        if not changed and run.input.sha256 != self._names.sha256:
            changed.append("another slide")
        if changed:
            raise OutputError(
                f"{self._output} holds another result ({', '.join(changed)}): use --overwrite to replace it, "
                "or another --output"
            )


def _mask_identity(mask: str | Path) -> str:
    """What a record calls the mask; raises InputError for a file that holds no polygons."""
    if mask in ("auto", "none"):
        return str(mask)
    read_regions(Path(mask))
    return file_sha256(Path(mask))


def _require_utf8(*paths: Path) -> None:
    """Refuse names that JSON and OME-XML cannot hold."""
    for path in paths:
        try:
            str(path).encode("utf-8")
        except UnicodeEncodeError:
            raise FileNameError(f"the name {str(path)!a} is not valid UTF-8: rename the file or folder") from None
