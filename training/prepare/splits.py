"""Deal whole slides to splits."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from staindiffuser.training.errors import DataError
from staindiffuser.training.prepare.layouts import Pair
from staindiffuser.training.tiles.tile import Split

__all__ = ["deal_splits"]


def deal_splits(
    pairs: Sequence[Pair], *, val_share: float, test_share: float, resplit: bool = False
) -> dict[str, Split]:
    """Each slide's split: the source's, and where it has no val (or test), a share of its training slides.

    Patients, or where none are named slides, are dealt by the hash of their name: the same on every machine.

    Raises:
        DataError: a slide or a patient is in two splits, a slide is of two patients, or there are too few to deal.
    """
    splits: dict[str, Split] = {}
    first: dict[str, Pair] = {}
    patients: dict[str, str | None] = {}
    for pair in pairs:
        if patients.setdefault(pair.slide, pair.patient) != pair.patient:
            raise DataError(
                f"{pair.he.path}: slide {pair.slide!r} is of patient {pair.patient!r} here and of "
                f"{patients[pair.slide]!r} elsewhere; check --patient-pattern and --slide-pattern"
            )
        split: Split = "train" if resplit or pair.split is None else pair.split
        unit = _unit(pair)
        other = first.setdefault(unit, pair)
        if splits.setdefault(unit, split) != split:
            kind, name = ("slide", pair.slide) if pair.patient is None else ("patient", pair.patient)
            raise DataError(
                f"{pair.he.path}: {kind} {name!r} is in split {split!r} here and in {splits[unit]!r} with "
                f"{other.he.path}; use --resplit to deal whole {kind}s anew, or --{kind}-pattern if they differ"
            )
    train = [unit for unit, split in splits.items() if split == "train"]
    train.sort(key=lambda unit: hashlib.sha256(unit.encode()).digest())
    count = len(train)
    wanted: tuple[tuple[Split, float], ...] = (("val", val_share), ("test", test_share))
    for split, share in wanted:
        if share > 0 and split not in splits.values():
            take = max(1, round(share * count))
            if take >= len(train):
                kind = "slide" if pairs[0].patient is None else "patient"
                raise DataError(
                    f"{pairs[0].he.path.parent}: too few {kind}s ({count}) to take {split!r} from: all tiles of a "
                    f"{kind} belong to one split; add {kind}s, or use --{split}-share 0"
                )
            splits.update(dict.fromkeys(train[:take], split))
            del train[:take]
    return {pair.slide: splits[_unit(pair)] for pair in pairs}


def _unit(pair: Pair) -> str:
    return pair.slide if pair.patient is None else pair.patient
