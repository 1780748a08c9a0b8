"""Crops depend on the run's seed and the sample's number, and on nothing else."""

import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from staindiffuser.training.callbacks import TimedLoader
from staindiffuser.training.data.cache import TileCache
from staindiffuser.training.data.dataset import (
    CropDataset,
    GlobalSampler,
    jitter_stain,
    load_tile,
    measure_stains,
    normal_noise,
    turned,
)
from staindiffuser.training.errors import DataError
from staindiffuser.training.tiles.paired_tiles import PairedTiles


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


def test_images_and_masks_are_cropped_and_turned_together(tiles: PairedTiles) -> None:
    data = CropDataset(tiles, crop=32, seed=0, jitter=0.0)
    for n in range(12):
        item = data[n]
        cells = (item["he"] == torch.tensor([160, 90, 170], dtype=torch.uint8)).all(-1)
        brown = (item["ck818"] == torch.tensor([130, 80, 45], dtype=torch.uint8)).all(-1)
        assert torch.equal(cells, brown)
        assert (item["ck818_mask"][cells] > 25).float().mean() > 0.9 if cells.any() else True


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache_bytes", [0, 40_000, 1 << 30])
def test_samples_depend_on_neither_cache_nor_processes(tiles: PairedTiles, workers: int, cache_bytes: int) -> None:
    plain = CropDataset(tiles, crop=32, seed=3, cache_bytes=0)
    data = CropDataset(tiles, crop=32, seed=3, cache_bytes=cache_bytes)
    for _ in range(2):  # the second time from the cache, where there is one
        sampler = GlobalSampler(lambda: 0, 24, 4, rank=lambda: 0, world=lambda: 1)
        batches = DataLoader(data, batch_size=4, sampler=sampler, num_workers=workers)
        for number, batch in enumerate(batches):
            for i in range(4):
                for name, value in plain[4 * number + i].items():
                    assert torch.equal(batch[name][i], value), name


def test_workers_fill_one_cache_together(tiles: PairedTiles, monkeypatch: pytest.MonkeyPatch) -> None:
    data = CropDataset(tiles, crop=32, seed=0)
    assert data.cache.nbytes == len(data) * 64 * 64 * 11
    for _ in DataLoader(data, batch_size=2, sampler=range(len(data)), num_workers=2):
        pass
    monkeypatch.setattr("staindiffuser.training.data.dataset.load_tile", lambda *_: pytest.fail("decoded again"))
    for sample in range(len(data)):
        data[sample]


def test_cache_stays_in_its_budget() -> None:
    cache = TileCache([10, 20, 30, 5], 45)
    assert cache.nbytes == 30, "the third does not fit, and places are in order"
    for index, size in enumerate([10, 20, 30, 5]):
        assert cache.get(index) is None
        cache.put(index, [np.full(size - 5, index + 1, np.uint8), np.full((1, 5), index + 1, np.uint8)])
    for index, size in enumerate([10, 20]):
        kept = cache.get(index)
        assert kept is not None
        np.testing.assert_array_equal(kept, np.full(size, index + 1, np.uint8))
    assert cache.get(2) is None
    assert cache.get(3) is None
    copy = pickle.loads(pickle.dumps(cache))
    assert copy.get(0) is None, "a spawned process starts with an empty one"
    assert copy.nbytes == 30


def test_the_eight_turns_are_different_and_copies() -> None:
    image = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    seen = {tuple(turned(image, turn)[..., 0].flatten().tolist()) for turn in range(8)}
    assert len(seen) == 8
    whole = turned(image, 0)
    whole[0, 0] = 99
    assert image[0, 0, 0] == 0


def test_noise_is_standard_normal() -> None:
    noise = normal_noise(np.random.default_rng(0), (2, 4, 256, 256))
    assert noise.shape == (2, 4, 256, 256)
    assert noise.dtype == torch.float32
    assert abs(noise.mean()) < 0.005
    assert abs(noise.std() - 1) < 0.005
    share = float((noise.abs() > 1.959964).float().mean())
    assert abs(share - 0.05) < 0.002
    assert abs((noise[0, 0] * noise[0, 1]).mean()) < 0.02


def test_jitter_touches_the_he_alone(tiles: PairedTiles) -> None:
    plain, jittered = (CropDataset(tiles, crop=32, seed=1, jitter=strength)[5] for strength in (0.0, 0.2))
    assert not torch.equal(plain["he"], jittered["he"])
    for name in ("cd3", "cd3_mask", "ck818", "ck818_mask"):
        assert torch.equal(plain[name], jittered[name])


def test_tiles_smaller_than_the_crop(tiles: PairedTiles) -> None:
    with pytest.raises(DataError, match=r"tiles\.csv, row 2: the tile is 64 × 64, smaller than the crop of 96"):
        CropDataset(tiles, crop=96, seed=0)


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
    np.testing.assert_allclose(stain.image_mean, pixels.mean(0), atol=1e-3)
    np.testing.assert_allclose(stain.image_std, pixels.std(0), atol=1e-3)


class Torn(Dataset[int]):
    """Its second sample cannot be read."""

    def __getitem__(self, sample: int) -> int:
        if sample:
            raise DataError("he/b.png cannot be read as an image: truncated")
        return sample

    def __len__(self) -> int:
        return 2


def test_a_worker_says_what_it_cannot_read_and_no_more() -> None:
    loader = TimedLoader(Torn(), batch_size=None, num_workers=1, batches=2)
    with pytest.raises(DataError) as caught:
        list(loader)
    assert str(caught.value) == "he/b.png cannot be read as an image: truncated"
    assert not multiprocessing.active_children(), "they hear no signal: the command would never end"
