"""A crop in pieces: every pixel is one of the crop's, with its label, and architecture is gone."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch

from staindiffuser.training.data.dataset import CropDataset
from staindiffuser.training.data.jigsaw import jigsaw
from staindiffuser.training.data.targets import POSITIVE
from staindiffuser.training.tiles.paired_tiles import PairedTiles

SIDE = 128
STRIPES = np.tile(np.repeat(np.array([0, 255], np.uint8), 16), (SIDE, SIDE // 32))
"""Vertical stripes of 16 pixels."""


def pieces(seed: int, cells: np.ndarray = STRIPES > 0) -> dict[str, np.ndarray]:
    arrays = {"he": np.repeat(STRIPES[..., None], 3, axis=2), "mask": STRIPES}
    return jigsaw(arrays, cells, np.random.default_rng(seed))


def test_every_array_is_cut_alike() -> None:
    for seed in range(5):
        cut = pieces(seed)
        assert cut["he"].shape == (SIDE, SIDE, 3)
        # Two ways of interpolation, which differ at edges alone.
        assert np.mean(np.abs(cut["he"][..., 0].astype(int) - cut["mask"]) > 128) < 0.01
        assert all(np.array_equal(pieces(seed)[name], cut[name]) for name in cut)


def test_stripes_are_gone() -> None:
    """Down a stripe nothing changes; after it, something does in most of the columns."""
    changes = [np.mean(np.abs(np.diff(pieces(seed)["mask"].astype(int), axis=0)) > 20) for seed in range(5)]
    assert min(changes) > 0.02


def test_cells_of_a_kind_lie_in_nests() -> None:
    """What is much coarser than a piece varies more than where pieces lie anywhere."""

    halves = np.repeat(np.array([[0, 255]], np.uint8), SIDE, 0).repeat(SIDE // 2, 1)

    def coarse(cells: np.ndarray) -> float:
        cut = [jigsaw({"mask": halves}, cells, np.random.default_rng(seed))["mask"] for seed in range(24)]
        return float(np.mean([cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 16).std() for mask in cut]))

    assert coarse(halves > 0) > 1.15 * coarse(np.zeros((SIDE, SIDE), bool))


def test_without_cells_of_a_kind_pieces_come_from_anywhere() -> None:
    cut = pieces(0, np.zeros((SIDE, SIDE), bool))["mask"]
    assert 0.3 < (cut > 128).mean() < 0.7


def test_a_crop_of_the_training_is_cut_with_its_labels(tiles_folder: Path) -> None:
    tiles = PairedTiles.load(tiles_folder)
    plain, cut = (CropDataset(tiles, crop=64, seed=0, jitter=0, jigsaw=share) for share in (0.0, 1.0))
    agree = total = moved = 0
    for n in range(12):
        crop = cut[n]
        assert torch.equal(crop.he, cut[n].he)
        assert torch.equal(crop.known, plain[n].known)
        moved += not torch.equal(crop.he, plain[n].he)
        # Where a stain's image is brown its mask says so, as in the crop that it was.
        brown, told = crop.images[0].float().mean(dim=-1) < 120, crop.masks[0] >= POSITIVE
        agree, total = agree + int((brown & told).sum()), total + int(brown.sum())
    assert moved > 8  # of 12: glass is alike
    assert total > 100
    assert agree > 0.6 * total
