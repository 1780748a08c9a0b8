"""Where blocks of one image lie in another, and the affine that most of them agree on.

Every textured block of the fixed image is searched for in the moving one, around where the current guess puts it
(normalised correlation, OpenCV). The blocks answer independently, so their agreement is evidence: a wrong guess
scatters the answers over the search window. After Ourselin et al., "Block matching: a general framework to improve
robustness of rigid registration of medical images", MICCAI 2000.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from staindiffuser.imaging.arrays import BoolArray, FloatArray

__all__ = ["BlockSearch", "Blocks", "fit_affine", "match_blocks"]

Affine = npt.NDArray[np.float64]
Points = npt.NDArray[np.float64]

FEWEST = 12
"""No affine is fitted to fewer blocks than this."""
LEAST_TISSUE = 0.6
"""Share of a block that must be tissue, in both images."""
_BESIDE = 6
"""Half the side of a peak's own neighbourhood, in which no second peak is looked for, pixels."""


@dataclass(frozen=True, kw_only=True)
class BlockSearch:
    """How blocks are searched for; all in pixels."""

    half: int
    """Half the side of a block."""
    reach: int
    """How far from the guess to search."""
    step: int
    """Distance between blocks."""


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """The blocks found; n of them."""

    centres: Points
    """[n, 2] (x, y) in the fixed image, pixels; 0 is the centre of the first pixel."""
    shifts: Points
    """[n, 2], displacement from where the guess puts them, pixels."""
    weights: npt.NDArray[np.float64]
    """[n], the peak's correlation times its height above the second peak."""

    def __len__(self) -> int:
        return len(self.centres)

    def agreement(self, tolerance: float) -> float:
        """Share of the blocks found within ``tolerance`` pixels of the guess; 0 without blocks."""
        if not len(self):
            return 0.0
        return float((np.hypot(*self.shifts.T) < tolerance).mean())


def match_blocks(
    fixed: FloatArray, moving: FloatArray, fixed_tissue: BoolArray, moving_tissue: BoolArray, search: BlockSearch
) -> Blocks:
    """Search for blocks of ``fixed`` in ``moving``, which the current guess has brought onto the same grid.

    Args:
        fixed, moving: band-passed images [H, W].
        fixed_tissue, moving_tissue: [H, W]; blocks that are not tissue in both are left out.
        search: sizes.
    """
    height, width = fixed.shape
    half, reach = search.half, search.reach
    tissue = [np.asarray(cv2.integral(mask.astype(np.uint8)), np.int32) for mask in (fixed_tissue, moving_tissue)]
    enough = LEAST_TISSUE * (2 * half) ** 2
    found = []
    for y in range(half, height - half + 1, search.step):
        for x in range(half, width - half + 1, search.step):
            if any(_sum(table, x - half, y - half, x + half, y + half) < enough for table in tissue):
                continue
            left, top = max(0, x - half - reach), max(0, y - half - reach)
            window = moving[top : min(height, y + half + reach), left : min(width, x + half + reach)]
            block = fixed[y - half : y + half, x - half : x + half]
            similarity = np.asarray(cv2.matchTemplate(window, block, cv2.TM_CCOEFF_NORMED), np.float32)
            _, peak, _, (column, row) = cv2.minMaxLoc(similarity)
            if peak <= 0 or column in (0, similarity.shape[1] - 1) or row in (0, similarity.shape[0] - 1):
                continue  # a maximum on the window's edge is no peak
            shift_x = column + _between(similarity[row, column - 1 : column + 2]) - (x - half - left)
            shift_y = row + _between(similarity[row - 1 : row + 2, column]) - (y - half - top)
            similarity[max(0, row - _BESIDE) : row + _BESIDE + 1, max(0, column - _BESIDE) : column + _BESIDE + 1] = -1
            found.append((x - 0.5, y - 0.5, shift_x, shift_y, peak * (peak - max(0.0, float(similarity.max())))))
    table = np.array(found, np.float64).reshape(-1, 5)
    return Blocks(centres=table[:, :2], shifts=table[:, 2:4], weights=table[:, 4])


def fit_affine(blocks: Blocks, *, tolerance: float) -> Affine | None:
    """The affine [2, 3], fixed to guess, that most blocks agree on: RANSAC, then reweighted least squares.

    Args:
        blocks: what was found.
        tolerance: distance in pixels within which a block agrees.

    Returns:
        None where there are too few blocks.
    """
    if len(blocks) < FEWEST:
        return None
    centres, targets = blocks.centres, blocks.centres + blocks.shifts
    start, agreeing = cv2.estimateAffine2D(
        centres.astype(np.float32),
        targets.astype(np.float32),
        method=cv2.RANSAC,
        ransacReprojThreshold=tolerance,
        maxIters=5000,
        confidence=0.999,
    )
    if start is None or int(agreeing.sum()) < FEWEST // 2:
        return None
    centroid = centres.mean(axis=0)
    design = np.column_stack([centres - centroid, np.ones(len(centres))])
    solution = np.vstack([start[:, :2].T, start[:, 2] + start[:, :2] @ centroid])
    inside = agreeing[:, 0] > 0
    for _ in range(20):
        distance = np.hypot(*(design @ solution - targets).T)
        spread = max(1.5, 1.4826 * float(np.median(distance[inside])))
        # Geman–McClure weights: blocks far from the rest count for nothing.
        weight = np.sqrt((blocks.weights + 1e-4) / (1 + (distance / spread) ** 2) ** 2)[:, None]
        solution = np.linalg.lstsq(design * weight, targets * weight, rcond=None)[0]
    linear = solution[:2].T
    return np.column_stack([linear, solution[2] - linear @ centroid])


def _sum(table: npt.NDArray[np.int32], x0: int, y0: int, x1: int, y1: int) -> int:
    return int(table[y1, x1]) - int(table[y0, x1]) - int(table[y1, x0]) + int(table[y0, x0])


def _between(three: FloatArray) -> float:
    """Position of the peak of a parabola through three values, relative to the second, −0.5 to 0.5 pixels."""
    left, centre, right = (float(value) for value in three)
    curvature = left - 2 * centre + right
    return max(-0.5, min(0.5, 0.5 * (left - right) / curvature)) if curvature < 0 else 0.0
