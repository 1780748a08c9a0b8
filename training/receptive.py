"""How far context reaches: the receptive radius of the architecture, and the effective one, which is measured."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from staindiffuser.training.config import LEVELS, ModelConfig
from staindiffuser.training.infer import stain_tiles
from staindiffuser.training.model.network import DualDiffusion
from staindiffuser.training.model.pretrained import lite0_radius

__all__ = ["default_margin", "effective_radius", "theoretical_radius"]

ORIGIN_MULTIPLE = 2**LEVELS
LARGEST_OVERHEAD = 1.8
"""(tile / (tile − 2 margin))² at most: how much work a margin may cost (docs/explanation/model.md)."""

QUANTILE = 0.99
"""Share of a column's values that must not depend on context (ours)."""


def theoretical_radius(model: ModelConfig) -> int:
    """Largest distance at which an input pixel can reach an output pixel, pixels.

    The longest path runs down the encoder, across the coarsest level and up a branch. A 3x3 convolution at level l
    reaches 2^(l+1) pixels; a step down reaches at most one pixel of the coarser level.
    """
    pixel = [2 ** (level + 1) for level in range(LEVELS)]
    blocks = {"encoder": model.encoder.blocks, "branch": max(model.image.blocks, model.cells.blocks)}
    down = pixel[0] + sum(2 * blocks["encoder"] * p for p in pixel) + pixel[-1]
    if model.backbone != "none":
        down = max(down, lite0_radius() + pixel[-1])
    across = 2 * blocks["branch"] * pixel[-1]
    up = sum(2 * blocks["branch"] * p for p in pixel[:-1]) + pixel[0]
    return int(down + across + up)


def effective_radius(
    network: DualDiffusion, he: NDArray[np.uint8], *, sigmas: tuple[float, ...], threshold: float = 1.0
) -> int:
    """Depth, in pixels, beyond which cutting the context away changes the result by at most ``threshold`` grey levels.

    Each image is stained whole and with its left part missing; columns are judged by the 99 % quantile of their
    absolute difference, over all stains and cell maps. Not by the mean, which hides what shows between tiles: single
    cells that are decided by distant context.

    Args:
        he: uint8 [B, H, W, 3]; W at least four times the radius to be found.
    """
    width = he.shape[2]
    cut = width // 2 // ORIGIN_MULTIPLE * ORIGIN_MULTIPLE
    seeds = np.arange(len(he), dtype=np.int64)[:, None]
    origins = np.zeros((len(he), 2), np.int64)
    whole = stain_tiles(network, he, sigmas=sigmas, seeds=seeds, origins=origins)
    part = stain_tiles(network, he[:, :, cut:], sigmas=sigmas, seeds=seeds, origins=origins + np.array([cut, 0]))
    worst = np.zeros(width - cut)
    for name, result in part.items():
        difference = np.abs(result.astype(np.float64) - whole[name][:, :, cut:])
        worst = np.maximum(worst, np.quantile(difference, QUANTILE, axis=(0, 1, 3)))
    above = np.flatnonzero(worst > threshold)
    if not above.size:
        return 0
    seen = int(above[-1]) + 1
    return seen if seen < width - cut else theoretical_radius(network.config)


def default_margin(radius: int, tile: int) -> int:
    """The next multiple of 16 above the effective radius, as far as the overhead allows; pixels.

    Above, not at: where a radius of 48 was measured, a margin of 48 left steps of seven grey levels between tiles.
    """
    largest = int(tile * (1 - LARGEST_OVERHEAD**-0.5) / 2) // ORIGIN_MULTIPLE * ORIGIN_MULTIPLE
    wanted = (radius // ORIGIN_MULTIPLE + 1) * ORIGIN_MULTIPLE
    return int(min(wanted, largest))
