"""The results that are shown: their folders, images, slides and cells."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import os
import re
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

from staindiffuser.client.contract import ServedStain
from staindiffuser.client.errors import RunRecordError
from staindiffuser.client.names import find_slide
from staindiffuser.client.result_files import CELLS_FILE, cell_map_file, image_file
from staindiffuser.client.run_record import RUN_JSON, RunRecord, read_run
from staindiffuser.client.summary import SUMMARY_FILE
from staindiffuser.errors import StainDiffuserError
from staindiffuser.imaging.slides import open_slide
from staindiffuser.viewer.cell_index import CellIndex, start_building
from staindiffuser.viewer.comparison import TRUTH, Reference, open_truth, parse_truth
from staindiffuser.viewer.errors import NotThereError, ResultGoneError, ViewerUsageError
from staindiffuser.viewer.flags import read_flags
from staindiffuser.viewer.pyramids import JpegPyramid, MapPyramid, Pyramid, SlidePyramid, TileCache

__all__ = ["Cells", "Entry", "Library", "OpenResult", "find_results", "source_slide"]

OPEN_RESULTS = 12
"""Results whose files stay open."""
SEVERAL_FILES = (".mrxs", ".dcm")
"""Slides of which several files together have the size that is known."""
WHOLE_LEVELS = 3
"""Smallest levels of a slide, in which the whole of it is shown: on a panel, and on a large screen."""
CACHE_BYTES = 32 * 2**20


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A line of the list of slides."""

    name: str
    """Unique; part of addresses."""
    title: str
    folder: Path
    error: str | None = None
    """Why there is nothing to show."""
    slide: str | None = None
    """SHA-256 of the H&E: results of the same slide can be compared."""


def find_results(paths: Sequence[Path]) -> list[Entry]:
    """The results in these folders, which are results or hold results; with the slides of a batch that failed.

    Raises:
        ResultGoneError: a folder does not exist or holds no result.
    """
    found: dict[Path, str | None] = {}
    slides: dict[Path, str] = {}
    for path in paths:
        if not path.is_dir():
            raise ResultGoneError(f"{path} is not a folder: name the folder that `staindiffuser stain` wrote")
        folders = [path] if (path / RUN_JSON).is_file() else _below(path)
        failed = _failures(path / SUMMARY_FILE)
        if not folders and not failed:
            raise ResultGoneError(
                f"{path} holds no result ({RUN_JSON}): name the folder that `staindiffuser stain` wrote"
            )
        for folder in folders:
            try:
                slides[folder] = read_run(folder).input.sha256
                found[folder] = None
            except RunRecordError as error:
                found[folder] = str(error)
        for folder, reason in failed.items():
            found.setdefault(folder, reason)
    entries: list[Entry] = []
    taken: set[str] = set()
    for folder, problem in found.items():
        title = folder.resolve().name.removesuffix("-stained") or folder.resolve().name
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", title).strip(".-")[:60] or "slide"
        if name in taken:  # the same name in another folder, or one that differs in letters that addresses lack
            name += "-" + hashlib.sha256(str(folder.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:8]
        taken.add(name)
        entries.append(Entry(name=name, title=title, folder=folder, error=problem, slide=slides.get(folder)))
    return entries


def _below(path: Path) -> list[Path]:
    return sorted(record.parent for pattern in (f"*/{RUN_JSON}", f"*/*/{RUN_JSON}") for record in path.glob(pattern))


def _failures(summary: Path) -> dict[Path, str]:
    """The slides of a batch that have no result, and why; relative folders are taken from the summary's."""
    try:
        with summary.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row.get("status") in ("failed", "interrupted")]
    except (OSError, ValueError, csv.Error):
        return {}
    found = {}
    for row in rows:
        called = row.get("output") or row.get("slide") or "slide"
        found[summary.parent / Path(called).name] = row.get("error") or row["status"]
    return found


class Cells:
    """The cells of a result, from when somebody first asks for them."""

    def __init__(self, geojson: Path, size: tuple[int, int]) -> None:
        """Describe the file and the slide's size in level-0 pixels."""
        self._geojson, self._size = geojson, size
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._process: Popen[str] | None = None
        self._index: CellIndex | None = None
        self._closed = False
        self._lock = threading.Lock()
        self.problem = "" if geojson.is_file() else "the result has no cells"
        """Why there are none to show; empty while they are being read and afterwards."""

    def index(self) -> CellIndex | None:
        """The cells; None while they are being read, or if there are none."""
        with self._lock:
            if self.problem or self._closed or self._index is not None:
                return self._index
            if self._process is None:
                self._folder = tempfile.TemporaryDirectory(prefix="staindiffuser-view-")
                self._process = start_building(self._geojson, Path(self._folder.name), self._size)
            code = self._process.poll()
            if code is None or self._folder is None:
                return None
            lines = (self._process.communicate()[1] or "").strip().splitlines()
            if code:
                self.problem = lines[-1] if lines else f"reading the cells ended with code {code}"
            else:
                self._index = CellIndex(Path(self._folder.name))
            return self._index

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading, and remove the arrays; there are none from now on."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                self._process.kill()  # nothing happens to one that has ended
                self._process.wait()
                if self._process.stderr is not None:
                    self._process.stderr.close()
            if self._folder is not None:
                self._index = None
                self._folder.cleanup()
                self._folder = None


def source_slide(run: RunRecord, folder: Path, places: Sequence[Path]) -> Path:
    """The slide of a result, known by its hash: the H&E beside a stain must never be another one.

    Args:
        run: the result's record.
        folder: the result's folder; the slide may lie beside it.
        places: files and folders to search as well.

    Raises:
        InputError: it is nowhere.
        OSError: the folder cannot be listed.
    """
    recorded = [] if run.input.path is None else [Path(run.input.path)]
    beside = [
        path
        for path in folder.absolute().parent.iterdir()
        if path.is_file() and (path.stat().st_size == run.input.bytes or path.suffix.lower() in SEVERAL_FILES)
    ]
    return find_slide(run, [path for path in recorded if path.is_file()] + sorted(beside) + list(places))


class OpenResult:
    """A result whose files are open; they are closed when this object is gone."""

    def __init__(self, entry: Entry, places: Sequence[Path], cache: TileCache, truth: Sequence[str] = ()) -> None:
        """Open the result.

        Args:
            entry: where it is.
            places: files, and folders of files, among which its H&E slide is looked for.
            cache: of tiles.
            truth: registered real stains, ``STAIN=FILE``.

        Raises:
            ResultGoneError, RunRecordError, SlideError: it cannot be read.
            ViewerUsageError: a real stain does not fit.
        """
        self.entry = entry
        self.run: RunRecord = read_run(entry.folder)
        self.version = hashlib.sha256((entry.folder / RUN_JSON).read_bytes()).hexdigest()[:12]
        """Of the result: part of the addresses of its tiles, which may therefore be kept by the browser."""
        self.stains: dict[str, tuple[ServedStain, Pyramid]] = {
            stain.name: (stain, self._stain(stain, cache)) for stain in self.run.stains
        }
        self.truth: dict[str, Pyramid] = {
            name: open_truth(path, self.run, self.stain(name), cache)
            for name, path in parse_truth(truth, self.run.stains).items()
        }
        """Real stains, by the stain's name."""
        self.maps: dict[str, MapPyramid] = {}
        """The cell maps, by the stain's name; empty if there are none."""
        for stain in self.run.stains if self.run.request.cells else ():
            self.maps[stain.name] = MapPyramid(entry.folder / cell_map_file(stain))
        self.cells = Cells(entry.folder / CELLS_FILE, self.run.input.size)
        self.flags = read_flags(entry.folder, self.run)
        self.source: Pyramid | None = None
        self.source_problem = ""
        """Why the H&E is not shown."""
        try:
            path = source_slide(self.run, entry.folder, places)
            slide = open_slide(path, allow_damaged=self.run.request.allow_damaged)
            self.source = SlidePyramid(slide, cache, (self.version, "he"), own_tiles=True)
        except (StainDiffuserError, OSError) as error:
            self.source_problem = f"{error} (--slides FOLDER)"

    def stain(self, name: str) -> Pyramid:
        """A stain's image.

        Raises:
            NotThereError: the result has no such stain.
        """
        if name not in self.stains:
            raise NotThereError(f"the result has no stain {name!r}")
        return self.stains[name][1]

    def _stain(self, stain: ServedStain, cache: TileCache) -> Pyramid:
        path = self.entry.folder / image_file(stain)
        try:
            return JpegPyramid(path)
        except ValueError:
            return SlidePyramid(open_slide(path), cache, (self.version, stain.name))


def _whole(image: Pyramid) -> list[tuple[int, int, int]]:
    """Level, column and row of the tiles that show the whole of an image."""
    return [
        (level, column, row)
        for level in range(max(0, len(image.levels) - WHOLE_LEVELS), len(image.levels))
        for row in range(-(-image.levels[level][1] // image.sides[level]))
        for column in range(-(-image.levels[level][0] // image.sides[level]))
    ]


class Library:
    """All results that are shown; opens them as they are asked for. Thread-safe."""

    def __init__(self, entries: Sequence[Entry], places: Sequence[Path] = (), truth: Sequence[str] = ()) -> None:
        """Show these results.

        Args:
            entries: the results.
            places: files and folders that may hold their H&E slides.
            truth: registered real stains of the only result, ``STAIN=FILE``.

        Raises:
            ViewerUsageError: there are real stains and several results.
        """
        if truth and sum(entry.error is None for entry in entries) != 1:
            raise ViewerUsageError("--truth is of one slide: name one result")
        self.entries = {entry.name: entry for entry in entries}
        self.cache = TileCache(CACHE_BYTES)
        self._places, self._truth = places, truth
        self._open: OrderedDict[str, tuple[tuple[int, ...], OpenResult]] = OrderedDict()
        self._lock = threading.Lock()
        self._closed = False
        self._opening = {name: threading.Lock() for name in self.entries}

    def open(self, name: str) -> OpenResult:
        """A result; opened anew if it was replaced.

        Raises:
            NotThereError: there is none of this name.
            ResultGoneError: its folder is gone.
            RunRecordError, SlideError: it cannot be read.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise NotThereError(f"there is no slide {name!r}")
        try:
            found = (entry.folder / RUN_JSON).stat()
        except OSError:
            raise ResultGoneError(entry.error or f"the result {entry.folder} is gone") from None
        state = (found.st_mtime_ns, found.st_size, found.st_ino)
        with self._opening[name]:  # looking for its slide can take a while; other results do not wait for it
            with self._lock:
                kept = self._open.get(name)
                if kept is not None and kept[0] == state:
                    self._open.move_to_end(name)
                    return kept[1]
            opened = OpenResult(entry, self._places, self.cache, self._truth)
            with self._lock:
                if self._closed:
                    raise NotThereError("the server is ending")
                self._open[name] = (state, opened)
                while len(self._open) > OPEN_RESULTS:
                    self._open.popitem(last=False)
            return opened

    def open_first(self) -> None:
        """Open the result that the page shows first, and make the tiles that show the whole slide."""
        first = next((entry.name for entry in self.entries.values() if entry.error is None), None)
        if first is None:
            return
        with contextlib.suppress(StainDiffuserError, OSError):  # whoever asks for it will be told
            result = self.open(first)
            images = [image for _, image in result.stains.values()]
            if result.source is not None:
                images.append(result.source)
            with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
                list(pool.map(lambda one: one[0].tile(*one[1]), [(i, place) for i in images for place in _whole(i)]))
            result.cells.index()  # begins to read them

    def references(self, result: OpenResult) -> list[Reference]:
        """What a result's stains can be compared with: real ones, and results of the same slide and size."""
        found = []
        if result.truth:
            found.append(Reference(name=TRUTH, label="real", stains=tuple(result.truth)))
        for other in self.entries.values():
            if other.name == result.entry.name or other.slide is None or other.slide != result.run.input.sha256:
                continue
            try:
                run = read_run(other.folder)
            except RunRecordError:
                continue
            stains = tuple(stain.name for stain in run.stains if stain.name in result.stains)
            if stains and run.result.size == result.run.result.size:
                label = f"{other.title}, {run.model.name} {run.model.version[:6]}, seed {run.seed}"
                found.append(Reference(name=other.name, label=label, stains=stains))
        return found

    def reference(self, result: OpenResult, name: str, stain: str) -> Pyramid:
        """The image that a stain is compared with.

        Raises:
            NotThereError: there is none.
            ResultGoneError: it cannot be read.
        """
        for one in self.references(result):
            if one.name == name and stain in one.stains:
                return result.truth[stain] if name == TRUTH else self.open(name).stain(stain)
        raise NotThereError(f"there is no {stain!r} of {name!r} to compare with")

    def close(self) -> None:
        """Forget every result."""
        with self._lock:
            self._closed = True
            opened, self._open = self._open, OrderedDict()
        for _, result in opened.values():
            result.cells.close()
