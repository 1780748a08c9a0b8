"""Masks of 0 and 1, of 0 and 255, and of labels are read as what they are, decided over the whole set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from staindiffuser.imaging.optical_density import coarse_mask
from staindiffuser.training.errors import DataError
from staindiffuser.training.tiles.mask_codes import MaskCode, MaskSurvey, as_coarse
from staindiffuser.training.tiles.paired_tiles import PairedTiles
from staindiffuser.training.tiles.writing import PairedTilesWriter

SIDE = 96


def labels(seed: int, *, cells: int = 12, first: int = 1) -> np.ndarray:
    """Cells that do not touch, each with a value of its own; of some seeds none at all."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    y, x = np.mgrid[:SIDE, :SIDE]
    chosen = rng.choice(25, size=0 if seed % 4 == 3 else cells, replace=False)
    for number, cell in enumerate(chosen):
        inside = np.hypot(y - 10 - 19 * (cell // 5), x - 10 - 19 * (cell % 5)) <= rng.uniform(4, 8)
        mask[inside] = first + number
    return mask


def survey(masks: list[np.ndarray]) -> MaskSurvey:
    found = MaskSurvey()
    for mask in masks:
        found.add(mask)
    return found


def coded(code: str, seed: int) -> np.ndarray:
    mask = labels(seed)
    if code == "ones":
        return (mask > 0).astype(np.uint8)
    if code == "binary":
        return np.where(mask > 0, 255, 0).astype(np.uint8)
    if code == "coarse":
        return coarse_mask(mask > 0)
    if code == "jpeg":
        noise = np.random.default_rng(seed).integers(0, 6, mask.shape)
        return np.where(mask > 0, 255 - noise, noise).astype(np.uint8)
    return labels(seed, first=180) if code == "high labels" else mask


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("ones", "ones"),
        ("binary", "grey"),
        ("coarse", "grey"),
        ("jpeg", "grey"),
        ("labels", "labels"),
        ("high labels", "labels"),
    ],
)
def test_codes_are_told_from_the_set(kind: str, code: MaskCode) -> None:
    masks = [coded(kind, seed) for seed in range(8)]
    assert survey(masks).code("masks") == code
    for seed, mask in enumerate(masks):
        np.testing.assert_array_equal(
            as_coarse(mask, code) >= 128, coded("coarse" if kind == "coarse" else "binary", seed) >= 128
        )


def test_one_cell_in_a_mask_does_not_make_labels_ones() -> None:
    """What each mask of its own would be read as: 1 is all there is in the first, the third has none."""
    masks = [labels(0, cells=1), labels(1), labels(3)]
    assert survey(masks).code("masks") == "labels"
    assert survey([np.zeros((8, 8), np.uint8)]).code("masks") == "grey"


@pytest.mark.parametrize(
    ("values", "shown"),
    [((0, 1, 2), "0, 1, 2"), ((0, 128, 255), "0, 128, 255"), ((0, 100), "0, 100"), ((1, 2), "1, 2")],
)
def test_other_values_are_refused_by_name(values: tuple[int, ...], shown: str) -> None:
    classes = [np.array(values, np.uint8)[labels(seed) % len(values)] for seed in range(4)]
    with pytest.raises(DataError, match=f"cd3_mask hold the values {shown}: .*convert them to 0"):
        survey(classes).code("cd3_mask")


@pytest.mark.parametrize("kind", ["ones", "labels", "binary"])
def test_a_folder_gives_masks_of_any_code_as_0_and_255(tmp_path: Path, kind: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    with PairedTilesWriter(tmp_path, ["cd3"]) as writer:
        for seed in range(4):
            he = np.roll(image, seed, axis=0)
            writer.add(
                f"t{seed}",
                he=he,
                stains={"cd3": he},
                masks={"cd3": coded(kind, seed)},
                slide=f"s{seed}",
                split="train",
                mpp=0.5,
            )
    for check in ("headers", "pixels"):
        tiles = PairedTiles.load(tmp_path, check=check)
        assert {tile.mask_codes["cd3"] for tile in tiles.tiles} == {"grey" if kind == "binary" else kind}
        for seed, tile in enumerate(tiles.tiles):
            mask = tile.read_mask("cd3")
            assert mask is not None
            np.testing.assert_array_equal(mask, coded("binary", seed))


def test_a_mask_of_another_code_than_the_folder_is_named(tmp_path: Path) -> None:
    test_a_folder_gives_masks_of_any_code_as_0_and_255(tmp_path, "ones")
    tile = PairedTiles.load(tmp_path).tiles[1]
    Image.fromarray(coded("binary", 1)).save(tmp_path / "cd3_mask/t1.png")
    with pytest.raises(DataError, match=r"t1\.png holds the value 255, but the folder's other masks hold 0 and 1"):
        tile.read_mask("cd3")
    with pytest.raises(DataError, match="hold the values 0, 1, 255"):
        PairedTiles.load(tmp_path)
