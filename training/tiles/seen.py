"""What a checkpoint was trained on, so that nobody scores it there unawares: content of the H&E, slides, patients."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from staindiffuser.imaging.image_files import read_image
from staindiffuser.training.tiles.copies import is_blank, pixel_hash
from staindiffuser.training.tiles.tile import PairedTile

__all__ = ["SEEN_JSON", "SeenTiles"]

SEEN_JSON = "trained_on.json"


@dataclass(frozen=True, kw_only=True)
class SeenTiles:
    """The tiles that weights have learnt from, over all runs that led to them."""

    he: frozenset[str]
    """:func:`pixel_hash` of each H&E that shows something; a copy under another name or format has the same."""
    slides: frozenset[str]
    patients: frozenset[str]

    @classmethod
    def of(cls, tiles: Sequence[PairedTile]) -> Self:
        """Of training tiles.

        Raises:
            ImageError: one cannot be read.
        """
        with ThreadPoolExecutor(8) as pool:
            hashes = frozenset(pool.map(_hash, (tile.he for tile in tiles)))
        return cls(
            he=hashes - {""},
            slides=frozenset(tile.slide for tile in tiles),
            patients=frozenset(tile.patient for tile in tiles if tile.patient),
        )

    def __or__(self, other: SeenTiles | None) -> SeenTiles:
        if other is None:
            return self
        return SeenTiles(
            he=self.he | other.he, slides=self.slides | other.slides, patients=self.patients | other.patients
        )

    def overlap(self, tiles: Sequence[PairedTile]) -> dict[str, int]:
        """How many of the tiles are among these, by content, by slide and by patient.

        Raises:
            ImageError: one cannot be read.
        """
        with ThreadPoolExecutor(8) as pool:
            return {
                "tiles": sum(value in self.he for value in pool.map(_hash, (tile.he for tile in tiles))),
                "of its slides": sum(tile.slide in self.slides for tile in tiles),
                "of its patients": sum(tile.patient in self.patients for tile in tiles),
            }

    def to_json(self) -> str:
        """For :data:`SEEN_JSON`."""
        data = {"he": sorted(self.he), "slides": sorted(self.slides), "patients": sorted(self.patients)}
        return json.dumps(data, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """None where a checkpoint does not say.

        Raises:
            ValueError: the file is damaged.
        """
        if not path.is_file():
            return None
        data = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{name: _strings(data[name]) for name in ("he", "slides", "patients")})


def _strings(values: Iterable[object]) -> frozenset[str]:
    return frozenset(str(value) for value in values)


def _hash(path: Path) -> str:
    """Empty for an image of one colour: two tiles of glass may well be equal."""
    image = read_image(path)
    return "" if is_blank(image) else pixel_hash(image)
