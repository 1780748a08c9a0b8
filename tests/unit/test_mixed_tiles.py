"""Folders of tiles mixed by weight: exact shares, every tile once, and a pure function of the sample's number."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from staindiffuser.errors import UsageError
from staindiffuser.training.data.dataset import CropDataset
from staindiffuser.training.data.targets import measure_stains
from staindiffuser.training.errors import DataError
from staindiffuser.training.tiles.mixed_tiles import BLOCK, MixedTiles, Schedule, open_tiles
from staindiffuser.training.tiles.paired_tiles import PairedTiles, Split
from staindiffuser.training.tiles.writing import PairedTilesWriter

SPLITS: list[Split] = ["train", "train", "train", "val"]


def make(
    folder: Path, level: int, *, stains: tuple[str, ...] = ("cd3",), slide: str = "", mpp: float = 0.5, count: int = 8
) -> Path:
    """Tiles of one grey level, three quarters of them for training."""
    image = np.full((32, 32, 3), level, np.uint8)
    with PairedTilesWriter(folder, stains, masks=False) as writer:
        for i in range(count):
            writer.add(
                f"t{i}", he=image, stains=dict.fromkeys(stains, image), slide=f"{slide or folder.name}{i % 4}",
                split=SPLITS[i % 4], mpp=mpp,
            )  # fmt: skip
    return folder


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    return make(tmp_path / "a", 200, count=16), make(tmp_path / "b", 100)


def mixed(*specs: str | Path) -> MixedTiles:
    tiles = open_tiles(specs)
    assert isinstance(tiles, MixedTiles)
    return tiles


def test_one_folder_is_itself(two: tuple[Path, Path]) -> None:
    for spec in (two[0], f"{two[0]}=3"):
        tiles = open_tiles([spec])
        assert isinstance(tiles, PairedTiles)
        assert tiles.folder == two[0]
        assert tiles.shares == (1.0,)


def test_shares_hold_exactly_over_a_block(two: tuple[Path, Path]) -> None:
    tiles = mixed(two[0], f"{two[1]}=0.25")
    assert tiles.shares == (0.8, 0.2)
    schedule = Schedule(tiles, seed=4)
    parts = [schedule(sample)[0] for sample in range(3 * BLOCK)]
    for block in range(3):
        assert Counter(parts[block * BLOCK : (block + 1) * BLOCK]) == {0: 800, 1: 200}
    assert parts[:BLOCK] != parts[BLOCK : 2 * BLOCK]


def test_every_tile_of_each_folder_is_seen_once_before_any_again(two: tuple[Path, Path]) -> None:
    schedule = Schedule(mixed(two[0], f"{two[1]}=0.5"), seed=0)
    for part, count in ((0, 12), (1, 6)):
        order = [tile for where, tile in map(schedule, range(2 * BLOCK)) if where == part]
        for start in range(0, 5 * count, count):
            assert sorted(order[start : start + count]) == list(range(count))


def test_a_sample_is_the_same_whenever_it_is_asked_for(two: tuple[Path, Path]) -> None:
    tiles = mixed(*two)
    forward, backward = Schedule(tiles, seed=1), Schedule(tiles, seed=1)
    numbers = range(0, 2500, 7)
    assert [forward(n) for n in numbers] == [backward(n) for n in reversed(numbers)][::-1]
    assert [forward(n) for n in numbers] != [Schedule(tiles, seed=2)(n) for n in numbers]


def test_crops_come_from_both(two: tuple[Path, Path]) -> None:
    data = CropDataset(mixed(two[0], f"{two[1]}=3"), crop=32, seed=0, jitter=0.0)
    assert len(data) == 18
    levels = Counter(int(data[sample].images[0, 0, 0, 0]) for sample in range(400))
    assert set(levels) == {100, 200}
    assert abs(levels[100] / 400 - 0.75) < 0.07


def test_constants_are_those_of_the_mixture(two: tuple[Path, Path]) -> None:
    stain = measure_stains(mixed(f"{two[0]}=1", f"{two[1]}=3"))[0]
    np.testing.assert_allclose(stain.image_mean, (0.25 * 200 + 0.75 * 100) / 255, atol=1e-3)
    np.testing.assert_allclose(stain.image_std, 100 / 255 * np.sqrt(0.25 * 0.75), atol=1e-3)


def test_validation_takes_turns(two: tuple[Path, Path]) -> None:
    rows = mixed(*two).split("val")
    assert [row.file.parent.name for row in rows] == ["a", "b", "a", "b", "a", "a"]


def test_stains_must_agree(tmp_path: Path) -> None:
    one = make(tmp_path / "a", 10, stains=("cd3", "ck818"))
    other = make(tmp_path / "b", 10, stains=("ck818",))
    for specs in ((one, other), (other, one)):
        with pytest.raises(DataError, match=r"b/tiles\.csv: no column 'cd3', which .*a has"):
            open_tiles(specs)
    assert mixed(one, make(tmp_path / "c", 10, stains=("ck818", "cd3"))).stains == ("cd3", "ck818")


def test_pixel_sizes_must_agree(two: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"c/tiles\.csv, row 2: mpp is 0\.25, but .*a has 0\.5"):
        open_tiles([two[0], make(tmp_path / "c", 10, mpp=0.25)])
    with pytest.raises(DataError, match=r"a/tiles\.csv, row 2: mpp is 0\.5, but 0\.25 is needed"):
        open_tiles([two[0]], mpp=0.25)


def test_a_slide_in_the_splits_of_two_folders(two: tuple[Path, Path], tmp_path: Path) -> None:
    other = make(tmp_path / "c", 10, slide="x")
    text = (other / "tiles.csv").read_text().replace("x3,val", "a0,val")
    (other / "tiles.csv").write_text(text)
    with pytest.raises(DataError, match=r"c/tiles\.csv, row 5: slide 'a0' is in split 'val' here.*row 2 of .*a/tiles"):
        open_tiles([two[0], other])


@pytest.mark.parametrize("weight", ["x", "0", "-1", "nan", "inf", ""])
def test_weights_that_are_none(two: tuple[Path, Path], weight: str) -> None:
    with pytest.raises(UsageError, match="weight must be a positive number"):
        open_tiles([two[0], f"{two[1]}={weight}"])


def test_other_specs_that_are_refused(two: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least one"):
        open_tiles([])
    with pytest.raises(UsageError, match="named twice"):
        open_tiles([two[0], f"{two[0]}=2"])
    with pytest.raises(UsageError, match="below a thousandth"):
        Schedule(mixed(two[0], f"{two[1]}=0.0001"), seed=0)
    bare = make(tmp_path / "bare", 10)
    (bare / "tiles.csv").write_text((bare / "tiles.csv").read_text().replace(",train,", ",test,"))
    with pytest.raises(DataError, match=r"bare/tiles\.csv: no rows with split 'train'"):
        Schedule(mixed(two[0], bare), seed=0)


def test_a_folder_may_have_an_equals_sign(tmp_path: Path) -> None:
    folder = make(tmp_path / "sigma=3", 10)
    tiles = open_tiles([folder])
    assert isinstance(tiles, PairedTiles)
    assert tiles.folder == folder
