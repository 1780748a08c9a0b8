"""The outer outlines of the regions of a label image.

An outline runs clockwise along the sides of the region's pixels. The directions are east (along a pixel's top side),
south, west, north. The pixel ahead and the one ahead to the left determine the next side: around the corner of the same
pixel, straight on, or around the corner of the pixel ahead to the left. Regions must be connected by sides, as those of
watershed are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from staindiffuser.imaging.compiled import compiled

__all__ = ["Outlines", "follow_outlines"]

EVERY = 3
"""The midpoint of every third side: at most half a pixel off, in a third of the bytes."""


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


def follow_outlines(
    labels_HW: NDArray[np.int32], wanted_N: NDArray[np.int32], first_N: NDArray[np.int64], areas_N: NDArray[np.int64]
) -> Outlines:
    """Trace the outlines of some regions.

    Args:
        labels_HW: label image with a frame of zeros, one pixel wide, that the outlines' coordinates do not count.
        wanted_N: labels of the regions to trace.
        first_N: flat index of each one's first pixel in reading order, whose top side is part of the outline.
        areas_N: of each one, pixels.
    """
    # A region of n pixels has at most 2 n + 2 sides.
    points, ends = _follow(labels_HW, wanted_N, first_N, int(((2 * areas_N + 2) // EVERY + 2).sum()))
    return Outlines(points=points, ends=ends)


@compiled
def _follow(
    labels_HW: NDArray[np.int32], wanted_N: NDArray[np.int32], first_N: NDArray[np.int64], most: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    width = labels_HW.shape[1]
    labels = labels_HW.ravel()
    ahead = np.array([1, width, -1, -width])
    to_left = np.array([1 - width, 1 + width, width - 1, -1 - width])  # ahead to the left
    middle_x, middle_y = np.array([-0.5, 0.0, -0.5, -1.0]), np.array([-1.0, -0.5, 0.0, -0.5])
    points, ends = np.empty((most, 2)), np.zeros(len(wanted_N) + 1, np.int64)
    end = 0
    for number in range(len(wanted_N)):
        label, start = wanted_N[number], first_N[number]
        begin, pixel, direction, steps = end, start, 0, 0
        while True:
            if steps % EVERY == 0:
                points[end, 0] = pixel % width + middle_x[direction]
                points[end, 1] = pixel // width + middle_y[direction]
                end += 1
            steps += 1
            if labels[pixel + ahead[direction]] != label:
                direction = (direction + 1) & 3
            elif labels[pixel + to_left[direction]] != label:
                pixel += ahead[direction]
            else:
                pixel += to_left[direction]
                direction = (direction - 1) & 3
            if pixel == start and direction == 0:
                break
        points[end] = points[begin]
        end += 1
        ends[number + 1] = end
    return points[:end].copy(), ends
