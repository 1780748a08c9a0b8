"""A digest of the tiles that a run is trained and validated on, to notice that they have changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from staindiffuser.training.errors import DataError
from staindiffuser.training.tiles.mixed_tiles import MixedTiles
from staindiffuser.training.tiles.paired_tiles import PairedTile, PairedTiles, Split

__all__ = ["DataDigest", "data_digest", "differences"]

DataDigest = dict[str, str]
"""What it is of → SHA-256: ``train.table``, ``train.he``, ``train.cd3``, ``train.cd3_mask``, …, ``val.table``, …, and
``all`` of these together."""
_USED: tuple[Split, ...] = ("train", "val")


def data_digest(tiles: PairedTiles | MixedTiles) -> DataDigest:
    """Digest of the table and of the content of every file, per split and column; test tiles do not count.

    Folders may be moved and renamed.

    Raises:
        DataError: a file cannot be read.
    """
    digests: DataDigest = {}
    with ThreadPoolExecutor(8) as pool:
        for split in _USED:
            rows = [(number, tile) for number, part in enumerate(tiles.parts) for tile in part.split(split)]
            table = [(n, t.slide, t.mpp, t.size, _name(t, t.he)) for n, t in rows]
            digests[f"{split}.table"] = _of(map(repr, table))
            columns: dict[str, list[Path | None]] = {"he": [tile.he for _, tile in rows]}
            for stain in tiles.stains:
                columns[stain] = [tile.stains[stain] for _, tile in rows]
                columns[f"{stain}_mask"] = [tile.masks[stain] for _, tile in rows]
            for column, files in columns.items():
                digests[f"{split}.{column}"] = _of(pool.map(_file, files))
    digests["shares"] = _of(map(repr, tiles.shares))
    digests["all"] = _of(f"{name} {value}" for name, value in digests.items())
    return digests


def differences(before: DataDigest, after: DataDigest) -> list[str]:
    """What differs between two digests, in words; a table that differs stands for the files that it names."""
    names = [name for name in {**before, **after} if name != "all" and before.get(name) != after.get(name)]
    tables = {name.partition(".")[0] for name in names if name.endswith(".table")}
    words = []
    for name in names:
        split, _, column = name.partition(".")
        if name == "shares":
            words.append("the weights of the folders")
        elif column == "table":
            words.append(f"the rows of split {split}")
        elif split not in tables:
            words.append(f"the files of column {column} of split {split}")
    return words


def _name(tile: PairedTile, file: Path) -> str:
    return file.relative_to(tile.file.parent).as_posix()


def _file(path: Path | None) -> str:
    if path is None:
        return "-"
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _of(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()
