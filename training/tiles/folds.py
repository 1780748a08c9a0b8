"""Cross-validation: patients dealt to folds, one of which is validated on."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from staindiffuser.errors import UsageError
from staindiffuser.training.errors import DataError
from staindiffuser.training.tiles.tile import PairedTile

__all__ = ["Fold", "deal_fold"]


@dataclass(frozen=True, kw_only=True)
class Fold:
    """One of the parts of a cross-validation."""

    number: int
    """From 1."""
    of: int

    @classmethod
    def parse(cls, text: str) -> Fold:
        """From text such as ``2/5``.

        Raises:
            UsageError: it is none.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        number, of = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 1 <= number <= of or of < 2:
            raise UsageError(f"--fold {text}: give the fold and the number of folds, such as 2/5")
        return cls(number=number, of=of)

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


def deal_fold(tiles: Iterable[PairedTile], fold: Fold) -> dict[str, bool]:
    """Which patients a fold is validated on; the others it is trained on.

    Patients of the splits ``train`` and ``val`` are dealt, the largest first, each to the fold that has the fewest
    tiles so far: every patient is validated on in exactly one fold, and the folds are about equally large. Tiles
    without a patient count as one patient per slide. The test split stays apart.

    Returns:
        :attr:`PairedTile.patient_or_slide` to whether the fold is validated on it.

    Raises:
        DataError: there are fewer patients than folds.
    """
    tiles = tuple(tiles)
    counts = Counter(tile.patient_or_slide for tile in tiles if tile.split != "test")
    if len(counts) < fold.of:
        where = f"{tiles[0].file}: " if tiles else ""
        raise DataError(
            f"{where}{len(counts)} patients (or slides) cannot be dealt to {fold.of} folds: use fewer folds"
        )
    sizes = [0] * fold.of
    validated = {}
    # By hash where equally large: names often run with time or hospital.
    for unit in sorted(counts, key=lambda unit: (-counts[unit], hashlib.sha256(unit.encode()).digest())):
        chosen = sizes.index(min(sizes))
        sizes[chosen] += counts[unit]
        validated[unit] = chosen == fold.number - 1
    return validated
