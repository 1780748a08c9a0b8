"""Crops depend on the run's seed and the sample's number, and on nothing else."""

import dataclasses
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from staindiffuser.imaging.image_files import write_png
from staindiffuser.training.config import PRESETS
from staindiffuser.training.data.augmentation import jitter_stain
from staindiffuser.training.data.cache import TileCache
from staindiffuser.training.data.dataset import CropBatch, CropDataset, normal_noise, oriented
from staindiffuser.training.data.loader import BatchLoader, sample_numbers
from staindiffuser.training.data.targets import POSITIVE, UNKNOWN, load_tile, measure_stains
from staindiffuser.training.errors import DataError, LoaderError
from staindiffuser.training.teacher import Teacher
from staindiffuser.training.tiles.paired_tiles import PairedTiles


@pytest.fixture(scope="module")
def tiles(tiles_folder: Path) -> PairedTiles:
    return PairedTiles.load(tiles_folder)


def test_a_sample_is_the_same_whenever_it_is_asked_for(tiles: PairedTiles) -> None:
    first, second = (CropDataset(tiles, crop=32, seed=5) for _ in range(2))
    second[3], second[17]
    assert same(first[17], second[17])
    assert not torch.equal(first[17].noise, first[18].noise)
    assert not torch.equal(first[17].noise, CropDataset(tiles, crop=32, seed=6)[17].noise)


def same(one: CropBatch, other: CropBatch) -> bool:
    return all(torch.equal(value, vars(other)[name]) for name, value in vars(one).items())


def test_every_tile_is_seen_once_an_epoch(tiles: PairedTiles) -> None:
    data = CropDataset(tiles, crop=64, seed=0, jitter=0.0)
    count = len(data)

    def colours(crop: CropBatch) -> tuple[int, ...]:
        return tuple(int(image.long().sum()) for image in (crop.he, *crop.images))

    seen = {colours(data[n]) for n in range(count)}
    assert len(seen) == count == len(tiles.split("train"))


def test_images_and_masks_are_cropped_and_oriented_together(tiles: PairedTiles) -> None:
    data = CropDataset(tiles, crop=32, seed=0, jitter=0.0)
    for n in range(12):
        crop = data[n]
        cells = (crop.he == torch.tensor([160, 90, 170], dtype=torch.uint8)).all(-1)
        brown = (crop.images[1] == torch.tensor([130, 80, 45], dtype=torch.uint8)).all(-1)
        assert torch.equal(cells, brown)
        assert (crop.masks[1][cells] > 25).float().mean() > 0.9 if cells.any() else True


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache_bytes", [0, 40_000, 1 << 30])
def test_samples_depend_on_neither_cache_nor_processes(tiles: PairedTiles, workers: int, cache_bytes: int) -> None:
    plain = CropDataset(tiles, crop=32, seed=3, cache_bytes=0)
    data = CropDataset(tiles, crop=32, seed=3, cache_bytes=cache_bytes)
    for _ in range(2):  # the second time from the cache, where there is one
        with BatchLoader(data, sample_numbers(range(6), batch=4), workers=workers) as batches:
            for number in range(6):
                batch = batches.take()
                assert batch is not None
                assert same(batch, plain.batch(range(4 * number, 4 * number + 4)))
            assert batches.take() is None


def test_workers_fill_one_cache_together(tiles: PairedTiles, monkeypatch: pytest.MonkeyPatch) -> None:
    data = CropDataset(tiles, crop=32, seed=0)
    assert data.cache.nbytes == len(data) * 64 * 64 * 11
    with BatchLoader(data, sample_numbers(range(len(data) // 2), batch=2), workers=2) as batches:
        while batches.take() is not None:
            pass
    monkeypatch.setattr("staindiffuser.training.data.dataset.load_tile", lambda *_: pytest.fail("decoded again"))
    for sample in range(len(data)):
        data[sample]


def test_cache_stays_in_its_budget() -> None:
    cache = TileCache([10, 20, 30, 5], 45)
    assert cache.nbytes == 30, "the third does not fit, and offsets are in order"
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


def test_the_eight_orientations_are_different_and_copies() -> None:
    image = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    seen = {tuple(oriented(image, number)[..., 0].flatten().tolist()) for number in range(8)}
    assert len(seen) == 8
    whole = oriented(image, 0)
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
    assert not torch.equal(plain.he, jittered.he)
    assert torch.equal(plain.images, jittered.images)
    assert torch.equal(plain.masks, jittered.masks)


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
    def numbers(rank: int, first: int, parts: int = 1) -> list[int]:
        return [n for part in sample_numbers(range(first, 3), batch=8, parts=parts, rank=rank, world=2) for n in part]

    assert sorted(numbers(0, 0) + numbers(1, 0)) == list(range(24))
    assert numbers(1, 0) == [4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23] == numbers(1, 0, parts=2)
    assert numbers(1, 1) == numbers(1, 0)[4:]


def test_measured_constants_are_those_of_the_pixels(tiles: PairedTiles) -> None:
    stain = measure_stains(tiles)[1]
    pixels = np.concatenate([load_tile(t, tiles.stains)["ck818"].reshape(-1, 3) for t in tiles.split("train")]) / 255
    assert (stain.name, stain.label) == ("ck818", "CK8/18")
    np.testing.assert_allclose(stain.image_mean, pixels.mean(0), atol=1e-3)
    np.testing.assert_allclose(stain.image_std, pixels.std(0), atol=1e-3)


class Broken:
    """From its second batch on it fails."""

    def __init__(self, how: Callable[[], CropBatch], first: CropBatch) -> None:
        self.how, self.first = how, first

    def batch(self, samples: Iterable[int]) -> CropBatch:
        return self.how() if 0 not in samples else self.first


def unreadable() -> CropBatch:
    raise DataError("he/b.png cannot be read as an image: truncated")


def killed() -> CropBatch:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def shared_memory_full() -> CropBatch:
    class Full(CropBatch):
        def share_memory_(self) -> CropBatch:
            raise RuntimeError("unable to allocate shared memory(shm)")

    return Full(**dict.fromkeys(("he", "images", "masks", "noise", "draws", "known"), torch.zeros(1)))


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        (unreadable, DataError, r"^he/b\.png cannot be read as an image: truncated$"),
        (killed, LoaderError, "a loader process was killed.*fewer --workers"),
        (shared_memory_full, LoaderError, "shared memory is too small for a batch.*enlarge /dev/shm"),
    ],
)
def test_a_loader_process_says_what_is_wrong_and_ends(
    tiles: PairedTiles, how: Callable[[], CropBatch], kind: type[Exception], message: str
) -> None:
    data = Broken(how, CropDataset(tiles, crop=32, seed=0).batch([0]))
    with (
        BatchLoader(data, sample_numbers(range(9), batch=1), workers=1) as loader,
        pytest.raises(kind, match=message),
    ):
        _ = [loader.take() for _ in range(2)]  # with a process that is killed, batches it has made may be lost too
    assert not multiprocessing.active_children()


def test_loader_processes_end_with_a_parent_that_was_killed(tiles_folder: Path) -> None:
    program = (
        "import sys, multiprocessing, time\n"
        "from staindiffuser.training.data.dataset import CropDataset\n"
        "from staindiffuser.training.data.loader import BatchLoader, sample_numbers\n"
        "from staindiffuser.training.tiles.paired_tiles import PairedTiles\n"
        "data = CropDataset(PairedTiles.load(sys.argv[1]), crop=32, seed=0)\n"
        "with BatchLoader(data, sample_numbers(range(99), batch=2), workers=2) as loader:\n"
        "    loader.take()\n"
        "    print(*(child.pid for child in multiprocessing.active_children()), flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tiles_folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    children = [int(pid) for pid in process.stdout.readline().split()]
    process.kill()
    process.wait()
    process.stdout.close()
    assert len(children) == 2
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in children)


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except FileNotFoundError:
        return False


@pytest.fixture
def partly_labelled(tiles: PairedTiles, tmp_path: Path) -> PairedTiles:
    """Of the training tiles, every second has a mask of CD3 without its image, and nothing of CK8/18 at all."""
    lines = ["he,cd3,cd3_mask,ck818,ck818_mask,slide,split,mpp"]
    for number, tile in enumerate(tiles.tiles):
        data = load_tile(tile, tiles.stains)
        files = {name: f"{name}-{number}.png" for name in data}
        for name, pixels in data.items():
            write_png(tmp_path / files[name], pixels)
        if tile.split == "train" and number % 8 == 0:
            files |= {"cd3": "", "ck818": "", "ck818_mask": ""}
        columns = [files[name] for name in ("he", "cd3", "cd3_mask", "ck818", "ck818_mask")]
        lines.append(",".join([*columns, tile.slide, tile.split, str(tile.mpp)]))
    (tmp_path / "tiles.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return PairedTiles.load(tmp_path)


def test_a_crop_says_which_targets_it_has(partly_labelled: PairedTiles) -> None:
    data = CropDataset(partly_labelled, crop=32, seed=0)
    found = {tuple(data[n].known.flatten().tolist()) for n in range(len(data))}
    assert found == {(1.0, 1.0, 1.0, 1.0), (0.0, 1.0, 0.0, 0.0)}
    poor = next(crop for n in range(len(data)) if not (crop := data[n]).known[0, 0])
    assert not poor.images.any()
    assert (poor.masks[1] == UNKNOWN).all()
    assert (poor.masks[0] != UNKNOWN).any()
    again = CropDataset(partly_labelled, crop=32, seed=0)
    assert all(same(data[n], again[n]) for n in range(len(data)))  # from the cache, and anew


def test_cells_of_one_stain_are_negatives_of_another_of_which_nothing_is_known(partly_labelled: PairedTiles) -> None:
    plain, told = (CropDataset(partly_labelled, crop=32, seed=0, exclusive=exclusive) for exclusive in (False, True))
    negatives = 0
    for n in range(len(plain)):
        before, after = plain[n], told[n]
        if before.known[1, 1]:
            assert same(before, after)
            continue
        assert after.known.tolist() == [[0, 1], [0, 1]]  # still no image to learn from
        assert torch.equal(after.masks[0], before.masks[0])
        carried = before.masks[0] >= POSITIVE
        assert (after.masks[1][carried] == 0).all()
        assert (after.masks[1][~carried] == UNKNOWN).all()
        negatives += int(carried.sum())
    assert negatives > 0


def test_four_crops_meet_in_a_mosaic(partly_labelled: PairedTiles) -> None:
    plain, mixed = (CropDataset(partly_labelled, crop=32, seed=0, jitter=0, mosaic=share) for share in (0.0, 1.0))
    knowns, foreign = set(), 0
    for n in range(12):
        alone, crop = plain[n], mixed[n]
        assert same(crop, mixed[n])
        # The first quarter is the sample's own; the other three are others'.
        assert torch.equal(crop.he[:8, :8], alone.he[:8, :8])
        assert torch.equal(crop.masks[:, :8, :8], alone.masks[:, :8, :8])
        for rows, columns in ((slice(24, None), slice(8)), (slice(8), slice(24, None)), (slice(24, None),) * 2):
            foreign += not torch.equal(crop.he[rows, columns], alone.he[rows, columns])
        told = (crop.masks != UNKNOWN).any(dim=-1).any(dim=-1)
        assert (crop.known[:, 1].bool() | ~told).all()  # what a quarter says of a stain is learned from
        if crop.known[0, 0]:
            assert crop.images[0].flatten(0, 1).any(dim=-1).all()  # an image is learned from if all of it is there
        knowns.add(tuple(crop.known.flatten().tolist()))
    assert len(knowns) > 1
    assert foreign > 24  # of 36: simulated glass is alike
    assert all(same(plain[n], CropDataset(partly_labelled, crop=32, seed=0, jitter=0)[n]) for n in range(4))


def test_without_images_the_rest_of_a_crop_is_the_same(partly_labelled: PairedTiles) -> None:
    recipe: dict[str, Any] = {
        "augmentation": "wide",
        "mosaic": 0.5,
        "jigsaw": 0.5,
        "confounders": 0.5,
        "exclusive": True,
    }
    whole, cells = (CropDataset(partly_labelled, crop=32, seed=0, images=images, **recipe) for images in (True, False))
    for n in range(12):
        crop, alone = whole[n], cells[n]
        for name in ("he", "masks", "noise", "draws"):
            assert torch.equal(getattr(alone, name), getattr(crop, name)), name
        assert torch.equal(alone.known[:, 1], crop.known[:, 1])
        assert not alone.known[:, 0].any()
        assert alone.images.shape == crop.images.shape
        assert not alone.images.any()


def test_constants_are_measured_on_tiles_that_have_the_image(partly_labelled: PairedTiles, tiles: PairedTiles) -> None:
    measured = measure_stains(partly_labelled)
    kept = [row for row in partly_labelled.split("train") if row.stains["cd3"] is not None]
    values = np.concatenate([load_tile(row, ("cd3",))["cd3"].reshape(-1, 3) for row in kept]) / 255
    np.testing.assert_allclose(measured[0].image_mean, values.mean(0), atol=1e-4)
    none = dataclasses.replace(
        partly_labelled, tiles=tuple(row for row in partly_labelled.tiles if row.stains["cd3"] is None)
    )
    with pytest.raises(DataError, match="no training tile has an image of cd3"):
        measure_stains(none)


def test_a_mask_alone_teaches_the_cells_and_not_the_image(partly_labelled: PairedTiles) -> None:
    data = CropDataset(partly_labelled, crop=32, seed=0)
    poor = [n for n in range(len(data)) if not data[n].known[0, 0]]
    model = dataclasses.replace(PRESETS["debug"].model, stains=measure_stains(partly_labelled))
    teacher = Teacher(model, PRESETS["debug"].train)
    teacher(data.batch(poor[:2]), 0).value.backward()

    def taught(part: torch.nn.Module) -> bool:
        return any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in part.parameters())

    net = teacher.net
    assert taught(net.cells["cd3"])
    assert taught(teacher.uncertainty["cells-cd3"])
    for part in (net.images["cd3"], net.images["ck818"], net.cells["ck818"]):
        assert not taught(part)
    for name in ("images-cd3", "images-ck818", "cells-ck818"):
        assert not taught(teacher.uncertainty[name])
