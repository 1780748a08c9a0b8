"""Wide augmentation changes the H&E as another laboratory would, and nothing that it shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.optical_density import he_densities, optical_density
from staindiffuser.training.data.augmentation import (
    WIDE,
    WIDER,
    Width,
    another_cytoplasm,
    another_scanner,
    another_stain,
    another_tone,
    similar_crop,
)
from staindiffuser.training.data.dataset import CropDataset
from staindiffuser.training.simulate.tiles import simulate_tile
from staindiffuser.training.tiles.paired_tiles import PairedTiles


@pytest.fixture(scope="module")
def he() -> UInt8Array:
    return simulate_tile(3, 1, size=256).he


def test_every_array_is_moved_alike() -> None:
    y, x = np.mgrid[:96, :96]
    blob = np.where(np.hypot(y - 40, x - 52) < 20, 200, 20).astype(np.uint8)
    arrays = {"he": np.repeat(blob[..., None], 3, axis=2), "mask": blob}
    rotated = 0
    for seed in range(20):
        cut = similar_crop(arrays, np.random.default_rng(seed), 64)
        assert cut["he"].shape == (64, 64, 3)
        assert cut["mask"].shape == (64, 64)
        apart = np.abs(cut["he"][..., 0].astype(int) - cut["mask"])  # cubic and linear differ at the edge alone
        assert (apart > 60).mean() < 0.01
        rotated += apart.any()
    assert 3 <= rotated <= 13  # of 20, where a third is


def test_wider_crops_are_all_resampled() -> None:
    ramp = np.arange(96 * 96, dtype=np.uint32).reshape(96, 96) % 251
    windows = np.lib.stride_tricks.sliding_window_view(ramp.astype(np.uint8), (64, 64)).reshape(-1, 64 * 64)
    for seed in range(20):
        cut = similar_crop({"he": ramp.astype(np.uint8)}, np.random.default_rng(seed), 64, WIDER)["he"]
        assert not (windows == cut.ravel()).all(axis=1).any()


def test_wider_colours_go_further(he: UInt8Array) -> None:
    def hues(width: Width) -> float:
        """Spread over draws of how red the tissue is beside how blue."""
        means = [another_stain(he, np.random.default_rng(seed), width).mean(axis=(0, 1)) for seed in range(30)]
        return float(np.std([mean[0] - mean[2] for mean in means]))

    assert hues(WIDER) > 1.3 * hues(WIDE)


def test_crops_are_magnified_as_far_as_their_width_says() -> None:
    y, x = np.mgrid[:128, :128]
    disc = np.where(np.hypot(y - 64, x - 64) < 20, 255, 0).astype(np.uint8)

    def magnifications(width: Width) -> list[float]:
        areas = [(similar_crop({"a": disc}, np.random.default_rng(s), 112, width)["a"] > 127).sum() for s in range(60)]
        return [float(np.sqrt(min(areas) / (disc > 127).sum())), float(np.sqrt(max(areas) / (disc > 127).sum()))]

    np.testing.assert_allclose(magnifications(WIDE), WIDE.scales, rtol=0.08)
    np.testing.assert_allclose(magnifications(WIDER), WIDER.scales, rtol=0.08)


def test_a_kind_of_cells_is_stained_otherwise_or_its_mirror_image(he: UInt8Array) -> None:
    cells = np.zeros(he.shape[:2], np.bool_)
    cells[20:60, 20:60] = True
    before, hits = he.astype(int), 0
    for seed in range(20):
        changed = np.abs(another_cytoplasm(he, cells, np.random.default_rng(seed)).astype(int) - before).max(axis=-1)
        place = cells if changed[cells].mean() > changed[cells[::-1, ::-1]].mean() else cells[::-1, ::-1]
        hits += place is cells
        assert changed[place].mean() > 3
        far = ndimage.distance_transform_edt(~place) > 40
        assert changed[far].max() <= 1
    assert 4 <= hits <= 16
    none = another_cytoplasm(he, np.zeros_like(cells), np.random.default_rng(0))
    assert np.abs(none.astype(int) - before).max() <= 1


def test_another_stain_keeps_the_nuclei_where_they_are(he: UInt8Array) -> None:
    before = ndimage.gaussian_filter(he_densities(he)[..., 0], 1.5)
    means = []
    for seed in range(12):
        stained = another_stain(he, np.random.default_rng(seed))
        after = ndimage.gaussian_filter(he_densities(stained)[..., 0], 1.5)
        assert np.corrcoef(before.ravel(), after.ravel())[0, 1] > 0.7
        means.append(float(after.mean()))
    assert max(means) > 1.5 * min(means)


def test_another_tone_changes_the_contrast_and_leaves_glass_white(he: UInt8Array) -> None:
    half = he.copy()
    half[:20] = 255
    contrasts, changed = [], 0
    for seed in range(40):
        toned = another_tone(half, np.random.default_rng(seed))
        assert (toned[:20] == 255).all()
        density = optical_density(toned[20:]).sum(axis=-1)
        contrasts.append(float(density.std() / density.mean()))
        changed += not np.array_equal(toned, half)
    assert max(contrasts) > 2 * min(contrasts)
    assert 20 <= changed <= 36
    flat = np.full((8, 8, 3), 128, np.uint8)  # a density of 0.3
    assert all(np.abs(another_tone(flat, np.random.default_rng(s)).astype(int) - 128).max() <= 1 for s in range(8))


def test_another_scanner_changes_little_and_often_nothing(he: UInt8Array) -> None:
    changes = []
    for seed in range(40):
        scanned = another_scanner(he, np.random.default_rng(seed))
        changes.append(float(np.abs(scanned.astype(int) - he).mean()))
    assert max(changes) < 20
    assert sum(change == 0 for change in changes) >= 5
    assert sum(change > 0 for change in changes) >= 10


def test_a_wide_sample_is_the_same_whenever_it_is_asked_for(tiles_folder: Path) -> None:
    tiles = PairedTiles.load(tiles_folder)
    first, again = (CropDataset(tiles, crop=32, seed=5, augmentation="wide") for _ in range(2))
    first[3]
    assert all(torch.equal(value, vars(again[17])[name]) for name, value in vars(first[17]).items())
    light, wider = CropDataset(tiles, crop=32, seed=5), CropDataset(tiles, crop=32, seed=5, augmentation="wider")
    assert not torch.equal(light[17].he, first[17].he)
    assert not torch.equal(wider[17].he, first[17].he)
