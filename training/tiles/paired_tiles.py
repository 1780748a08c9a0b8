"""Paired tiles on disk: H&E and IHC of the same place, the contract between data preparation and training.

A folder with ``tiles.csv``, one row a tile, paths relative to the folder: ``he``, one column per stain (``cd3``, …),
one ``<stain>_mask`` per stain (a cell may be empty: the mask is then derived), ``slide``, ``split`` and ``mpp``.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import IO, Literal, Self, get_args

import numpy as np
import numpy.typing as npt
from filelock import BaseFileLock, FileLock, Timeout

from staindiffuser.errors import UsageError
from staindiffuser.imaging.errors import ImageError
from staindiffuser.imaging.image_files import image_size, read_image, write_png
from staindiffuser.training.errors import DataError
from staindiffuser.training.tiles.stain_names import OTHER_COLUMNS, is_stain_name

__all__ = [
    "MPP_TOLERANCE",
    "SPLITS",
    "TILES_CSV",
    "PairedTile",
    "PairedTiles",
    "PairedTilesWriter",
    "Split",
    "check_one_split",
    "read_image",
    "spread",
    "write_png",
]

TILES_CSV = "tiles.csv"
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
MPP_TOLERANCE = 0.02
"""Pixel sizes that differ by a larger share are different."""
_MASK = "_mask"


@dataclass(frozen=True, kw_only=True)
class PairedTile:
    """One row of ``tiles.csv``."""

    row: int
    """Line in ``tiles.csv``, the header being line 1."""
    he: Path
    """The H&E image, RGB."""
    stains: Mapping[str, Path]
    """Per stain its IHC image, RGB, of the same size."""
    masks: Mapping[str, Path | None]
    """Per stain its coarse mask (one channel, same size), or None: derived from the image when needed."""
    slide: str
    """Name of the slide the tile comes from."""
    split: Split
    mpp: float
    """Pixel size, µm."""
    size: tuple[int, int]
    """Width and height, pixels."""
    file: Path
    """The ``tiles.csv`` that the row stands in."""


@dataclass(frozen=True, kw_only=True)
class PairedTiles:
    """A validated folder of paired tiles."""

    folder: Path
    stains: tuple[str, ...]
    """In the order of the columns."""
    tiles: tuple[PairedTile, ...]

    @classmethod
    def load(
        cls, folder: Path | str, *, check: Literal["headers", "pixels"] = "headers", mpp: float | None = None
    ) -> PairedTiles:
        """Read and validate ``folder``.

        Args:
            folder: holds ``tiles.csv``.
            check: ``headers`` opens every image and compares sizes; ``pixels`` also decodes it, which finds
                truncated files.
            mpp: the pixel size that is needed (a model's), µm; by default that of the first row.

        Raises:
            DataError: naming the file, the row and the field that is wrong, and what to do.
        """
        folder = Path(folder)
        path = folder / TILES_CSV
        try:
            text = path.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            raise DataError(f"{path} is missing: {folder} is not a folder of paired tiles") from None
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read: {error}") from error
        reader = csv.reader(io.StringIO(text, newline=""))
        try:
            header = next(reader, None)
            stains = _stains_of_header(path, header)
            assert header is not None
            tiles = tuple(
                _tile(path, reader.line_num, _named(path, reader.line_num, header, row), stains, check)
                for row in reader
                if row
            )
        except csv.Error as error:
            raise DataError(f"{path}, row {reader.line_num}: not valid CSV: {error}") from error
        if not tiles:
            raise DataError(f"{path} has no rows: nothing to train on")
        _check_mpp(path, tiles, mpp)
        check_one_split(tiles)
        return cls(folder=folder, stains=stains, tiles=tiles)

    @property
    def parts(self) -> tuple[PairedTiles, ...]:
        """The folders that tiles come from: this one alone (:class:`~.mixing.MixedTiles` has several)."""
        return (self,)

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of the samples that each of ``parts`` gives."""
        return (1.0,)

    def split(self, split: Split) -> tuple[PairedTile, ...]:
        """The tiles of one split, in file order; may be empty."""
        return tuple(tile for tile in self.tiles if tile.split == split)


def spread(rows: Sequence[PairedTile], count: int) -> tuple[PairedTile, ...]:
    """At most ``count`` rows, evenly spread over all of them: they stand slide by slide."""
    count = min(count, len(rows))
    return tuple(rows[number * len(rows) // count] for number in range(count))


class PairedTilesWriter:
    """Write a folder of paired tiles, one row at a time, in constant memory.

    Images are PNG (fast, lossless), written to a temporary name and renamed. Rows stream into ``tiles.csv.partial``,
    which becomes ``tiles.csv`` when the writer is closed without an error: what stands under the final name is
    complete. An interrupted run leaves the partial file, and a writer opened with ``resume=True`` keeps its rows.

    Args:
        folder: made if it does not exist.
        stains: machine names, in the order of the columns.
        masks: whether rows have masks.
        resume: keep the rows of an interrupted or an earlier run; otherwise start anew.

    Raises:
        UsageError: the folder cannot be written, or a stain's name cannot be.
    """

    def __init__(self, folder: Path | str, stains: Iterable[str], *, masks: bool = True, resume: bool = False) -> None:
        self.folder = Path(folder)
        self.stains = tuple(stains)
        for stain in self.stains:
            if not is_stain_name(stain):
                raise UsageError(
                    f"{stain!r} cannot name a stain: use lower-case letters, digits and _ ([a-z][a-z0-9_]*)"
                )
        if len(set(self.stains)) != len(self.stains) or not self.stains:
            raise UsageError("stains: name at least one stain, each once")
        self._columns = ["he", *self.stains, *(stain + _MASK for stain in self.stains if masks), *OTHER_COLUMNS[1:]]
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

    def paths(self, name: str) -> dict[str, str]:
        """Column to relative path, of a tile's images."""
        paths = {"he": f"he/{name}.png"} | {stain: f"{stain}/{name}.png" for stain in self.stains}
        if self._masks:
            paths |= {stain + _MASK: f"{stain}{_MASK}/{name}.png" for stain in self.stains}
        return paths

    def write_images(
        self,
        name: str,
        he: npt.NDArray[np.uint8],
        stains: Mapping[str, npt.NDArray[np.uint8]],
        masks: Mapping[str, npt.NDArray[np.uint8]] | None = None,
    ) -> None:
        """Write a tile's images, without its row; safe to call from several processes.

        Args:
            name: the tile's file name without suffix.
            he: uint8 [H, W, 3].
            stains: per stain uint8 [H, W, 3].
            masks: per stain uint8 [H, W]; needed if the writer has masks.
        """
        images = {"he": he, **{stain: stains[stain] for stain in self.stains}}
        if self._masks:
            images |= {stain + _MASK: (masks or {})[stain] for stain in self.stains}
        paths = self.paths(name)
        for column, image in images.items():
            write_png(self.folder / paths[column], image)

    def add_row(self, name: str, *, slide: str, split: Split, mpp: float) -> None:
        """Append the row of a tile whose images are written."""
        values: dict[str, object] = {**self.paths(name), "slide": slide, "split": split, "mpp": mpp}
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
        he: npt.NDArray[np.uint8],
        stains: Mapping[str, npt.NDArray[np.uint8]],
        masks: Mapping[str, npt.NDArray[np.uint8]] | None = None,
        slide: str,
        split: Split,
        mpp: float,
    ) -> None:
        """Write a tile's images and append its row; see :meth:`write_images`."""
        self.write_images(name, he, stains, masks)
        self.add_row(name, slide=slide, split=split, mpp=mpp)

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
    images = len(columns) - len(OTHER_COLUMNS) + 1
    return {
        row[0]: row
        for row in rows[1:]
        if len(row) == len(columns) and all((path.parent / name).is_file() for name in row[:images])
    }


def _stains_of_header(path: Path, header: list[str] | None) -> tuple[str, ...]:
    if not header:
        raise DataError(f"{path} is empty: its first row must name the columns")
    for column in OTHER_COLUMNS:
        if column not in header:
            raise DataError(
                f"{path}, row 1: column {column!r} is missing; needed are {', '.join(OTHER_COLUMNS)} and a stain"
            )
    for column in header:
        if header.count(column) > 1:
            raise DataError(f"{path}, row 1: column {column!r} appears twice")
    stains = tuple(column for column in header if column not in OTHER_COLUMNS and not column.endswith(_MASK))
    for stain in stains:
        if not is_stain_name(stain):
            raise DataError(f"{path}, row 1: column {stain!r} cannot name a stain: it must match [a-z][a-z0-9_]*")
    for column in header:
        if column.endswith(_MASK) and column.removesuffix(_MASK) not in stains:
            raise DataError(
                f"{path}, row 1: column {column!r} is a mask without a stain {column.removesuffix(_MASK)!r}"
            )
    if not stains:
        raise DataError(f"{path}, row 1: no stain column; add one per antibody, such as 'cd3'")
    return stains


def _named(path: Path, row: int, header: list[str], values: list[str]) -> dict[str, str]:
    if len(values) != len(header):
        raise DataError(f"{path}, row {row}: {len(values)} fields, but the header names {len(header)}")
    return dict(zip(header, (value.strip() for value in values), strict=True))


def _tile(
    path: Path, row: int, values: dict[str, str], stains: tuple[str, ...], check: Literal["headers", "pixels"]
) -> PairedTile:
    split = values["split"]
    if split not in SPLITS:
        raise DataError(f"{path}, row {row}: split is {split!r}; it must be one of {', '.join(SPLITS)}")
    if not values["slide"]:
        raise DataError(f"{path}, row {row}: slide is empty; name the slide the tile comes from")
    try:
        mpp = float(values["mpp"])
    except ValueError:
        mpp = math.nan
    if not (math.isfinite(mpp) and mpp > 0):
        raise DataError(f"{path}, row {row}: mpp is {values['mpp']!r}; it must be a positive number of µm per pixel")
    for stain in stains:
        if not values[stain] and values.get(stain + _MASK):
            raise DataError(f"{path}, row {row}: {stain}{_MASK} is a mask without an image in {stain}")
    images = {column: _image(path, row, column, values[column]) for column in ("he", *stains)}
    masks = {
        stain: _image(path, row, stain + _MASK, value) if (value := values.get(stain + _MASK)) else None
        for stain in stains
    }
    size = _size(path, row, "he", images["he"], check)
    others = {**images, **{stain + _MASK: mask for stain, mask in masks.items() if mask is not None}}
    for column, file in others.items():
        other = size if column == "he" else _size(path, row, column, file, check)
        if other != size:
            raise DataError(
                f"{path}, row {row}: {column} ({file}) is {other[0]} x {other[1]} pixels, "
                f"but its H&E is {size[0]} x {size[1]}"
            )
    return PairedTile(
        row=row,
        he=images["he"],
        stains={stain: images[stain] for stain in stains},
        masks=masks,
        slide=values["slide"],
        split=split,
        mpp=mpp,
        size=size,
        file=path,
    )


def _image(path: Path, row: int, column: str, value: str) -> Path:
    if not value:
        raise DataError(f"{path}, row {row}: {column} is empty; give the image's path relative to {path.parent}")
    relative = PurePosixPath(value)
    if relative.is_absolute() or ".." in relative.parts:
        raise DataError(f"{path}, row {row}: {column} is {value!r}; paths must be relative and stay in {path.parent}")
    file = path.parent / relative
    if not file.is_file():
        raise DataError(f"{path}, row {row}: {column}: {file} does not exist")
    return file


def _size(path: Path, row: int, column: str, file: Path, check: Literal["headers", "pixels"]) -> tuple[int, int]:
    try:
        return image_size(file, decode=check == "pixels")
    except ImageError as error:
        raise DataError(f"{path}, row {row}: {column}: {error}") from error


def _check_mpp(path: Path, tiles: tuple[PairedTile, ...], needed: float | None) -> None:
    first = tiles[0]
    for tile in tiles:
        if needed is not None and abs(tile.mpp / needed - 1) > MPP_TOLERANCE:
            raise DataError(
                f"{path}, row {tile.row}: mpp is {tile.mpp:g}, but {needed:g} is needed; resample the tiles first"
            )
        if abs(tile.mpp / first.mpp - 1) > MPP_TOLERANCE:
            raise DataError(
                f"{path}, row {tile.row}: mpp is {tile.mpp:g} here and {first.mpp:g} in row {first.row}; "
                "all tiles of a folder have one pixel size"
            )


def check_one_split(tiles: Iterable[PairedTile]) -> None:
    """Refuse a slide that is in two splits.

    Raises:
        DataError: naming both rows.
    """
    first: dict[str, PairedTile] = {}
    for tile in tiles:
        other = first.setdefault(tile.slide, tile)
        if other.split != tile.split:
            where = "" if other.file == tile.file else f" of {other.file}"
            raise DataError(
                f"{tile.file}, row {tile.row}: slide {tile.slide!r} is in split {tile.split!r} here and in "
                f"{other.split!r} in row {other.row}{where}; all tiles of a slide belong to one split"
            )
