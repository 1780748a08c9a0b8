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

    Slides are dealt by the hash of their name: the same slides on every machine.

    Raises:
        DataError: a slide is in two splits, or there are too few slides to deal.
    """
    splits: dict[str, Split] = {}
    first: dict[str, Pair] = {}
    for pair in pairs:
        split: Split = "train" if resplit or pair.split is None else pair.split
        other = first.setdefault(pair.slide, pair)
        if splits.setdefault(pair.slide, split) != split:
            raise DataError(
                f"{pair.he.path}: slide {pair.slide!r} is in split {split!r} here and in {splits[pair.slide]!r} with "
                f"{other.he.path}; use --resplit to deal whole slides anew, or --slide-pattern if it is another slide"
            )
    train = [slide for slide, split in splits.items() if split == "train"]
    train.sort(key=lambda slide: hashlib.sha256(slide.encode()).digest())
    count = len(train)
    wanted: tuple[tuple[Split, float], ...] = (("val", val_share), ("test", test_share))
    for split, share in wanted:
        if share > 0 and split not in splits.values():
            take = max(1, round(share * count))
            if take >= len(train):
                raise DataError(
                    f"{pairs[0].he.path.parent}: too few slides ({count}) to take {split!r} from: all tiles of a slide "
                    f"belong to one split; add slides, or use --{split}-share 0"
                )
            splits.update(dict.fromkeys(train[:take], split))
            del train[:take]
    return splits
