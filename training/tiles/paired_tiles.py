"""Paired tiles on disk: H&E and IHC of the same position, the contract between data preparation and training.

A folder with ``tiles.csv``, one row a tile, paths relative to the folder: ``he``, one column per stain (``cd3``, …),
one ``<stain>_mask`` per stain (a cell may be empty: the mask is then derived), ``slide``, ``split``, ``mpp`` and,
optionally, ``patient``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from staindiffuser.training.tiles.reading import Check, read_table
from staindiffuser.training.tiles.tile import TILES_CSV, PairedTile, Split

__all__ = ["PairedTile", "PairedTiles", "Split", "spread", "with_fold"]


@dataclass(frozen=True, kw_only=True)
class PairedTiles:
    """A validated folder of paired tiles."""

    folder: Path
    stains: tuple[str, ...]
    """In the order of the columns."""
    tiles: tuple[PairedTile, ...]

    @classmethod
    def load(cls, folder: Path | str, *, check: Check = "headers", mpp: float | None = None) -> PairedTiles:
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
        stains, tiles = read_table(folder / TILES_CSV, check=check, mpp=mpp)
        return cls(folder=folder, stains=stains, tiles=tiles)

    @property
    def parts(self) -> tuple[PairedTiles, ...]:
        """The folders that tiles come from: this one alone (:class:`~.mixed_tiles.MixedTiles` has several)."""
        return (self,)

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of the samples that each of ``parts`` gives."""
        return (1.0,)

    def split(self, split: Split) -> tuple[PairedTile, ...]:
        """The tiles of one split, in file order; may be empty."""
        return tuple(tile for tile in self.tiles if tile.split == split)

    def scored(self, split: Split) -> tuple[PairedTile, ...]:
        """Those of one split that can be scored: they have an image of every stain."""
        return tuple(tile for tile in self.split(split) if tile.has_images(self.stains))


def spread(rows: Sequence[PairedTile], count: int) -> tuple[PairedTile, ...]:
    """At most ``count`` rows, evenly spread over all of them: they stand slide by slide."""
    count = min(count, len(rows))
    return tuple(rows[number * len(rows) // count] for number in range(count))


def with_fold(tiles: PairedTiles, validated: Mapping[str, bool]) -> PairedTiles:
    """The same tiles with the splits of a fold (see :func:`~.folds.deal_fold`); the test split stays as it is."""

    def dealt(tile: PairedTile) -> PairedTile:
        if tile.split == "test":
            return tile
        return replace(tile, split="val" if validated[tile.patient_or_slide] else "train")

    return replace(tiles, tiles=tuple(map(dealt, tiles.tiles)))
