"""One row of a folder of paired tiles, and what holds for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

__all__ = ["MASK", "MODEL_MPP", "MPP_TOLERANCE", "SPLITS", "TILES_CSV", "PairedTile", "Split"]

TILES_CSV = "tiles.csv"
MASK = "_mask"
"""Ends the name of a mask's column."""
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
MODEL_MPP = 0.5
"""Pixel size that models are made for, µm."""
MPP_TOLERANCE = 0.02
"""Pixel sizes that differ by a larger share are different."""


@dataclass(frozen=True, kw_only=True)
class PairedTile:
    """One row of ``tiles.csv``."""

    row: int
    """Line in ``tiles.csv``, the header being line 1."""
    he: Path
    """The H&E image, RGB."""
    stains: Mapping[str, Path]
    """Per stain its IHC image, RGB, of the same size."""
    masks: Mapping[str, Path | None]
    """Per stain its coarse mask (one channel, same size), or None: derived from the image when needed."""
    slide: str
    """Name of the slide the tile comes from."""
    split: Split
    mpp: float
    """Pixel size, µm."""
    size: tuple[int, int]
    """Width and height, pixels."""
    file: Path
    """The ``tiles.csv`` that the row stands in."""
