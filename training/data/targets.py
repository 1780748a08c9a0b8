"""What a tile gives to learn from: its arrays, where its masks are labels, and how much there is to tell in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.image_files import read_image
from staindiffuser.imaging.optical_density import coarse_mask, dab_mask
from staindiffuser.training.config import StainConfig
from staindiffuser.training.errors import DataError
from staindiffuser.training.tiles.mixed_tiles import MixedTiles
from staindiffuser.training.tiles.paired_tiles import PairedTile, PairedTiles, spread
from staindiffuser.training.tiles.stain_names import stain_label
from staindiffuser.training.tiles.tile import TILES_CSV

__all__ = [
    "NEGATIVE",
    "POSITIVE",
    "UNKNOWN",
    "drawn_by",
    "known_targets",
    "load_tile",
    "measure_stains",
    "negatives_of_others",
    "valid_mask",
]

NEGATIVE, POSITIVE = 25, 230
"""A coarse mask is negative up to the first value and positive from the second on; between them is the ignore band."""
UNKNOWN = 128
"""The centre of the ignore band."""


def load_tile(tile: PairedTile, stains: tuple[str, ...]) -> dict[str, UInt8Array]:
    """Decode a tile: ``he`` [H, W, 3], per stain ``<stain>`` [H, W, 3] and its ``<stain>_mask`` [H, W].

    An image that the tile does not have is black, and a mask that nothing says is :data:`UNKNOWN` everywhere.
    """
    arrays = {"he": read_image(tile.he)}
    for stain in stains:
        image, mask = tile.stains[stain], tile.read_mask(stain)
        arrays[stain] = np.zeros_like(arrays["he"]) if image is None else read_image(image)
        if mask is None:
            unknown = np.full(arrays["he"].shape[:2], UNKNOWN, np.uint8)
            mask = unknown if image is None else coarse_mask(dab_mask(arrays[stain]))
        arrays[f"{stain}_mask"] = mask
    return arrays


def known_targets(tile: PairedTile, stains: tuple[str, ...]) -> NDArray[np.float32]:
    """Per stain, whether the tile has an image and a mask to learn from (1) or not (0): float32 [S, 2]."""
    images = [tile.stains[stain] is not None for stain in stains]
    masks = [image or tile.masks[stain] is not None for image, stain in zip(images, stains, strict=True)]
    return np.stack([images, masks], axis=-1).astype(np.float32)


def negatives_of_others(
    crop: Mapping[str, UInt8Array], known: NDArray[np.float32], stains: tuple[str, ...]
) -> tuple[dict[str, UInt8Array], NDArray[np.float32]]:
    """Cells that carry one stain as negatives of the stains of which the crop says nothing.

    Args:
        crop: the arrays of :func:`load_tile`.
        known: of :func:`known_targets`.

    Returns:
        the same, in which a stain without a mask has one: 0 where another is positive, elsewhere :data:`UNKNOWN`.
    """
    told = [
        crop[f"{stain}_mask"] >= POSITIVE for stain, known_mask in zip(stains, known[:, 1], strict=True) if known_mask
    ]
    changed, known = dict(crop), known.copy()
    if told:
        others = np.where(np.any(told, axis=0), 0, UNKNOWN).astype(np.uint8)
        for number, stain in enumerate(stains):
            if not known[number, 1]:
                changed[f"{stain}_mask"], known[number, 1] = others, 1
    return changed, known


def valid_mask(mask: UInt8Array) -> NDArray[np.bool_]:
    """Where a coarse mask is a label: its blurred edge is the ignore band."""
    return (mask <= NEGATIVE) | (mask >= POSITIVE)


def measure_stains(tiles: PairedTiles | MixedTiles, *, limit: int = 256) -> tuple[StainConfig, ...]:
    """Each stain's standardisation constants, as the samples of a training run have them.

    From up to ``limit`` training tiles of each folder, spread over it; folders count by their shares. Tiles without an
    image of a stain do not count for it.

    Raises:
        DataError: a stain has no image at all.
    """
    moments = {stain: np.zeros((2, 4)) for stain in tiles.stains}
    weights = dict.fromkeys(tiles.stains, 0.0)
    for part, share in zip(tiles.parts, tiles.shares, strict=True):
        rows = spread(part.split("train"), limit)
        for row in rows:
            arrays = load_tile(row, tiles.stains)
            for stain in tiles.stains:
                if row.stains[stain] is None:
                    continue
                values = np.concatenate([arrays[stain], arrays[f"{stain}_mask"][..., None]], axis=-1)
                values = values.reshape(-1, 4) / 255
                moments[stain] += np.stack([values.mean(0), (values**2).mean(0)]) * (share / len(rows))
                weights[stain] += share / len(rows)
    configs = []
    for stain in tiles.stains:
        if not weights[stain]:
            raise DataError(
                f"{tiles.folder / TILES_CSV}: no training tile has an image of {stain}: an image is learned from images"
            )
        mean, square = moments[stain] / weights[stain]
        std = np.sqrt(np.maximum(square - mean**2, 1e-4)).round(4)
        configs.append(
            StainConfig(
                name=stain,
                label=stain_label(stain),
                image_mean=(round(mean[0], 4), round(mean[1], 4), round(mean[2], 4)),
                image_std=(float(std[0]), float(std[1]), float(std[2])),
                cells_mean=round(float(mean[3]), 4),
                cells_std=max(float(std[3]), 0.05),
            )
        )
    return tuple(configs)


def drawn_by(rows: Sequence[PairedTile], stains: Sequence[str], rare_share: float) -> NDArray[np.float64]:
    """How often each tile is to be drawn: alike, and for a share of the crops by what there is to tell in its masks.

    Of a tile with a positive share p of a stain that is p (1 - p), the variance of the mask: edges of epithelium
    count more than its middle, and a lymphoid follicle more than a field without one.

    Args:
        rare_share: divided evenly among the stains of which anything is positive.

    Returns:
        [rows], their sum 1.

    Raises:
        ImageError: a mask cannot be read.
    """
    with ThreadPoolExecutor() as pool:
        shares = np.array(list(pool.map(lambda row: _positive_shares(row, stains), rows)))
    spread_of = shares * (1 - shares)
    totals = spread_of.sum(axis=0)
    told = spread_of[:, totals > 0] / totals[totals > 0]
    alike = np.full(len(rows), 1 / max(1, len(rows)))
    return (1 - rare_share) * alike + rare_share * told.mean(axis=1) if told.size else alike


def _positive_shares(row: PairedTile, stains: Sequence[str]) -> list[float]:
    """Per stain the positive share of a tile's mask; 0 where there is none."""
    shares = []
    for stain in stains:
        mask, image = row.read_mask(stain), row.stains[stain]
        if mask is None and image is not None:
            mask = coarse_mask(dab_mask(read_image(image)))
        shares.append(0.0 if mask is None else float((mask >= POSITIVE).mean()))
    return shares
