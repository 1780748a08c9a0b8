"""The tiles of :mod:`~staindiffuser.benchmarks.ablations`: checked, cut to one size, drawn for each run."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from staindiffuser.training.data.targets import load_tile
from staindiffuser.training.errors import DataError
from staindiffuser.training.tiles import mixed_tiles
from staindiffuser.training.tiles.paired_tiles import PairedTile, PairedTiles
from staindiffuser.training.tiles.reading import check_one_split
from staindiffuser.training.tiles.writing import PairedTilesWriter

if TYPE_CHECKING:
    from staindiffuser.benchmarks.ablations import AblationStudy

__all__ = ["fingerprint", "open_simulated", "open_tiles", "subset"]


def open_tiles(study: AblationStudy, progress: Callable[[str], None]) -> tuple[PairedTiles, tuple[PairedTile, ...]]:
    """The tiles to train on, and those to score on, spread over their split; cut if asked for.

    Raises:
        DataError: too few tiles, too small ones, a stain that is missing, or a slide on both sides.
    """
    tiles = PairedTiles.load(study.data, mpp=study.preset.model.mpp)
    others = PairedTiles.load(study.test, mpp=study.preset.model.mpp) if study.test else tiles
    path = others.folder / "tiles.csv"
    for stain in tiles.stains:
        if stain not in others.stains:
            raise DataError(f"{path}, row 1: column {stain!r} is missing, which {study.data} has")
    train, rows = tiles.scored("train"), others.scored(study.split)
    largest = max((size for size in study.sizes if size is not None), default=1)
    if len(train) < largest:
        raise DataError(f"{study.data / 'tiles.csv'}: {len(train)} training tiles, but --sizes asks for {largest}")
    if not rows:
        raise DataError(f"{path}: no rows with split {study.split!r} to score on; name another folder with --test")
    rows = rows[:: max(1, len(rows) // study.test_tiles)][: study.test_tiles]
    check_one_split((*train, *rows))
    side = study.tile or study.preset.train.crop
    for row in (*train, *rows):
        if min(row.size) < side:
            raise DataError(
                f"{row.file}, row {row.row}: the tile is {row.size[0]} × {row.size[1]}, smaller than {side}: "
                "use --tile or --crop"
            )
    if None not in study.sizes:
        order = np.random.default_rng(0).permutation(len(train))[:largest]
        train = tuple(train[index] for index in sorted(order))
    tiles = dataclasses.replace(tiles, tiles=train)
    if study.tile is None:
        return tiles, rows
    progress(f"{len(train)} training tiles and {len(rows)} to score on, cut to {study.tile} × {study.tile}")
    cut = _cut(tiles, rows, study.tile, study.output)
    return dataclasses.replace(cut, tiles=cut.split("train")), cut.split(study.split)


def open_simulated(study: AblationStudy, tiles: PairedTiles) -> PairedTiles:
    """The training tiles that the arm ``mixed`` adds, cut like ``tiles``; nothing is known of stains that they lack.

    Raises:
        DataError: they cannot be used, or do not go together with ``tiles``.
    """
    assert study.simulated is not None  # checked with the arms
    added = PairedTiles.load(study.simulated, mpp=study.preset.model.mpp)
    added = dataclasses.replace(added, tiles=added.split("train"))
    if study.tile is not None:
        added = _cut(added, (), study.tile, study.output)
    return mixed_tiles.open_tiles((tiles.folder, added.folder), stains=tiles.stains).parts[1]


def _cut(tiles: PairedTiles, rows: tuple[PairedTile, ...], side: int, output: Path) -> PairedTiles:
    """The central ``side`` × ``side`` pixels of each tile, as a folder of paired tiles."""
    key = hashlib.sha256(f"{fingerprint(tiles.tiles)} {fingerprint(rows)} {side}".encode()).hexdigest()
    folder = output / f"tiles-{key[:12]}"
    if not (folder / "tiles.csv").is_file():
        with PairedTilesWriter(folder, tiles.stains, resume=True) as writer:
            for row in (*tiles.tiles, *rows):
                name = f"{row.split}-{row.row:07d}"
                if writer.has(name):
                    continue
                top, left = ((length - side) // 2 for length in reversed(row.size))
                data = load_tile(row, tiles.stains)
                data = {name: array[top : top + side, left : left + side] for name, array in data.items()}
                writer.add(
                    name,
                    he=data["he"],
                    stains=data,
                    masks={stain: data[f"{stain}_mask"] for stain in tiles.stains},
                    slide=row.slide,
                    split=row.split,
                    mpp=row.mpp,
                )
    return PairedTiles.load(folder)


def subset(tiles: PairedTiles, number: int | None, seed: int) -> PairedTiles:
    """The tiles of a run: a larger number holds the smaller one's tiles; every seed draws others."""
    if number is None:
        return tiles
    order = np.random.default_rng((seed, 3)).permutation(len(tiles.tiles))[:number]
    return dataclasses.replace(tiles, tiles=tuple(tiles.tiles[index] for index in sorted(order)))


def fingerprint(rows: tuple[PairedTile, ...]) -> str:
    """Of the rows and the sizes of their files: enough to notice other tiles, without reading them all."""
    digest = hashlib.sha256()
    for row in rows:
        files = [file for file in (row.he, *row.stains.values(), *row.masks.values()) if file]
        digest.update(repr((row.slide, row.split, row.mpp, [(f.name, f.stat().st_size) for f in files])).encode())
    return digest.hexdigest()
