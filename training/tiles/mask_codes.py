"""What the values of a set of masks mean: decided over the whole set, never mask by mask.

A mask of zeros and ones, or of cell labels, looks like an empty one to a reader that expects values up to 255.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from skimage.measure import label

from staindiffuser.imaging.arrays import BoolArray, UInt8Array
from staindiffuser.training.errors import DataError

__all__ = ["MASK_CODES", "MaskCode", "MaskSurvey", "as_coarse", "is_positive"]

MaskCode = Literal["grey", "ones", "labels"]
"""``grey``: 0 is negative and 255 positive, as coarse masks have it, soft edges or not. ``ones``: 1 is positive.
``labels``: 0 is negative, every other value is a cell of its own."""
MASK_CODES: tuple[MaskCode, ...] = get_args(MaskCode)

_FLAT = 0.4
"""Share of the pixels between 0 and 255 that equal their right and lower neighbours, from which the values are codes,
not grey levels: cells of labels reach 0.6, soft edges 0.1 (ours)."""
_PARTS = 1.25
"""Connected parts per value and mask up to which the values are labels: a label is one cell, at times cut in two."""


class MaskSurvey:
    """Collects what is needed to tell a set's code; :meth:`add` every mask, then ask for :meth:`code`."""

    def __init__(self) -> None:
        self._pixels = np.zeros(256, np.int64)
        self._between, self._flat, self._parts, self._values = 0, 0, 0, 0

    def add(self, mask: UInt8Array) -> None:
        """Take a mask, uint8 [H, W], into account."""
        counts = np.bincount(mask.ravel(), minlength=256)
        self._pixels += counts
        if not counts[1:255].any():
            return
        inner = mask[:-1, :-1]
        between = (inner > 0) & (inner < 255)
        flat = int((between & (inner == mask[1:, :-1]) & (inner == mask[:-1, 1:])).sum())
        total = int(between.sum())
        self._between, self._flat = self._between + total, self._flat + flat
        if flat >= _FLAT * total:
            self._values += int((counts[1:] > 0).sum())
            self._parts += int(label(mask, background=0).max())

    @property
    def values(self) -> list[int]:
        """The values that occur."""
        return [int(value) for value in np.nonzero(self._pixels)[0]]

    @property
    def empty(self) -> bool:
        """Whether no pixel of any mask is above 0."""
        return not self._pixels[1:].any()

    def code(self, what: str) -> MaskCode:
        """The code of the set.

        Args:
            what: names the masks, for the error's text.

        Raises:
            DataError: the values are neither 0 and 1, nor 0 and 255, nor labels, nor grey levels.
        """
        values = self.values
        if self.empty or set(values) <= {0, 255}:
            return "grey"
        if set(values) <= {0, 1}:
            return "ones"
        if self._flat < _FLAT * self._between and values[-1] >= 128:
            return "grey"
        if 0 in values and self._flat >= _FLAT * self._between and self._parts <= _PARTS * self._values:
            return "labels"
        shown = ", ".join(map(str, values[:6])) + (f", … {values[-1]}" if len(values) > 6 else "")
        raise DataError(
            f"{what} hold the values {shown}: that is neither 0 and 1, nor 0 and 255, nor one label per cell; "
            "convert them to 0 (negative) and 255 (positive)"
        )


def is_positive(mask: UInt8Array, code: MaskCode) -> BoolArray:
    """Where a mask is positive: uint8 [H, W] to bool."""
    positive: BoolArray = mask >= (128 if code == "grey" else 1)
    return positive


def as_coarse(mask: UInt8Array, code: MaskCode) -> UInt8Array:
    """A mask of any code with 0 for negative and 255 for positive; soft edges stay: uint8 [H, W]."""
    return mask if code == "grey" else np.where(is_positive(mask, code), np.uint8(255), np.uint8(0))
