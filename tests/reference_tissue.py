"""Small H&E tiles that look alike, as the tissue that a model "knows", for statistics of quality."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy import ndimage

from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.training.tiles.writing import PairedTilesWriter

__all__ = ["tissue", "write_reference"]


def tissue(rng: np.random.Generator, size: int) -> UInt8Array:
    """Pink with violet blobs, each image a little different: uint8 [size, size, 3]."""
    he = np.full((size, size, 3), (225, 165, 200), np.float64)
    yy, xx = np.mgrid[:size, :size]
    for x, y in rng.integers(4, size - 4, (10, 2)):
        he[np.hypot(xx - x, yy - y) < rng.uniform(3, 5)] = (100, 60, 140)
    he = ndimage.gaussian_filter(he, (0.7, 0.7, 0)) * rng.uniform(0.93, 1.03) + rng.normal(0, 3, he.shape)
    return np.clip(he, 0, 250).astype(np.uint8)


def write_reference(folder: Path, *, size: int, slides: int = 12, tiles_per_slide: int = 16) -> Path:
    """Write a folder of paired tiles, all but one of them to train on; returns ``folder``."""
    rng = np.random.default_rng(1)
    blank = np.full((size, size, 3), 230, np.uint8)
    with PairedTilesWriter(folder, ["cd3"], masks=False) as writer:
        for i in range(slides * tiles_per_slide):
            slide = f"s{i // tiles_per_slide}"
            writer.add(f"t{i}", he=tissue(rng, size), stains={"cd3": blank}, slide=slide, split="train", mpp=0.5)
        writer.add("v", he=blank, stains={"cd3": blank}, slide="val", split="val", mpp=0.5)
    return folder
