"""Write a folder of paired tiles (see :mod:`.paired_tiles`), resumably."""

from __future__ import annotations

import csv
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from filelock import BaseFileLock, FileLock, Timeout

from staindiffuser.errors import UsageError
from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.image_files import write_png
from staindiffuser.training.tiles.stain_names import OTHER_COLUMNS, PATIENT, is_stain_name
from staindiffuser.training.tiles.tile import MASK, TILES_CSV, Split

__all__ = ["PairedTilesWriter"]


class PairedTilesWriter:
    """Write a folder of paired tiles, one row at a time, in constant memory.

    Images are PNG (fast, lossless), written to a temporary name and renamed. Rows stream into ``tiles.csv.partial``,
    which becomes ``tiles.csv`` when the writer is closed without an error: what stands under the final name is
    complete. An interrupted run leaves the partial file, and a writer opened with ``resume=True`` keeps its rows.

    Args:
        folder: made if it does not exist.
        stains: machine names, in the order of the columns.
        masks: whether rows have masks.
        patients: whether rows name a patient.
        resume: keep the rows of an interrupted or an earlier run; otherwise start anew.

    Raises:
        UsageError: the folder cannot be written, or a stain's name cannot be.
    """

    def __init__(
        self,
        folder: Path | str,
        stains: Iterable[str],
        *,
        masks: bool = True,
        patients: bool = False,
        resume: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.stains = tuple(stains)
        for stain in self.stains:
            if not is_stain_name(stain):
                raise UsageError(
                    f"{stain!r} cannot name a stain: use lower-case letters, digits and _ ([a-z][a-z0-9_]*)"
                )
        if len(set(self.stains)) != len(self.stains) or not self.stains:
            raise UsageError("stains: name at least one stain, each once")
        mask_columns = [stain + MASK for stain in self.stains if masks]
        self._columns = ["he", *self.stains, *mask_columns, *OTHER_COLUMNS[1:], *([PATIENT] if patients else [])]
        self._masks = masks
        self._partial = self.folder / (TILES_CSV + ".partial")
        self._done: dict[str, list[str]] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.folder)
            try:
                for file in (self.folder / TILES_CSV, self._partial):
                    if resume and file.is_file():
                        self._done |= _rows_of(file, self._columns)
                self._file: IO[str] = self._partial.open("w", encoding="utf-8", newline="")
            except BaseException:
                self._lock.release()
                raise
        except OSError as error:
            raise UsageError(f"{self.folder} cannot be written: {error.strerror or error}") from error
        self._rows = csv.writer(self._file, lineterminator="\n")
        self._rows.writerow(self._columns)
        for row in self._done.values():
            self._rows.writerow(row)
        self.count = len(self._done)
        """Rows so far."""
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(complete=kind is None)

    def has(self, name: str) -> bool:
        """Whether the tile ``name`` stands in a row kept from an earlier run."""
        return f"he/{name}.png" in self._done

    def paths(self, name: str, without: Collection[str] = ()) -> dict[str, str]:
        """Column to relative path, of a tile's images; empty for the stains that it is ``without``."""
        paths = {"he": f"he/{name}.png"}
        for column in (*self.stains, *(stain + MASK for stain in self.stains if self._masks)):
            paths[column] = "" if column.removesuffix(MASK) in without else f"{column}/{name}.png"
        return paths

    def write_images(
        self,
        name: str,
        he: UInt8Array,
        stains: Mapping[str, UInt8Array],
        masks: Mapping[str, UInt8Array] | None = None,
        *,
        without: Collection[str] = (),
    ) -> None:
        """Write a tile's images, without its row; safe to call from several processes.

        Args:
            name: the tile's file name without suffix.
            he: uint8 [H, W, 3].
            stains: per stain uint8 [H, W, 3].
            masks: per stain uint8 [H, W]; needed if the writer has masks.
            without: stains that the tile says nothing of; they have neither.
        """
        told = [stain for stain in self.stains if stain not in without]
        images = {"he": he, **{stain: stains[stain] for stain in told}}
        if self._masks:
            images |= {stain + MASK: (masks or {})[stain] for stain in told}
        paths = self.paths(name)
        for column, image in images.items():
            write_png(self.folder / paths[column], image)

    def add_row(
        self,
        name: str,
        *,
        slide: str,
        split: Split,
        mpp: float,
        patient: str | None = None,
        without: Collection[str] = (),
    ) -> None:
        """Append the row of a tile whose images are written; the patient needs a writer with ``patients``."""
        values: dict[str, object] = {**self.paths(name, without), "slide": slide, "split": split, "mpp": mpp}
        values[PATIENT] = patient or ""
        try:
            self._rows.writerow([values[column] for column in self._columns])
            self._file.flush()
        except OSError as error:
            raise UsageError(f"{self._partial} cannot be written: {error.strerror or error}") from error
        self.count += 1

    def add(
        self,
        name: str,
        *,
        he: UInt8Array,
        stains: Mapping[str, UInt8Array],
        masks: Mapping[str, UInt8Array] | None = None,
        slide: str,
        split: Split,
        mpp: float,
        patient: str | None = None,
    ) -> None:
        """Write a tile's images and append its row; see :meth:`write_images`."""
        self.write_images(name, he, stains, masks)
        self.add_row(name, slide=slide, split=split, mpp=mpp, patient=patient)

    def close(self, *, complete: bool = True) -> None:
        """Close; with ``complete`` the rows get their final name."""
        if self._file.closed:
            return
        try:
            with self._file:
                self._file.flush()
                os.fsync(self._file.fileno())
            if complete:
                self._partial.replace(self.folder / TILES_CSV)
        except OSError as error:
            raise UsageError(f"{self._partial} cannot be written: {error.strerror or error}") from error
        finally:
            self._lock.release()


def _locked(folder: Path) -> BaseFileLock:
    """Keep other writers out of a folder, until the lock is released or the process ends.

    Raises:
        UsageError: another run is writing there.
    """
    lock = FileLock(folder / ".lock", thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UsageError(f"another run is writing to {folder}: wait for it, or choose another --output") from None
    except OSError:  # a network share without locks; a folder that cannot be written is refused by what follows
        pass
    return lock


def _rows_of(path: Path, columns: list[str]) -> dict[str, list[str]]:
    """Rows of an earlier run that are whole and whose images stand; by the H&E's path.

    Raises:
        UsageError: the file has other columns, which would be lost, or cannot be read.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.reader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} cannot be read ({error}): delete it, or choose another --output") from error
    if len(rows) < 2:  # of a killed run, perhaps with half a header
        return {}
    if rows[0] != columns:
        raise UsageError(
            f"{path}, row 1: the columns are {', '.join(rows[0])}, not {', '.join(columns)}: put them in this order, "
            "or choose another --output"
        )
    images = columns.index("slide")
    return {
        row[0]: row
        for row in rows[1:]
        if len(row) == len(columns) and all((path.parent / name).is_file() for name in row[:images])
    }
