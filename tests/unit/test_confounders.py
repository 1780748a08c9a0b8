"""What is pasted hides what was there, in the image and in the truth alike, and the sampling finds rare positives."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from staindiffuser.imaging.arrays import FloatArray, UInt8Array
from staindiffuser.imaging.optical_density import optical_density
from staindiffuser.training.data.confounders import CONFOUNDERS, GLASS, with_confounder
from staindiffuser.training.data.dataset import CropDataset
from staindiffuser.training.data.targets import drawn_by
from staindiffuser.training.simulate.tiles import simulate_tile
from staindiffuser.training.tiles.mixed_tiles import Schedule
from staindiffuser.training.tiles.paired_tiles import PairedTiles


@pytest.fixture(scope="module")
def arrays() -> dict[str, UInt8Array]:
    tile = simulate_tile(3, 1, size=128)
    mask = np.full((128, 128), 255, np.uint8)
    return {"he": tile.he, "ck818": np.full((128, 128, 3), 90, np.uint8), "ck818_mask": mask}


@pytest.fixture(scope="module")
def density(arrays: dict[str, UInt8Array]) -> FloatArray:
    return optical_density(arrays["he"])[:96]


@pytest.mark.parametrize("name", sorted(CONFOUNDERS))
def test_each_is_painted_within_the_crop(name: str, density: FloatArray) -> None:
    areas = []
    for seed in range(12):
        pasted, place, hides = CONFOUNDERS[name](np.random.default_rng(seed), density)
        assert pasted.shape == density.shape == (96, 128, 3)
        assert pasted.dtype == place.dtype == np.float32
        assert place.shape == (96, 128)
        assert 0 <= place.min() <= place.max() <= 1
        assert 0 <= hides <= 1
        areas.append(float((place > 0.5).mean()))
    assert sum(areas) / len(areas) > 0.1
    assert max(areas) > min(areas)


def test_a_fold_is_the_section_on_itself_once_or_twice() -> None:
    even, layers = np.full((96, 128, 3), 0.3, np.float32), set()
    for seed in range(20):
        pasted, _, hides = CONFOUNDERS["fold"](np.random.default_rng(seed), even)
        assert hides == 0
        assert np.ptp(pasted) < 1e-4
        layers.add(round(float(pasted.mean()) / 0.3, 3))
    assert layers == {1.0, 2.0}


def test_tissue_shines_through_some_pens(density: FloatArray) -> None:
    assert {CONFOUNDERS["pen"](np.random.default_rng(seed), density)[2] for seed in range(20)} == {0.0, 1.0}


def test_what_is_pasted_is_negative_and_nothing_else_changes(arrays: dict[str, UInt8Array]) -> None:
    hidden_somewhere = 0
    for seed in range(30):
        pasted = with_confounder(arrays, np.random.default_rng(seed))
        hidden = pasted["ck818_mask"] == 0
        assert np.array_equal((pasted["ck818"] == GLASS).all(axis=-1), hidden)
        assert set(np.unique(pasted["ck818_mask"])) <= {0, 255}
        untouched = np.abs(pasted["he"].astype(int) - arrays["he"]).max(axis=-1) <= 1
        assert not (untouched & hidden).all() or not hidden.any()
        hidden_somewhere += hidden.any()
    assert hidden_somewhere >= 25
    assert arrays["ck818_mask"].min() == 255  # what was given is not written to


def test_crops_with_confounders_are_the_same_whenever_they_are_asked_for(tiles_folder: Path) -> None:
    tiles = PairedTiles.load(tiles_folder)
    first, again, without = (CropDataset(tiles, crop=32, seed=5, confounders=share) for share in (0.9, 0.9, 0.0))
    changed = 0
    for sample in range(12):
        assert torch.equal(first[sample].he, again[sample].he)
        assert torch.equal(first[sample].masks, again[sample].masks)
        changed += not torch.equal(first[sample].he, without[sample].he)
    assert changed >= 8


def folder_with_one_positive(folder: Path, count: int = 40) -> PairedTiles:
    """Only the first tile has a positive CD3 cell; each is half cytokeratin, the second all of it."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = ["he,cd3,cd3_mask,ck818,ck818_mask,slide,split,mpp"]
    for number in range(count):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(folder / f"he{number}.png")
        cd3, ck = np.zeros((32, 32), np.uint8), np.zeros((32, 32), np.uint8)
        cd3[:6, :6] = 255 * (number == 0)
        ck[: 32 if number == 1 else 16] = 255
        Image.fromarray(cd3).save(folder / f"cd3_{number}.png")
        Image.fromarray(ck).save(folder / f"ck_{number}.png")
        lines.append(f"he{number}.png,,cd3_{number}.png,,ck_{number}.png,s{number},train,0.5")
    (folder / "tiles.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return PairedTiles.load(folder)


def test_tiles_are_drawn_by_what_there_is_to_tell(tmp_path: Path) -> None:
    tiles = folder_with_one_positive(tmp_path / "tiles")
    rows = tiles.split("train")
    weights = drawn_by(rows, tiles.stains, 0.4)
    assert weights.sum() == pytest.approx(1)
    assert weights[0] == pytest.approx(0.6 / 40 + 0.2 + 0.2 / 39)  # alone in CD3, one of 39 in cytokeratin
    assert weights[1] == pytest.approx(0.6 / 40)  # all of it is positive: nothing to tell apart
    np.testing.assert_allclose(weights[2:], 0.6 / 40 + 0.2 / 39)
    np.testing.assert_allclose(drawn_by(rows, tiles.stains, 0.0), 1 / 40)

    schedule = Schedule(tiles, seed=3, weights=[weights])
    drawn = Counter(tile for _, tile in map(schedule, range(40 * 50)))
    for tile, weight in enumerate(weights):  # systematic: off by less than one in an epoch of 40
        assert abs(drawn[tile] - 2000 * weight) < 50
    assert abs(drawn[0] - 2000 * weights[0]) < 15
    again = Schedule(tiles, seed=3, weights=[weights])
    assert [again(n) for n in reversed(range(200))][::-1] == [schedule(n) for n in range(200)]


def test_a_folder_without_any_positive_pixel_is_drawn_evenly(tmp_path: Path) -> None:
    tiles = folder_with_one_positive(tmp_path / "tiles")
    for number in range(40):
        for stain in ("cd3", "ck"):
            Image.fromarray(np.zeros((32, 32), np.uint8)).save(tmp_path / "tiles" / f"{stain}_{number}.png")
    np.testing.assert_allclose(drawn_by(tiles.split("train"), tiles.stains, 0.5), 1 / 40)


def test_glass_is_white_in_what_is_learned(tmp_path: Path) -> None:
    folder = tmp_path / "tiles"
    folder.mkdir()
    he, ihc = np.full((64, 64, 3), 243, np.uint8), np.full((64, 64, 3), 231, np.uint8)
    he[:, 32:], ihc[:, 32:] = (200, 130, 190), (190, 190, 210)
    Image.fromarray(he).save(folder / "he.png")
    Image.fromarray(ihc).save(folder / "cd3.png")
    lines = "he,cd3,slide,split,mpp\nhe.png,cd3.png,a,train,0.5\n"
    (folder / "tiles.csv").write_text(lines, encoding="utf-8")
    tiles = PairedTiles.load(folder)
    plain, white = (CropDataset(tiles, crop=64, seed=1, jitter=0, white_glass=on)[0] for on in (False, True))
    assert torch.equal(plain.he, white.he)
    glass = (plain.he.float().mean(dim=-1) > 240).numpy()
    assert set(np.unique(plain.images[0][glass])) == {231}
    assert np.mean(white.images[0].numpy()[glass] == 255) > 0.85
    tissue = ~glass
    assert np.array_equal(white.images[0].numpy()[tissue], plain.images[0].numpy()[tissue])
