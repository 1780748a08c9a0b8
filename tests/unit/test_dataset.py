"""Crops depend on the run's seed and the sample's number, and on nothing else."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from staindiffuser.training.data.dataset import CropDataset, GlobalSampler, jitter_stain, load_tile, measure_stains
from staindiffuser.training.data.pairs import PairedTiles


@pytest.fixture(scope="module")
def tiles(tiles_folder: Path) -> PairedTiles:
    return PairedTiles.load(tiles_folder)


def test_a_sample_is_the_same_whenever_it_is_asked_for(tiles: PairedTiles) -> None:
    first, second = (CropDataset(tiles, crop=32, seed=5) for _ in range(2))
    second[3], second[17]
    for name, value in first[17].items():
        assert torch.equal(value, second[17][name]), name
    assert not torch.equal(first[17]["noise"], first[18]["noise"])
    assert not torch.equal(first[17]["noise"], CropDataset(tiles, crop=32, seed=6)[17]["noise"])


def test_every_tile_is_seen_once_an_epoch(tiles: PairedTiles) -> None:
    data = CropDataset(tiles, crop=64, seed=0, jitter=0.0)
    count = len(data)

    def colours(item: dict[str, Any]) -> tuple[int, ...]:
        return tuple(int(item[name].long().sum()) for name in ("he", "cd3", "ck818"))

    seen = {colours(data[n]) for n in range(count)}
    assert len(seen) == count == len(tiles.split("train"))


def test_pictures_and_masks_are_cropped_and_turned_together(tiles: PairedTiles) -> None:
    data = CropDataset(tiles, crop=32, seed=0, jitter=0.0)
    for n in range(12):
        item = data[n]
        cells = (item["he"] == torch.tensor([160, 90, 170], dtype=torch.uint8)).all(-1)
        brown = (item["ck818"] == torch.tensor([130, 80, 45], dtype=torch.uint8)).all(-1)
        assert torch.equal(cells, brown)
        assert (item["ck818_mask"][cells] > 25).float().mean() > 0.9 if cells.any() else True


def test_stain_jitter_keeps_white_nearly_white_and_order_of_density() -> None:
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    jittered = jitter_stain(ramp, np.random.default_rng(0), 0.2).astype(int)
    assert (np.diff(jittered, axis=1) >= 0).all()
    assert abs(jittered[0, 255] - 255).max() < 25
    assert np.array_equal(jitter_stain(ramp, np.random.default_rng(0), 0.0), ramp)


def test_processes_share_the_samples_of_a_step_and_a_resumed_run_goes_on() -> None:
    def numbers(rank: int, first: int) -> list[int]:
        return list(GlobalSampler(lambda: first, 24, 8, rank=lambda: rank, world=lambda: 2))

    assert sorted(numbers(0, 0) + numbers(1, 0)) == list(range(24))
    assert numbers(1, 0) == [4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23]
    assert numbers(1, 8) == numbers(1, 0)[4:]


def test_measured_constants_are_those_of_the_pixels(tiles: PairedTiles) -> None:
    stain = measure_stains(tiles)[1]
    pixels = np.concatenate([load_tile(t, tiles.stains)["ck818"].reshape(-1, 3) for t in tiles.split("train")]) / 255
    assert (stain.name, stain.label) == ("ck818", "CK8/18")
    np.testing.assert_allclose(stain.picture_mean, pixels.mean(0), atol=1e-3)
    np.testing.assert_allclose(stain.picture_std, pixels.std(0), atol=1e-3)
