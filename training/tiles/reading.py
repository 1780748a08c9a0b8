"""Read and check ``tiles.csv``: every error names the file, the row and the field, and says what to do."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Literal

from staindiffuser.imaging.errors import ImageError
from staindiffuser.imaging.image_files import image_size, read_image
from staindiffuser.training.errors import DataError
from staindiffuser.training.tiles.copies import Located, check_no_leak, copies_of_files, group_copies, pixel_hash
from staindiffuser.training.tiles.mask_codes import MaskCode, MaskSurvey
from staindiffuser.training.tiles.stain_names import OTHER_COLUMNS, PATIENT, is_stain_name
from staindiffuser.training.tiles.tile import MASK, MPP_TOLERANCE, SPLITS, PairedTile

__all__ = [
    "Check",
    "check_mpp",
    "check_one_split",
    "check_rows_differ",
    "located",
    "mask_code",
    "read_rows",
    "read_table",
]

Check = Literal["headers", "pixels"]
_SAMPLE = 256
"""Masks, evenly spread, from which a folder's code is told when only headers are checked."""


Table = tuple[tuple[str, ...], tuple[PairedTile, ...]]
"""The stains in the order of the columns, and the tiles."""


def read_table(path: Path, *, check: Check, mpp: float | None) -> Table:
    """Read a ``tiles.csv`` and check it as a whole; see :meth:`PairedTiles.load`.

    Raises:
        DataError: naming the file, the row and the field that is wrong.
    """
    stains, tiles = read_rows(path, check=check)
    check_mpp(path, tiles, mpp)
    check_rows_differ(path, tiles)
    check_one_split(tiles)
    images = located(tiles)
    check_no_leak(copies_of_files(images) if check == "headers" else group_copies(_hashed(images)))
    codes = {stain: code for stain in stains if (code := mask_code(path, tiles, stain, check)) is not None}
    return stains, tuple(dataclasses.replace(tile, mask_codes=codes) for tile in tiles)


def read_rows(path: Path, *, check: Check) -> Table:
    """Read a ``tiles.csv`` and check row by row.

    Raises:
        DataError: naming the file, the row and the field that is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path} is missing: {path.parent} is not a folder of paired tiles") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        header = next(reader, None) or []
        stains = _stains_of_header(path, header)
        tiles = tuple(
            _tile(path, reader.line_num, _named(path, reader.line_num, header, row), stains, check)
            for row in reader
            if row
        )
    except csv.Error as error:
        raise DataError(f"{path}, row {reader.line_num}: not valid CSV: {error}") from error
    if not tiles:
        raise DataError(f"{path} has no rows: nothing to train on")
    return stains, tiles


def check_rows_differ(path: Path, tiles: Iterable[PairedTile]) -> None:
    """Refuse two rows with the same H&E.

    Raises:
        DataError: naming both rows.
    """
    first: dict[Path, PairedTile] = {}
    for tile in tiles:
        other = first.setdefault(tile.he, tile)
        if other is not tile:
            raise DataError(f"{path}, row {tile.row}: he is {tile.he}, as in row {other.row}: delete one of the rows")


def located(tiles: Iterable[PairedTile]) -> list[Located]:
    """The tiles' H&E images, for the search for copies."""
    return [
        Located(image=tile.he, where=f"{tile.file}, row {tile.row}: ", slide=tile.slide, split=tile.split)
        for tile in tiles
    ]


def _hashed(images: Sequence[Located]) -> Iterator[tuple[str, Located]]:
    with ThreadPoolExecutor() as threads:
        yield from zip(threads.map(lambda image: pixel_hash(read_image(image.image)), images), images, strict=True)


def mask_code(path: Path, tiles: Sequence[PairedTile], stain: str, check: Check) -> MaskCode | None:
    """What the values of a stain's masks mean; None where there are no masks.

    Raises:
        DataError: they mean nothing known, or a mask cannot be read.
    """
    masks = [mask for tile in tiles if (mask := tile.masks[stain]) is not None]
    if not masks:
        return None
    if check == "headers" and len(masks) > _SAMPLE:
        masks = [masks[number * len(masks) // _SAMPLE] for number in range(_SAMPLE)]
    survey = MaskSurvey()
    with ThreadPoolExecutor() as threads:
        try:
            for pixels in threads.map(lambda file: read_image(file, mode="L"), masks):
                survey.add(pixels)
        except ImageError as error:
            raise DataError(f"{path}: {stain}{MASK}: {error}") from error
    return survey.code(f"{path}: the masks in {stain}{MASK}")


def check_one_split(tiles: Iterable[PairedTile]) -> None:
    """Refuse a slide or a patient in two splits, and a slide of two patients.

    Raises:
        DataError: naming both rows.
    """
    slides: dict[str, PairedTile] = {}
    patients: dict[str, PairedTile] = {}
    for tile in tiles:
        other = slides.setdefault(tile.slide, tile)
        _check_same_split(tile, other, f"slide {tile.slide!r}")
        if tile.patient != other.patient:
            raise DataError(
                f"{tile.file}, row {tile.row}: slide {tile.slide!r} is of patient {tile.patient!r} here and of "
                f"{other.patient!r} in row {other.row}{_elsewhere(tile, other)}"
            )
        if tile.patient is not None:
            _check_same_split(tile, patients.setdefault(tile.patient, tile), f"patient {tile.patient!r}")


def _check_same_split(tile: PairedTile, other: PairedTile, what: str) -> None:
    if other.split != tile.split:
        raise DataError(
            f"{tile.file}, row {tile.row}: {what} is in split {tile.split!r} here and in {other.split!r} in row "
            f"{other.row}{_elsewhere(tile, other)}; all tiles of a {what.split()[0]} belong to one split"
        )


def _elsewhere(tile: PairedTile, other: PairedTile) -> str:
    return "" if other.file == tile.file else f" of {other.file}"


def _stains_of_header(path: Path, header: list[str]) -> tuple[str, ...]:
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
    reserved = (*OTHER_COLUMNS, PATIENT)
    stains = tuple(column for column in header if column not in reserved and not column.endswith(MASK))
    for stain in stains:
        if not is_stain_name(stain):
            raise DataError(f"{path}, row 1: column {stain!r} cannot name a stain: it must match [a-z][a-z0-9_]*")
    for column in header:
        if column.endswith(MASK) and column.removesuffix(MASK) not in stains:
            raise DataError(f"{path}, row 1: column {column!r} is a mask without a stain {column.removesuffix(MASK)!r}")
    if not stains:
        raise DataError(f"{path}, row 1: no stain column; add one per antibody, such as 'cd3'")
    return stains


def _named(path: Path, row: int, header: list[str], values: list[str]) -> dict[str, str]:
    if len(values) != len(header):
        raise DataError(f"{path}, row {row}: {len(values)} fields, but the header names {len(header)}")
    return dict(zip(header, (value.strip() for value in values), strict=True))


def _tile(path: Path, row: int, values: dict[str, str], stains: tuple[str, ...], check: Check) -> PairedTile:
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
    if not any(values[stain] or values.get(stain + MASK) for stain in stains):
        raise DataError(f"{path}, row {row}: no image and no mask of any stain: delete the row, or fill a column")
    named = ("he", *(stain for stain in stains if values[stain]))
    images = {column: _image(path, row, column, values[column]) for column in named}
    masks = {
        stain: _image(path, row, stain + MASK, value) if (value := values.get(stain + MASK)) else None
        for stain in stains
    }
    size = _size(path, row, "he", images["he"], check)
    others = {**images, **{stain + MASK: mask for stain, mask in masks.items() if mask is not None}}
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
        stains={stain: images.get(stain) for stain in stains},
        masks=masks,
        slide=values["slide"],
        split=split,
        mpp=mpp,
        size=size,
        file=path,
        patient=values.get(PATIENT) or None,
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


def _size(path: Path, row: int, column: str, file: Path, check: Check) -> tuple[int, int]:
    try:
        return image_size(file, decode=check == "pixels")
    except ImageError as error:
        raise DataError(f"{path}, row {row}: {column}: {error}") from error


def check_mpp(path: Path, tiles: Sequence[PairedTile], needed: float | None) -> None:
    """Refuse tiles of different pixel sizes, or of another than ``needed``, µm.

    Raises:
        DataError: naming the row.
    """
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
