"""Tiles from several folders, mixed by weight: simulated and real ones, for example."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from staindiffuser.errors import UsageError
from staindiffuser.training.errors import DataError
from staindiffuser.training.tiles.copies import check_no_leak, copies_of_files
from staindiffuser.training.tiles.folds import Fold, deal_fold
from staindiffuser.training.tiles.paired_tiles import PairedTiles, with_fold
from staindiffuser.training.tiles.reading import Check, check_one_split, located
from staindiffuser.training.tiles.tile import MPP_TOLERANCE, PairedTile, Split

__all__ = ["MixedTiles", "Schedule", "open_tiles", "parse_spec"]

BLOCK = 1000
"""Samples over which the shares hold exactly."""


@dataclass(frozen=True, kw_only=True)
class MixedTiles:
    """Several folders of paired tiles with the same stains; has what :class:`PairedTiles` has for training."""

    parts: tuple[PairedTiles, ...]
    weights: tuple[float, ...]
    """Of ``parts``: samples are drawn from each in proportion to its weight, however many tiles it has."""

    def __post_init__(self) -> None:
        first = self.parts[0]
        for part in self.parts[1:]:
            csv = part.folder / "tiles.csv"
            for one, other in ((first, part), (part, first)):
                for stain in one.stains:
                    if stain not in other.stains:
                        raise DataError(
                            f"{other.folder / 'tiles.csv'}: no column {stain!r}, which {one.folder} has; "
                            "folders that are mixed need the same stains"
                        )
            mpp, needed = part.tiles[0].mpp, first.tiles[0].mpp
            if abs(mpp / needed - 1) > MPP_TOLERANCE:
                raise DataError(f"{csv}, row {part.tiles[0].row}: mpp is {mpp:g}, but {first.folder} has {needed:g}")
        check_one_split(self.tiles)
        check_no_leak(copies_of_files(located(self.tiles)))

    @property
    def folder(self) -> Path:
        """The first folder: what messages about the whole mixture name."""
        return self.parts[0].folder

    @property
    def stains(self) -> tuple[str, ...]:
        """In the order of the first folder's columns."""
        return self.parts[0].stains

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of the samples that each of ``parts`` gives; their sum is 1."""
        return tuple(weight / math.fsum(self.weights) for weight in self.weights)

    @property
    def tiles(self) -> tuple[PairedTile, ...]:
        """All tiles, folder after folder."""
        return tuple(tile for part in self.parts for tile in part.tiles)

    def split(self, split: Split) -> tuple[PairedTile, ...]:
        """The tiles of one split, a tile of each folder in turn, so that the first few come from all; may be empty."""
        turns = itertools.zip_longest(*(part.split(split) for part in self.parts))
        return tuple(tile for turn in turns for tile in turn if tile is not None)

    def scored(self, split: Split) -> tuple[PairedTile, ...]:
        """Those of one split that can be scored: they have an image of every stain."""
        return tuple(tile for tile in self.split(split) if tile.has_images(self.stains))


def open_tiles(
    specs: Sequence[str | Path],
    *,
    stains: Sequence[str] = (),
    check: Check = "headers",
    mpp: float | None = None,
    fold: Fold | None = None,
) -> PairedTiles | MixedTiles:
    """Open what ``--data`` names: one folder, or several to be mixed.

    Args:
        specs: folders, each ``FOLDER`` or ``FOLDER=WEIGHT``; a folder without a weight has weight 1.
        stains: the columns that are needed, in this order; by default all, and then every folder must have them. Of
            several folders one may lack some of those that are named here: it teaches nothing about them.
        check: as :meth:`PairedTiles.load`.
        mpp: the pixel size that is needed, µm.
        fold: deals the patients of train and val anew; by default the splits are those of the tables.

    Raises:
        UsageError: no folder, the same one twice, or a weight that is none.
        DataError: a folder that cannot be used, folders that do not go together, or a stain that none of them has.
    """
    folders, weights = [], []
    for spec in specs:
        folder, weight = parse_spec(spec)
        if folder in folders:
            raise UsageError(f"--data {spec}: the folder is named twice; give it once, with a larger weight")
        folders.append(folder)
        weights.append(weight)
    if not folders:
        raise UsageError("--data: name at least one folder of paired tiles")
    parts = tuple(PairedTiles.load(folder, check=check, mpp=mpp) for folder in folders)
    if stains:
        parts = _with_stains(parts, tuple(stains))
    if fold is not None:
        validated = deal_fold([tile for part in parts for tile in part.tiles], fold)
        parts = tuple(with_fold(part, validated) for part in parts)
    if len(parts) == 1:
        return parts[0]
    return MixedTiles(parts=parts, weights=tuple(weights))


def _with_stains(parts: tuple[PairedTiles, ...], stains: tuple[str, ...]) -> tuple[PairedTiles, ...]:
    """The folders with these stains; what a folder does not have is unknown of each of its tiles."""
    for stain in stains:
        if not any(stain in part.stains for part in parts):
            path = parts[0].folder / "tiles.csv"
            raise DataError(f"{path}, row 1: column {stain!r} is missing; there are {', '.join(parts[0].stains)}")
    unknown = dict.fromkeys(stains)
    return tuple(
        replace(
            part,
            stains=stains,
            tiles=tuple(
                replace(tile, stains={**unknown, **tile.stains}, masks={**unknown, **tile.masks}) for tile in part.tiles
            ),
        )
        for part in parts
    )


def parse_spec(spec: str | Path) -> tuple[Path, float]:
    """Folder and weight of ``FOLDER`` or ``FOLDER=WEIGHT``.

    Raises:
        UsageError: the weight is no positive number.
    """
    text = str(spec)
    name, separator, number = text.rpartition("=")
    if not separator or Path(text).exists():
        return Path(text), 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0 and name):
        raise UsageError(f"--data {text}: the weight must be a positive number, such as {name or 'tiles'}=0.3")
    return Path(name), weight


class Schedule:
    """Which training tile the sample number n is: a pure function of the seed and n.

    Over each block of a thousand samples the folders' shares hold exactly, in random order; and of each folder, every
    tile is seen once before any is seen again, or as often as its weight says.

    Args:
        weights: of each folder's training tiles, positive; None: all alike.
    """

    def __init__(
        self, tiles: PairedTiles | MixedTiles, seed: int, weights: Sequence[NDArray[np.float64]] | None = None
    ) -> None:
        self.seed = seed
        self._ends = None if weights is None else tuple(np.cumsum(w / w.sum()).tobytes() for w in weights)
        self.rows = tuple(part.split("train") for part in tiles.parts)
        self.counts = _counts(tiles.shares)
        for part, rows, count in zip(tiles.parts, self.rows, self.counts, strict=True):
            if not rows:
                raise DataError(f"{part.folder / 'tiles.csv'}: no rows with split 'train'")
            if count == 0:
                raise UsageError(f"--data {part.folder}: its weight is below a thousandth of all weights together")

    def __call__(self, sample: int) -> tuple[int, int]:
        """Of sample ``sample``: the folder's number, and the tile's among the folder's training tiles."""
        block, position = divmod(sample, BLOCK)
        if len(self.rows) == 1:
            part, number = 0, sample
        else:
            parts, numbers = _block(self.seed, block, self.counts)
            part = int(parts[position])
            number = block * self.counts[part] + int(numbers[position])
        epoch, turn = divmod(number, len(self.rows[part]))
        if self._ends is not None:
            return part, int(_weighted_order(self.seed, epoch, part, self._ends[part])[turn])
        return part, int(_order(self.seed, epoch, part, len(self.rows[part]))[turn])


def _counts(shares: Sequence[float]) -> tuple[int, ...]:
    """Samples of each folder in a block: rounded so that they sum to it (largest remainders)."""
    exact = np.asarray(shares) * BLOCK
    counts = np.floor(exact + 1e-9).astype(int)
    for index in np.argsort(counts - exact, kind="stable")[: BLOCK - counts.sum()]:
        counts[index] += 1
    return tuple(int(count) for count in counts)


@lru_cache(maxsize=4)
def _block(seed: int, block: int, counts: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Each sample's folder, in random order, and how many of the folder's samples came before it in the block."""
    parts = np.random.default_rng((seed, 3, block)).permutation(np.repeat(np.arange(len(counts)), counts))
    numbers = np.empty(BLOCK, np.int64)
    for part, count in enumerate(counts):
        numbers[parts == part] = np.arange(count)
    return parts, numbers


@lru_cache(maxsize=8)
def _order(seed: int, epoch: int, part: int, count: int) -> NDArray[np.int64]:
    """The order in which a folder's tiles are seen in an epoch."""
    return np.random.default_rng((seed, 1, epoch, part)).permutation(count)


@lru_cache(maxsize=8)
def _weighted_order(seed: int, epoch: int, part: int, ends: bytes) -> NDArray[np.int64]:
    """The same where tiles have weights: each comes as often as its weight says, rounded up or down (systematic
    sampling).

    Args:
        ends: the running sums of the weights, whose total is 1: float64 [tiles].
    """
    rng = np.random.default_rng((seed, 4, epoch, part))
    sums = np.frombuffer(ends, np.float64)
    marks = (np.arange(len(sums)) + rng.random()) / len(sums)
    return rng.permutation(np.minimum(np.searchsorted(sums, marks, side="right"), len(sums) - 1))
