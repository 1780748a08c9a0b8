"""What an engine's precision costs in quality: DAB-Dice against the real stain, on tiles that no training saw."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from staindiffuser.errors import InputError
from staindiffuser.imaging.image_files import read_image
from staindiffuser.imaging.optical_density import dab_mask
from staindiffuser.training.tiles.paired_tiles import PairedTiles, spread

__all__ = ["dab_dice"]

Arrays = dict[str, np.ndarray[Any, Any]]


def dab_dice(
    stainers: Mapping[str, Callable[[Arrays], Arrays]], tiles: PairedTiles, tile: int, *, most: int
) -> tuple[dict[str, dict[str, float]], int]:
    """Score several engines on the same tiles of the test split.

    Args:
        stainers: engine to what makes ``STAIN_<NAME>`` uint8 [1, T, T, 3] of ``HE``, ``ORIGIN`` and ``SEED``.
        tiles: paired tiles; only those with an image of every stain count.
        tile: T, pixels.
        most: tiles at most, evenly spread.

    Returns:
        Engine to stain to Dice, pooled over all pixels of all tiles; and the number of tiles.

    Raises:
        InputError: there is no such tile, or one of another size.
    """
    rows = spread(tiles.scored("test"), most)
    if not rows:
        raise InputError(f"{tiles.folder} has no tile of the test split with an image of every stain")
    counts = {engine: {stain: np.zeros(2) for stain in tiles.stains} for engine in stainers}
    for number, row in enumerate(rows):
        if row.size != (tile, tile):
            raise InputError(f"{row.he}: {row.size[0]} x {row.size[1]} px, but the engines take {tile} x {tile}")
        inputs: Arrays = {
            "HE": read_image(row.he)[None],
            "ORIGIN": np.zeros((1, 2), np.int64),
            "SEED": np.full((1, 1), number, np.int64),
        }
        real = {stain: dab_mask(read_image(row.image(stain))) for stain in tiles.stains}
        for engine, run in stainers.items():
            outputs = run(inputs)
            for stain, mask in real.items():
                virtual = dab_mask(outputs[f"STAIN_{stain.upper()}"][0])
                counts[engine][stain] += (2.0 * (virtual & mask).sum(), virtual.sum() + mask.sum())
    return {
        engine: {stain: float(both / area) if area else 1.0 for stain, (both, area) in by_stain.items()}
        for engine, by_stain in counts.items()
    }, len(rows)
