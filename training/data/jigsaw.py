"""Tissue put together anew from pieces of a few cells, so that its architecture says nothing of what they are.

Epithelium of one organ lies in glands, of another in nests or sheets, and a network that has seen one organ's long
enough takes the gland for the cell (cf. Noroozi and Favaro 2016, arXiv 1603.09246; Brendel and Bethge 2019, arXiv
1904.00760). What is left in a piece is the cell: its nucleus, its cytoplasm and their size.
"""

from __future__ import annotations

from collections.abc import Mapping

import cv2
import numpy as np
from numpy.typing import NDArray

from staindiffuser.imaging.arrays import BoolArray, UInt8Array

__all__ = ["jigsaw"]

PITCH = (14, 44)
"""Distance between the middles of pieces, pixels: from a lymphocyte to a few cells of a gland, at 0.5 µm."""
NEST = (8.0, 40.0)
"""Standard deviation of the Gaussian that the outlines of nests are cut from, pixels."""
WOBBLE, WOBBLE_SCALE = 8.0, 3.0
"""How far, and how finely, the edges of pieces are bent, pixels."""
FEWEST = 200
"""Pixels of either kind below which there are no nests."""


def jigsaw(arrays: Mapping[str, UInt8Array], cells: BoolArray, rng: np.random.Generator) -> dict[str, UInt8Array]:
    """Cut a crop into pieces and fill each from another place of the crop, turned at random.

    Pieces that come from ``cells`` lie together in nests, as those of a carcinoma do, and those from elsewhere around
    them; where there are hardly any, pieces lie anywhere.

    Args:
        arrays: uint8 [H, W] or [H, W, 3], of one size.
        cells: [H, W], those of one kind.
    """
    height, width = cells.shape
    middles = _middles(height, width, rng)
    sources = rng.uniform((0, 0), (height, width), middles.shape)
    here, elsewhere = np.argwhere(cells), np.argwhere(~cells)
    if min(len(here), len(elsewhere)) >= FEWEST:
        ground = _smooth(height, width, rng.uniform(*NEST), rng)[tuple(middles.T)]
        nested = ground > np.quantile(ground, rng.uniform(0.2, 0.8))
        sources = np.where(
            nested[:, None],
            here[rng.integers(len(here), size=len(middles))],
            elsewhere[rng.integers(len(elsewhere), size=len(middles))],
        )
    piece = _nearest(middles, height, width, rng)
    angle = rng.uniform(0, 2 * np.pi, len(middles))[piece]
    rows, columns = (
        grid - middles[piece, axis] for axis, grid in enumerate(np.mgrid[:height, :width].astype(np.float32))
    )
    row = sources[piece, 0] + np.cos(angle) * rows - np.sin(angle) * columns
    column = sources[piece, 1] + np.sin(angle) * rows + np.cos(angle) * columns
    return {
        name: np.asarray(
            cv2.remap(
                array,
                column.astype(np.float32),
                row.astype(np.float32),
                cv2.INTER_CUBIC if array.ndim == 3 else cv2.INTER_LINEAR,
                borderMode=cv2.BORDER_REFLECT_101,
            ),
            np.uint8,
        )
        for name, array in arrays.items()
    }


def _middles(height: int, width: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """One point in every square of a grid, (row, column) [N, 2]."""
    pitch = int(rng.integers(*PITCH))
    corners = np.mgrid[:height:pitch, :width:pitch].reshape(2, -1).T
    return np.minimum(corners + rng.integers(0, pitch, corners.shape), (height - 1, width - 1))


def _nearest(middles: NDArray[np.int64], height: int, width: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """The number of the middle that a pixel belongs to, [H, W]: the nearest one's, but for bent edges."""
    away = np.ones((height, width), np.uint8)
    away[tuple(middles.T)] = 0
    _, labels = cv2.distanceTransformWithLabels(away, cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL)
    number = np.zeros(int(labels.max()) + 1, np.int64)
    number[labels[tuple(middles.T)]] = np.arange(len(middles))
    bent = [
        np.clip(np.rint(grid + WOBBLE * _smooth(height, width, WOBBLE_SCALE, rng)), 0, side - 1).astype(np.int64)
        for grid, side in zip(np.mgrid[:height, :width], (height, width), strict=True)
    ]
    piece: NDArray[np.int64] = number[np.asarray(labels)[bent[0], bent[1]]]
    return piece


def _smooth(height: int, width: int, scale: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Gaussian noise of mean 0, smoothed, [H, W]."""
    return np.asarray(
        cv2.GaussianBlur(rng.standard_normal((height, width), dtype=np.float32), (0, 0), scale), np.float32
    )
