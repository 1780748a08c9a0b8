"""The outer outlines of the regions of a label image, all traced at once, step by step.

An outline runs clockwise along the sides of the region's pixels. A side has the number 4 × pixel + direction; the
directions are east (along the top side), south, west, north. The pixel ahead (``a``) and the one ahead to the left
(``b``) determine the next side: around the corner of the same pixel, straight on, or around the corner of ``b``.
Regions must be connected by sides, as those of watershed are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Outlines", "follow_outlines"]

EVERY = 3
"""The midpoint of every third side: at most half a pixel off, in a third of the bytes."""
_MIDPOINT_X = np.array([0.5, 1.0, 0.5, 0.0])
_MIDPOINT_Y = np.array([0.0, 0.5, 1.0, 0.5])


@dataclass(frozen=True, kw_only=True)
class Outlines:
    """Closed outlines, one after the other."""

    points: NDArray[np.float64]
    """[Q, 2] x, y; pixel 0 extends from 0 to 1. The last point of an outline is its first."""
    ends: NDArray[np.int64]
    """[N + 1]; outline n is ``points[ends[n]:ends[n + 1]]``."""

    @classmethod
    def none(cls) -> Outlines:
        """No outlines."""
        return cls(points=np.zeros((0, 2)), ends=np.zeros(1, np.int64))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, number: int) -> NDArray[np.float64]:
        return self.points[self.ends[number] : self.ends[number + 1]]

    def moved(self, xy_N2: NDArray[np.float64]) -> Outlines:
        """Each outline displaced by its own x, y."""
        return Outlines(points=self.points + np.repeat(xy_N2, np.diff(self.ends), axis=0), ends=self.ends)


def follow_outlines(
    images: Sequence[NDArray[np.int32]], wanted_N: NDArray[np.int32], first_N: NDArray[np.intp]
) -> Outlines:
    """Trace the outlines of some regions.

    Args:
        images: label images [H, W] of the same width, one below the other with a row between; 0 is no region.
        wanted_N: labels of the regions to trace.
        first_N: flat index of each one's first pixel in reading order, whose top side is part of the outline; rows
            between the images do not count in it, but do in the outlines.
    """
    if not len(wanted_N):
        return Outlines.none()
    width = images[0].shape[1] + 2
    heights = [len(image) for image in images]
    tops = np.cumsum([1, *(height + 1 for height in heights)])
    stacked = np.zeros((int(tops[-1]), width), np.int32)
    for image, top in zip(images, tops, strict=False):
        stacked[top : top + len(image), 1:-1] = image
    padded = stacked.ravel()
    kind: Any = np.int32 if padded.size < 2**29 else np.int64
    ahead = np.array([1, width, -1, -width], kind)
    # By direction: the pixel ahead, and the one ahead to the left, as differences of sides, and the turns.
    straight, around = 4 * ahead, 4 * (ahead + np.roll(ahead, 1)) + np.array([3, -1, -1, -1], kind)
    corner = np.array([1, 1, 1, -3], kind)
    row, column = np.divmod(np.asarray(first_N, kind), width - 2)
    row += 1 + np.searchsorted(np.cumsum(heights), row, side="right").astype(kind)
    start = (4 * (row * width + column + 1)).astype(kind)
    label = np.asarray(wanted_N, np.int32)
    side: NDArray[Any] = start
    begin, index = start, np.arange(len(start), dtype=kind)
    passed: list[tuple[NDArray[Any], NDArray[Any]]] = []
    steps = 0
    count = np.zeros(len(start), np.int64)
    while len(index):
        if steps % EVERY == 0:
            passed.append((side, index))
        steps += 1
        direction = side & 3
        forward = side + straight.take(direction)
        turn = side + around.take(direction)
        side = np.where(
            padded.take(forward >> 2) != label,
            side + corner.take(direction),
            np.where(padded.take(turn >> 2) != label, forward, turn),
        )
        unfinished = side != begin
        if not unfinished.all():
            count[index[~unfinished]] = steps
            side, begin, index, label = side[unfinished], begin[unfinished], index[unfinished], label[unfinished]
    lengths = -(-count // EVERY)
    ends = np.concatenate([[0], np.cumsum(lengths + 1)])
    sides: NDArray[Any] = np.empty(int(ends[-1]), kind)
    for number, (some, owners) in enumerate(passed):
        sides[ends[owners] + number] = some
    sides[ends[1:] - 1] = start
    pixel, direction = sides >> 2, sides & 3
    y, x = np.divmod(pixel, width)
    points = np.stack([x - 1 + _MIDPOINT_X.take(direction), y - 1 + _MIDPOINT_Y.take(direction)], axis=-1)
    return Outlines(points=points, ends=ends)
