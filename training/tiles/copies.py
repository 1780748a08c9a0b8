"""The same image more than once in a set of tiles, whatever its files are called."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from staindiffuser.files import file_sha256
from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.image_files import read_image
from staindiffuser.training.errors import DataError

__all__ = ["Located", "check_no_leak", "copies_of_files", "group_copies", "is_blank", "pixel_hash"]

_BLANK = 3.0
"""Standard deviation, grey levels, below which an image shows nothing: two tiles of glass may well be equal."""


@dataclass(frozen=True, kw_only=True)
class Located:
    """An H&E image and where it belongs."""

    image: Path
    where: str
    """For the error's text: the file and the row that name it."""
    slide: str
    split: str


def is_blank(rgb: UInt8Array) -> bool:
    """Whether an image shows nothing but one colour: uint8 [H, W, 3]."""
    return float(rgb.std(axis=(0, 1)).max()) < _BLANK


def pixel_hash(rgb: UInt8Array) -> str:
    """A digest of an image's pixels, the same for every encoding: uint8 [H, W, C]."""
    return hashlib.blake2b(repr(rgb.shape).encode() + np.ascontiguousarray(rgb).tobytes(), digest_size=16).hexdigest()


def copies_of_files(images: Iterable[Located]) -> list[tuple[Located, ...]]:
    """Groups of images whose files hold the same bytes; blank ones are left out.

    Only files of equal size are read.
    """
    by_size: dict[int, list[Located]] = defaultdict(list)
    for image in images:
        by_size[image.image.stat().st_size].append(image)
    candidates = [image for group in by_size.values() if len(group) > 1 for image in group]
    return group_copies((file_sha256(image.image), image) for image in candidates)


def group_copies(keyed: Iterable[tuple[str, Located]]) -> list[tuple[Located, ...]]:
    """Groups of images with equal keys, such as their :func:`pixel_hash`; blank ones are left out."""
    groups: dict[str, list[Located]] = defaultdict(list)
    for key, image in keyed:
        groups[key].append(image)
    return [tuple(group) for group in groups.values() if len(group) > 1 and not is_blank(read_image(group[0].image))]


def check_no_leak(groups: Iterable[Sequence[Located]]) -> None:
    """Refuse copies of an image in two splits.

    Raises:
        DataError: naming both.
    """
    for first, *others in groups:
        for other in others:
            if other.split != first.split:
                raise DataError(
                    f"{other.where}{other.image} (slide {other.slide!r}, split {other.split!r}) is the same image as "
                    f"{first.where}{first.image} (slide {first.slide!r}, split {first.split!r}): keep one of them, or "
                    "put both slides into one split"
                )
