"""Each public layout, made small, becomes paired tiles; what does not fit is refused by name."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from staindiffuser.errors import InputError, UsageError
from staindiffuser.imaging.errors import ImageError
from staindiffuser.imaging.image_files import read_image
from staindiffuser.imaging.optical_density import DAB_THRESHOLD, dab_density
from staindiffuser.training.errors import DataError
from staindiffuser.training.prepare.convert import brightfield, grid
from staindiffuser.training.prepare.importing import ImportRequest, ImportResult, import_tiles
from staindiffuser.training.prepare.layouts import LAYOUTS, Asked
from staindiffuser.training.tiles.paired_tiles import PairedTile, PairedTiles

SIDE = 64
PINK, BLUE, BROWN = (225, 170, 205), (150, 150, 210), (130, 80, 45)


def he(seed: int = 0) -> np.ndarray:
    """An H&E-like image in which each seed has its own pixels."""
    noise = np.random.default_rng(seed).integers(-20, 20, (SIDE, SIDE, 3))
    return np.clip(np.array(PINK) + noise, 0, 255).astype(np.uint8)


def ihc(shade: int = 0) -> np.ndarray:
    """Blue, a little lighter with each shade, with a brown square in rows and columns 8 to 24."""
    image = np.full((SIDE, SIDE, 3), BLUE, np.uint8) + np.uint8(shade)
    image[8:24, 8:24] = BROWN
    return image


def save(path: Path, image: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return path


def bci(root: Path) -> Path:
    for split, count in (("train", 12), ("test", 2)):
        for i in range(count):
            name = f"{i:05d}_{split}_{i % 4}{'+' if i % 4 else ''}.png"
            save(root / "HE" / split / name, he(i + 100 * (split == "train")))
            save(root / "IHC" / split / name, ihc())
    return root


def mist(root: Path, stain: str = "HER2") -> Path:
    for split, slides in (("train", ("1M21", "2M21")), ("val", ("3M21",))):
        for slide in slides:
            for row in range(2):
                save(root / stain / f"TrainValAB/{split}A/{slide}_7_{row}.jpg", he(2 * int(slide[0]) + row))
                save(root / stain / f"TrainValAB/{split}B/{slide}_7_{row}.jpg", ihc())
    return root


def hemit(root: Path) -> Path:
    for seed, (split, region) in enumerate((("test", "[79,48]"), ("train", "[64,49]"), ("val", "[12,53]"))):
        label = np.zeros((SIDE, SIDE, 3), np.uint8)
        label[8:24, 8:24, 0], label[40:56, 40:56, 1], label[..., 2] = 200, 200, 60
        save(root / split / "input" / f"{region}_patch_0_0.tif", he(seed))
        save(root / split / "label" / f"{region}_patch_0_0.tif", label)
    return root


def pix2pix(root: Path) -> Path:
    for seed, split in enumerate(("test", "train", "val")):
        save(root / split / f"{split}1.png", np.concatenate([he(seed), ihc(seed)], axis=1))
    return root


def deepliif(root: Path) -> Path:
    seg = np.zeros((SIDE, SIDE, 3), np.uint8)
    seg[30:50, 30:50], seg[31:49, 31:49] = (0, 255, 0), (255, 0, 0)
    seg[2:12, 2:12] = (0, 0, 255)
    dark = np.zeros((SIDE, SIDE, 3), np.uint8)
    splits = (("Testing", "Lung_3_4"), ("Training", "Bladder_22000_40000"), ("Validation", "Lung_1_2"))
    for seed, (split, region) in enumerate(splits):
        for copy, name in enumerate((f"{region}_0_3", f"{region}_0_3_1.20_0.70")):
            row = np.concatenate([ihc(), he(2 * seed + copy), dark, dark, dark, seg], axis=1)
            save(root / f"DeepLIIF_{split}_Set" / f"{name}.png", row)
    return root


def folder(root: Path) -> Path:
    for case in range(12):
        save(root / "he" / f"case{case}" / "a.png", he(case))
        save(root / "CD3" / f"case{case}" / "a.png", ihc())
        save(root / "ck818" / f"case{case}" / "a.png", ihc())
        mask = np.zeros((SIDE, SIDE), np.uint8)
        mask[40:60, 40:60] = 1
        save(root / "cd3_mask" / f"case{case}" / "a.png", mask)
    return root


MAKERS = {"bci": bci, "mist": mist, "hemit": hemit, "pix2pix": pix2pix, "deepliif": deepliif, "folder": folder}


def run(
    layout: str, source: Path, output: Path, *, asked: Asked | None = None, mpp: float | None = 0.5, **changes: Any
) -> tuple[ImportResult, PairedTiles]:
    """Import, at the model's pixel size so that pixels stay what they are."""
    if layout == "pix2pix" and asked is None:
        asked = Asked(stains=("her2",))
    request = ImportRequest(layout=layout, source=source, output=output, asked=asked or Asked(), mpp=mpp, tile=32)
    result = import_tiles(dataclasses.replace(request, **changes))
    return result, PairedTiles.load(output, check="pixels", mpp=0.5)


def mask_of(tile: PairedTile, stain: str) -> np.ndarray:
    mask = tile.masks[stain]
    assert mask is not None
    return read_image(mask, mode="L")


def test_every_layout_is_tested() -> None:
    assert set(MAKERS) == set(LAYOUTS)


@pytest.mark.parametrize(
    ("layout", "stains", "pairs", "slides"),
    [
        ("bci", ("her2",), 14, {"train": 11, "val": 1, "test": 2}),
        ("mist", ("her2",), 6, {"train": 2, "val": 1, "test": 0}),
        ("hemit", ("panck", "cd3"), 3, {"train": 1, "val": 1, "test": 1}),
        ("pix2pix", ("her2",), 3, {"train": 1, "val": 1, "test": 1}),
        ("deepliif", ("ki67",), 6, {"train": 1, "val": 1, "test": 1}),
        ("folder", ("cd3", "ck818"), 12, {"train": 11, "val": 1, "test": 0}),
    ],
)
def test_layout(tmp_path: Path, layout: str, stains: tuple[str, ...], pairs: int, slides: dict[str, int]) -> None:
    result, tiles = run(layout, MAKERS[layout](tmp_path / "source"), tmp_path / "tiles")
    assert (tiles.stains, result.pairs, result.slides) == (stains, pairs, slides)
    assert result.tiles == result.written == len(tiles.tiles) == 4 * pairs
    first = tiles.tiles[0]
    expected = he() if layout != "mist" else read_image(tmp_path / "source/HER2/TrainValAB/trainA/1M21_7_0.jpg")
    np.testing.assert_array_equal(read_image(first.he), expected[:32, :32])
    # The brown square lies in each pair's first tile, and nowhere else.
    if layout not in ("hemit", "deepliif"):
        stain = stains[-1]
        np.testing.assert_allclose(read_image(first.image(stain))[16, 16], BROWN, atol=20)  # JPEG
        assert mask_of(first, stain)[16, 16] == 255
        assert mask_of(tiles.tiles[1], stain).max() == 0


def test_names_that_tell_the_slide_do(tmp_path: Path) -> None:
    _, tiles = run("mist", mist(tmp_path / "m"), tmp_path / "t1")
    assert {tile.slide for tile in tiles.tiles} == {"1M21", "2M21", "3M21"}
    _, tiles = run("hemit", hemit(tmp_path / "h"), tmp_path / "t2")
    assert {tile.slide for tile in tiles.tiles} == {"[64,49]", "[12,53]", "[79,48]"}
    _, tiles = run("deepliif", deepliif(tmp_path / "d"), tmp_path / "t3")
    assert {tile.slide for tile in tiles.tiles} == {"Bladder_22000_40000", "Lung_1_2", "Lung_3_4"}
    _, tiles = run("folder", folder(tmp_path / "f"), tmp_path / "t4")
    assert {tile.slide for tile in tiles.tiles} == {f"case{i}" for i in range(12)}


def test_names_that_do_not_are_said_not_to(tmp_path: Path) -> None:
    source = bci(tmp_path / "s")
    result, _ = run("bci", source, tmp_path / "t")
    assert any("14 of 14 images do not tell" in note for note in result.notes)
    assert any("'val' was taken" in note for note in result.notes)
    pattern = re.compile(r"^\d+_(train|test)")
    told, tiles = run("bci", source, tmp_path / "u", asked=Asked(slide_pattern=pattern), val_share=0.0)
    assert {tile.slide for tile in tiles.tiles} == {"train", "test"}
    assert not any("do not tell" in note for note in told.notes)
    with pytest.raises(DataError, match="does not match the slide pattern"):
        run("bci", source, tmp_path / "v", asked=Asked(slide_pattern=re.compile(r"^(case\d)?")))


def test_patients_are_dealt_whole(tmp_path: Path) -> None:
    """Twelve slides, three of them of one patient."""
    source = folder(tmp_path / "s")
    asked = Asked(patient_pattern=re.compile(r"^case(\d)"))
    result, tiles = run("folder", source, tmp_path / "t", asked=asked)
    patients = {tile.slide: tile.patient for tile in tiles.tiles}
    assert patients["case10"] == patients["case11"] == patients["case1"] == "1"
    assert len({tile.split for tile in tiles.tiles if tile.patient == "1"}) == 1
    assert result.slides["train"] + result.slides["val"] == 12
    with pytest.raises(DataError, match="does not match the patient pattern"):
        run("folder", source, tmp_path / "u", asked=Asked(patient_pattern=re.compile(r"(case1\d)")))
    crossed = Asked(slide_pattern=re.compile(r"(case)"), patient_pattern=re.compile(r"^case(\d)"))
    with pytest.raises(DataError, match="slide 'case' is of patient"):
        run("folder", source, tmp_path / "u", asked=crossed)


def test_hemit_is_drawn_from_fluorescence(tmp_path: Path) -> None:
    result, tiles = run("hemit", hemit(tmp_path / "s"), tmp_path / "t")
    panck, cd3 = tiles.tiles[0], tiles.tiles[3]
    assert "fluorescence" in result.notes[0]
    assert mask_of(panck, "panck")[16, 16] == 255
    assert mask_of(panck, "cd3").max() == 0
    assert mask_of(cd3, "cd3")[16, 16] == 255
    marker = np.arange(0, 256, dtype=np.uint8)[None].repeat(32, 0)
    density = dab_density(brightfield(marker, np.full_like(marker, 90)))[16]
    first = int(np.argmax(density >= DAB_THRESHOLD))
    assert abs(first / 255 - 0.15) < 0.01, "the note says 15 % of full scale"


def test_labels_in_masks_are_positive_cells(tmp_path: Path) -> None:
    """Cells 1 to n of each image: decided image by image, "128 or more" would leave nothing of them."""
    source = folder(tmp_path / "s")
    for case in range(12):
        mask = np.zeros((SIDE, SIDE), np.uint8)
        for number in range(case % 4 + 1):
            mask[8:20, 4 + 15 * number : 14 + 15 * number] = number + 1
        save(source / "cd3_mask" / f"case{case}" / "a.png", mask)
    result, tiles = run("folder", source, tmp_path / "t", mpp=0.5, tile=64)
    assert any("masks of cd3: labels" in note for note in result.notes)
    for tile in tiles.tiles:
        case = int(tile.slide.removeprefix("case"))
        assert (mask_of(tile, "cd3") >= 128).sum() == pytest.approx((case % 4 + 1) * 120, rel=0.1)


def test_masks_of_another_code_are_refused_unless_it_is_said(tmp_path: Path) -> None:
    source = folder(tmp_path / "s")
    for case in range(12):
        mask = np.zeros((SIDE, SIDE), np.uint8)
        mask[8:20, 8:20], mask[8:20, 40:52], mask[40:52, 8:20] = 1, 2, 2
        save(source / "cd3_mask" / f"case{case}" / "a.png", mask)
    with pytest.raises(DataError, match=r"masks of cd3 hold the values 0, 1, 2: .*--mask-code"):
        run("folder", source, tmp_path / "t", mpp=0.5, tile=64)
    assert not (tmp_path / "t/tiles.csv").exists()
    _, tiles = run("folder", source, tmp_path / "t", mpp=0.5, tile=64, mask_code="labels")
    assert (mask_of(tiles.tiles[0], "cd3") >= 128).sum() == pytest.approx(3 * 144, rel=0.1)


def test_deepliif_masks_are_its_positive_cells(tmp_path: Path) -> None:
    _, tiles = run("deepliif", deepliif(tmp_path / "s"), tmp_path / "t")
    whole = np.concatenate([mask_of(tile, "ki67") for tile in tiles.tiles[:2]], axis=1)
    whole = np.concatenate(
        [whole, np.concatenate([mask_of(tile, "ki67") for tile in tiles.tiles[2:4]], axis=1)], axis=0
    )
    assert whole[40, 40] == 255
    assert whole[6, 6] == 0, "negative cells are blue"
    assert abs(int((whole >= 128).sum()) - 18 * 18) < 30


def test_masks_of_the_source_are_kept(tmp_path: Path) -> None:
    _, tiles = run("folder", folder(tmp_path / "s"), tmp_path / "t")
    assert mask_of(tiles.tiles[3], "cd3")[18, 18] == 255, "given, though the image is not brown there"
    assert mask_of(tiles.tiles[0], "cd3").max() == 0
    assert mask_of(tiles.tiles[0], "ck818")[16, 16] == 255, "derived"


def test_images_are_resampled_to_the_models_pixel(tmp_path: Path) -> None:
    result, tiles = run("mist", mist(tmp_path / "s"), tmp_path / "t", mpp=0.25)
    assert (result.source_mpp, result.mpp, result.tiles) == (0.25, 0.5, 6)
    first = tiles.tiles[0]
    assert first.size == (32, 32)
    np.testing.assert_allclose(read_image(first.image("her2"))[8, 8], BROWN, atol=12)
    assert mask_of(first, "her2")[8, 8] > 200


def test_bci_has_the_pixel_size_of_its_publication(tmp_path: Path) -> None:
    result, tiles = run("bci", bci(tmp_path / "s"), tmp_path / "t", mpp=None)
    assert (result.source_mpp, tiles.tiles[0].mpp) == (0.46, 0.5)


def test_a_source_without_a_pixel_size_needs_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--mpp"):
        run("mist", mist(tmp_path / "s"), tmp_path / "t", mpp=None)


def test_pix2pix_can_be_the_other_way_round(tmp_path: Path) -> None:
    source = pix2pix(tmp_path / "s")
    _, tiles = run("pix2pix", source, tmp_path / "t", asked=Asked(stains=("er",), swap=True))
    np.testing.assert_array_equal(read_image(tiles.tiles[0].he), ihc()[:32, :32])


def test_mist_of_several_stains_asks_for_one(tmp_path: Path) -> None:
    mist(tmp_path / "s")
    source = mist(tmp_path / "s", "ER")
    with pytest.raises(UsageError, match=r"ER, HER2.*choose one"):
        run("mist", source, tmp_path / "t")
    assert run("mist", source, tmp_path / "t", asked=Asked(stains=("er",)))[1].stains == ("er",)
    assert run("mist", source / "HER2", tmp_path / "u")[1].stains == ("her2",)


def shared_slide(source: Path) -> None:
    for side in "AB":
        folder = source / "HER2/TrainValAB"
        (folder / f"val{side}/3M21_7_0.jpg").rename(folder / f"val{side}/2M21_9_9.jpg")


def test_slides_in_two_splits_are_refused_and_can_be_dealt_anew(tmp_path: Path) -> None:
    source = mist(tmp_path / "s")
    shared_slide(source)
    with pytest.raises(DataError, match=r"2M21_9_9.*'2M21'.*'val'.*'train'.*2M21_7_0.*--resplit"):
        run("mist", source, tmp_path / "t")
    result, _ = run("mist", source, tmp_path / "t", resplit=True, val_share=0.34)
    assert result.slides == {"train": 2, "val": 1, "test": 0}


@pytest.mark.parametrize(
    ("layout", "change", "words"),
    [
        ("bci", lambda s: (s / "IHC/train/00003_train_3+.png").write_bytes(b"x"), ["00003_train_3+.png", "read as"]),
        ("bci", lambda s: save(s / "IHC/test/00000_test_0.png", he()[:40]), ["00000_test_0", "64 x 40", "64 x 64"]),
        ("bci", lambda s: (s / "IHC/train/00003_train_3+.png").unlink(), ["HE/train/00003_train_3+.png", "no partner"]),
        ("bci", lambda s: (s / "HE/train/00003_train_3+.png").unlink(), ["IHC/train/00003_train_3+.png", "no partner"]),
        ("bci", lambda s: (s / "IHC").rename(s / "ihc2"), ["'bci'", "expected HE/train", "holds HE, ihc2"]),
        ("bci", lambda s: (s / "IHC/test").rename(s / "IHC/other"), ["IHC/test", "not there"]),
        ("hemit", lambda s: (s / "val/label").rename(s / "val/labels"), ["val/label", "not there"]),
        ("pix2pix", lambda s: save(s / "val/odd.png", he()), ["odd.png", "64 x 64", "side by side"]),
        ("deepliif", lambda s: save(s / "train/x.png", ihc().repeat(2, 1)), ["x.png", "128 x 64", "6 images"]),
        ("folder", lambda s: save(s / "he/case0/a.jpg", he()), ["a.jpg", "a.png", "same name"]),
        ("folder", lambda s: save(s / "he/case0/a.png", he()[..., 0].astype(np.uint16)), ["a.png", "8 bits"]),
        ("folder", lambda s: save(s / "cd3_mask/case1/a.png", he()[:9, :, 0]), ["cd3_mask", "64 x 9", "64 x 64"]),
    ],
)
def test_what_is_refused(tmp_path: Path, layout: str, change: Callable[[Path], object], words: list[str]) -> None:
    source = MAKERS[layout](tmp_path / "s")
    change(source)
    with pytest.raises(InputError) as caught:
        run(layout, source, tmp_path / "t")
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "t/tiles.csv").exists()


def test_a_truncated_image_is_found_while_reading(tmp_path: Path) -> None:
    source = bci(tmp_path / "s")
    path = source / "HE/train/00005_train_1+.png"
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(ImageError, match="00005_train"):
        run("bci", source, tmp_path / "t")
    assert not (tmp_path / "t/tiles.csv").exists()
    save(path, he(5))
    result, _ = run("bci", source, tmp_path / "t")
    assert 0 < result.written < result.tiles == 56, "goes on where it stopped"


def test_a_copy_in_another_split_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = bci(tmp_path / "s")
    save(source / "HE/test/00001_test_1+.png", he(105))
    with pytest.raises(DataError, match=r"train/00005_train_1\+.* is the same image as .*test/00001_test_1\+"):
        run("bci", source, tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_empty_and_absent_sources(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a folder"):
        run("bci", tmp_path / "none", tmp_path / "t")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds nothing"):
        run("bci", tmp_path / "empty", tmp_path / "t")
    for name in ("train/input", "train/label"):
        (tmp_path / "bare" / name).mkdir(parents=True)
    with pytest.raises(DataError, match="no images"):
        run("hemit", tmp_path / "bare", tmp_path / "t")


def test_images_smaller_than_a_tile(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"smaller than a tile.*--tile"):
        run("mist", mist(tmp_path / "s"), tmp_path / "t", mpp=0.125)


def test_too_few_slides_to_deal(tmp_path: Path) -> None:
    for stain in ("he", "cd3"):
        save(tmp_path / "s" / stain / "one.png", ihc())
    with pytest.raises(DataError, match="too few slides"):
        run("folder", tmp_path / "s", tmp_path / "t")
    assert run("folder", tmp_path / "s", tmp_path / "t", val_share=0.0)[0].slides["train"] == 1


def test_another_import_is_not_mixed_in(tmp_path: Path) -> None:
    source = mist(tmp_path / "s")
    first, _ = run("mist", source, tmp_path / "t")
    assert run("mist", source, tmp_path / "t")[0].written == 0 < first.written
    with pytest.raises(UsageError, match="mpp differs"):
        run("mist", source, tmp_path / "t", mpp=0.4)
    before = (tmp_path / "t/tiles.csv").read_bytes()
    with pytest.raises(UsageError, match="source differs"):
        run("mist", mist(tmp_path / "s", "ER") / "ER", tmp_path / "t")
    assert (tmp_path / "t/tiles.csv").read_bytes() == before


@pytest.mark.parametrize("change", ["another source of this name", "grown", "an image less"])
def test_another_source_is_not_mixed_in(tmp_path: Path, change: str) -> None:
    source = tmp_path / "here" / "s"
    for name in "abcdef":
        save(source / "he" / f"{name}.png", he(ord(name)))
        save(source / "cd3" / f"{name}.png", ihc())
    run("folder", source, tmp_path / "t")
    if change == "grown":
        for column in ("he", "cd3"):
            save(source / column / "g.png", he())
    elif change == "an image less":
        for column in ("he", "cd3"):
            (source / column / "f.png").unlink()
    else:
        other = tmp_path / "there" / "s"
        for name in "abcdef":
            save(other / "he" / f"{name}.png", he(ord(name)))
            save(other / "cd3" / f"{name}.png", he(8))
        source = other
    with pytest.raises(UsageError, match=r"(images|source) differs"):
        run("folder", source, tmp_path / "t")


@pytest.mark.parametrize(
    "change", [{"tile": 20}, {"val_share": 0.9}, {"val_share": -0.1}, {"mpp": 0.0}, {"layout": "none"}, {"jobs": -1}]
)
def test_settings_that_cannot_be(tmp_path: Path, change: dict[str, Any]) -> None:
    request = ImportRequest(layout="bci", source=tmp_path, output=tmp_path)
    with pytest.raises(UsageError, match=next(iter(change)).replace("_", ".")):
        dataclasses.replace(request, **change)


def test_grid_reaches_from_end_to_end() -> None:
    assert grid(512, 256) == [0, 256]
    assert grid(942, 256) == [0, 229, 457, 686]
    assert grid(520, 256) == [0, 264]
    assert grid(300, 256) == [22]
