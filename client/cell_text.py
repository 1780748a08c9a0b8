"""Cells as the text of GeoJSON features, by a compiled loop: Python's formatting would cost as much as a cell's outline
and measurements together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from staindiffuser.imaging.compiled import compiled

__all__ = ["feature_texts"]

Bytes = NDArray[np.uint8]
Integers = NDArray[np.int64]
_PLACES = np.array([1, 1, 2, 4])
"""Decimal places of the numbers after the outline."""


def feature_texts(
    pieces: Sequence[bytes], points_Q2: NDArray[np.float64], ends: Integers, numbers_N4: NDArray[np.float64]
) -> bytes:
    """Write a feature per cell, with ``,\\n`` between them.

    Args:
        pieces: what stands before the cell's index (five hexadecimal digits), before its outline, before each of its
            four numbers, and at its end.
        points_Q2: corners of all outlines, not negative; written with one decimal place.
        ends: [N + 1]; the outline of cell n is ``points_Q2[ends[n]:ends[n + 1]]``.
        numbers_N4: not negative; written with one, one, two and four decimal places.
    """
    joined = np.frombuffer(b"".join(pieces), np.uint8)
    cuts = np.cumsum([0, *map(len, pieces)])
    points = np.rint(points_Q2 * 10).astype(np.int64)
    numbers = np.rint(numbers_N4 * 10.0**_PLACES).astype(np.int64)
    # A number takes at most 20 bytes: int64 has 19 digits.
    text = np.empty(len(numbers) * (len(joined) + 7 + 4 * 20) + len(points) * 43, np.uint8)
    end = _write(text, joined, cuts, points, ends, numbers, _PLACES)
    return text[:end].tobytes()


@compiled
def _write(
    text: Bytes, pieces: Bytes, cuts: Integers, points: Integers, ends: Integers, numbers: Integers, places: Integers
) -> int:
    """Returns how many bytes were written."""
    at = 0
    for cell in range(len(numbers)):
        if cell:
            text[at], text[at + 1] = 44, 10  # ,\n
            at += 2
        at = _copy(text, at, pieces, cuts[0], cuts[1])
        for digit in range(5):
            value = (cell >> (4 * (4 - digit))) & 15
            text[at] = 48 + value if value < 10 else 87 + value
            at += 1
        at = _copy(text, at, pieces, cuts[1], cuts[2])
        for point in range(ends[cell], ends[cell + 1]):
            if point > ends[cell]:
                text[at] = 44
                at += 1
            text[at] = 91  # [
            at = _decimal(text, at + 1, points[point, 0], 1)
            text[at] = 44
            at = _decimal(text, at + 1, points[point, 1], 1)
            text[at] = 93  # ]
            at += 1
        for column in range(4):
            at = _copy(text, at, pieces, cuts[2 + column], cuts[3 + column])
            at = _decimal(text, at, numbers[cell, column], places[column])
        at = _copy(text, at, pieces, cuts[6], cuts[7])
    return at


@compiled
def _copy(text: Bytes, at: int, pieces: Bytes, first: int, end: int) -> int:
    text[at : at + end - first] = pieces[first:end]
    return at + end - first


@compiled
def _decimal(text: Bytes, at: int, value: int, places: int) -> int:
    """Write a number of so many decimal places, which ``value`` counts in units of the last."""
    length, rest = 1, value // 10
    while rest or length <= places:
        length, rest = length + 1, rest // 10
    last = at + length  # one more, for the point
    for place in range(length):
        if place == places:
            text[last] = 46
            last -= 1
        text[last] = 48 + value % 10
        value //= 10
        last -= 1
    return at + length + 1
