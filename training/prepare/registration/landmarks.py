"""Landmarks of a pair of sections, and the target registration error they give.

Files in the layout of the ANHIR challenge: CSV with the columns (unnamed index), X and Y, in pixels of level 0; points
of two files belong together by their index. The error is relative: the distance after registration as a share of the
target image's diagonal (Borovec et al., "ANHIR: automatic non-rigid histological image registration challenge",
IEEE TMI 2020).
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from staindiffuser.training.errors import DataError

__all__ = ["TargetError", "read_landmarks", "read_pair", "target_error"]

Points = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class TargetError:
    """Relative target registration error of the landmarks."""

    median: float
    """Share of the diagonal."""
    maximum: float
    """Share of the diagonal."""
    before: float
    """Median without registration."""
    landmarks: int


def read_landmarks(path: Path) -> dict[str, tuple[float, float]]:
    """Index to (x, y), pixels.

    Raises:
        DataError: naming the file and the row.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as landmarks: {error}") from error
    if not rows or [name.strip().lower() for name in rows[0][-2:]] != ["x", "y"] or len(rows[0]) != 3:
        raise DataError(f"{path}: landmarks are CSV with three columns, an index, X and Y, and a first row saying so")
    points: dict[str, tuple[float, float]] = {}
    for number, row in enumerate(rows[1:], start=2):
        try:
            index, x, y = row[0].strip(), float(row[1]), float(row[2])
        except (IndexError, ValueError):
            raise DataError(f"{path}, row {number}: expected an index and two numbers, not {','.join(row)!r}") from None
        if not np.isfinite([x, y]).all() or index in points:
            raise DataError(f"{path}, row {number}: index {index!r} appears twice or its coordinates are not numbers")
        points[index] = (x, y)
    return points


def read_pair(he: Path, ihc: Path) -> tuple[Points, Points]:
    """Corresponding landmarks of two files, [n, 2] each, in pixels.

    Raises:
        DataError: a file cannot be read, or no index is in both.
    """
    fixed, moving = read_landmarks(he), read_landmarks(ihc)
    common = [index for index in fixed if index in moving]
    if not common:
        raise DataError(f"{he} and {ihc} have no landmark in common: points belong together by the index, column 1")
    return np.array([fixed[index] for index in common]), np.array([moving[index] for index in common])


def target_error(found: Points, true: Points, start: Points, diagonal: float) -> TargetError:
    """The error of landmarks that were registered.

    Args:
        found: the H&E landmarks mapped to the IHC slide, [n, 2].
        true: the landmarks of the IHC slide.
        start: the H&E landmarks without registration.
        diagonal: of the IHC slide, in the same unit.
    """
    error, before = (np.hypot(*(points - true).T) / diagonal for points in (found, start))
    return TargetError(
        median=float(np.median(error)),
        maximum=float(error.max()),
        before=float(np.median(before)),
        landmarks=len(error),
    )
