"""Readers: every format gives the same pixels, knows its pixel size, and refuses what is damaged."""

import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from staindiffuser.imaging import pixel_size
from staindiffuser.imaging.errors import IncompleteSlideError, MissingPixelSizeError, SlideError
from staindiffuser.imaging.slides import open_slide

CMU = "slides/CMU-1-Small-Region.svs"
TCGA = "slides/tcga-cr-7395-01a-01-ts1.svs"


def image(height: int = 300, width: int = 400) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_a_whole_slide_gives_openslides_pixels(real_data: Path) -> None:
    with open_slide(real_data / CMU) as slide, openslide.OpenSlide(real_data / CMU) as reference:
        assert slide.size == (2220, 2967)
        assert slide.pixel_size() == (0.499, 0.499)
        assert slide.format == "aperio (tifffile)", "the fast reader is used"
        for x, y, width, height in ((0, 0, 300, 200), (1111, 1313, 500, 41), (2000, 2900, 220, 67)):
            expected = np.asarray(reference.read_region((x, y), 0, (width, height)))[..., :3]
            np.testing.assert_array_equal(slide.read(0, x, y, width, height), expected)


def test_a_slide_without_a_pixel_size_asks_for_it(real_data: Path) -> None:
    with open_slide(real_data / TCGA) as slide:
        with pytest.raises(MissingPixelSizeError, match="--mpp"):
            slide.pixel_size()
        assert slide.pixel_size(0.25) == (0.25, 0.25)
        assert slide.exact_levels == (0, 1)


def test_ome_tiff_says_its_pixel_size(real_data: Path) -> None:
    with open_slide(real_data / "crops/OS-1-detail.ome.tif") as slide:
        assert slide.size == (1101, 1101)
        assert slide.pixel_size() == pytest.approx((0.2271, 0.2271), abs=1e-4)
        np.testing.assert_array_equal(slide.read(0, 700, 300, 250, 400), tifffile.imread(slide.path)[300:700, 700:950])


def test_a_png_is_read_but_has_no_pixel_size(real_data: Path) -> None:
    with open_slide(real_data / "crops/medium-nuclei-score-level1.png") as slide:
        assert slide.size == (512, 512)
        with pytest.raises(MissingPixelSizeError):
            slide.pixel_size()


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_alpha_is_laid_on_white(tmp_path: Path, suffix: str) -> None:
    rgb = image()
    alpha = np.zeros((300, 400, 1), dtype=np.uint8)
    alpha[:, 200:] = 255
    path = tmp_path / f"a{suffix}"
    if suffix == ".png":
        Image.fromarray(np.concatenate([rgb, alpha], axis=-1)).save(path)
    else:
        rgba = np.concatenate([rgb, alpha], axis=-1)
        tifffile.imwrite(path, rgba, photometric="rgb", extrasamples=["unassalpha"])
    with open_slide(path) as slide:
        read = slide.read(0, 0, 0, 400, 300)
    assert (read[:, :200] == 255).all()
    np.testing.assert_array_equal(read[:, 200:], rgb[:, 200:])


@pytest.mark.parametrize(
    "options", [{}, {"tile": (64, 48)}, {"rowsperstrip": 7}, {"compression": "lzw", "tile": (64, 64)}]
)
def test_tiffs_of_tiles_and_strips(tmp_path: Path, options: dict[str, Any]) -> None:
    rgb = image()
    path = tmp_path / "t.tif"
    tifffile.imwrite(path, rgb, photometric="rgb", resolution=(20000, 20000), resolutionunit="CENTIMETER", **options)
    with open_slide(path) as slide:
        assert slide.pixel_size() == pytest.approx((0.5, 0.5))
        np.testing.assert_array_equal(slide.read(0, 33, 50, 301, 199), rgb[50:249, 33:334])


def test_a_screens_resolution_is_no_pixel_size(tmp_path: Path) -> None:
    Image.fromarray(image()).save(tmp_path / "a.png", dpi=(72, 72))
    Image.fromarray(image()).save(tmp_path / "b.png", dpi=(50800, 50800))
    tifffile.imwrite(tmp_path / "c.tif", image(), photometric="rgb", resolution=(72, 72), resolutionunit="INCH")
    tifffile.imwrite(tmp_path / "d.tif", image(), photometric="rgb", resolution=(20000, 20000), resolutionunit="NONE")
    for name in ("a.png", "c.tif", "d.tif"):
        with open_slide(tmp_path / name) as slide:
            assert slide.mpp is None
    with open_slide(tmp_path / "b.png") as slide:
        assert slide.pixel_size() == pytest.approx((0.5, 0.5), rel=1e-3)


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ('PhysicalSizeX="0.25" PhysicalSizeY="0.25"', (0.25, 0.25)),
        ('PhysicalSizeX="250" PhysicalSizeY="250" PhysicalSizeXUnit="nm" PhysicalSizeYUnit="nm"', (0.25, 0.25)),
        ('PhysicalSizeX="1" PhysicalSizeY="1" PhysicalSizeXUnit="pixel" PhysicalSizeYUnit="pixel"', None),
        ('PhysicalSizeX="0" PhysicalSizeY="0"', None),
        ("", None),
    ],
)
def test_ome_xml_units(attributes: str, expected: tuple[float, float] | None) -> None:
    xml = f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image><Pixels {attributes}/></Image></OME>'
    assert pixel_size.from_ome_xml(xml) == (None if expected is None else pytest.approx(expected))
    assert pixel_size.from_ome_xml("<broken") is None


def damaged(tmp_path: Path, real_data: Path) -> dict[str, Path]:
    """One file of every kind that must be refused."""
    whole = (real_data / CMU).read_bytes()
    rng = np.random.default_rng(0)
    tiled = tmp_path / "good.tif"
    tifffile.imwrite(tiled, image(), photometric="rgb", tile=(64, 64), compression="zlib")
    good = tiled.read_bytes()
    png = tmp_path / "good.png"
    Image.fromarray(image()).save(png)
    contents = {
        "empty.svs": b"",
        "text.svs": b"this is not a slide\n" * 100,
        "truncated.svs": whole[: len(whole) // 2],
        "almost.svs": whole[:-1000],
        "random.tif": rng.bytes(20000),
        "magic.tif": b"II*\0" + rng.bytes(20000),
        "bigmagic.tif": b"II+\0" + rng.bytes(20000),
        "truncated.tif": good[: len(good) // 2],
        "truncated.png": png.read_bytes()[:2000],
        "random.png": b"\x89PNG\r\n\x1a\n" + rng.bytes(2000),
        "random.jpg": b"\xff\xd8\xff" + rng.bytes(2000),
        "text.txt": b"hello",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    return {name: tmp_path / name for name in contents}


def test_damaged_files_are_refused_in_one_line(tmp_path: Path, real_data: Path) -> None:
    for name, path in damaged(tmp_path, real_data).items():
        with pytest.raises(SlideError) as caught:
            open_slide(path).close()
        assert "\n" not in str(caught.value), name
        assert name in str(caught.value)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SlideError, match="does not exist"):
        open_slide(tmp_path / "nothing.svs")
    with pytest.raises(SlideError, match="folder"):
        open_slide(tmp_path)


def test_a_slide_whose_directory_comes_first_is_found_to_be_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "cut.tif"
    tifffile.imwrite(path, image(2000, 2000), photometric="rgb", tile=(256, 256))
    os.truncate(path, path.stat().st_size - 5000)
    with pytest.raises(IncompleteSlideError, match="incomplete"):
        open_slide(path)


def test_a_damaged_tile_is_refused_on_reading(tmp_path: Path) -> None:
    path = tmp_path / "hurt.tif"
    tifffile.imwrite(path, image(2000, 2000), photometric="rgb", tile=(256, 256), compression="zlib")
    with tifffile.TiffFile(path) as tiff:
        offset, count = tiff.pages.first.dataoffsets[9], tiff.pages.first.databytecounts[9]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(count))
    with open_slide(path) as slide:
        slide.read(0, 1000, 1000, 256, 256)
        with pytest.raises(SlideError, match="tile 9"):
            slide.read(0, 256, 256, 256, 256)


def test_what_is_not_rgb_is_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "grey.tif", image()[..., 0], photometric="minisblack")
    tifffile.imwrite(tmp_path / "deep.tif", image().astype(np.uint16), photometric="rgb")
    Image.fromarray(image()[..., 0]).save(tmp_path / "grey.png")
    for name in ("grey.tif", "deep.tif", "grey.png"):
        with pytest.raises(SlideError, match="RGB"):
            open_slide(tmp_path / name)


def test_a_file_that_claims_a_giant_tile_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bomb.tif"
    tile = zlib.compress(bytes(1000))
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(
            iter([tile]), shape=(32768, 32768, 3), dtype=np.uint8, tile=(32768, 32768), compression="zlib",
            photometric="rgb",
        )  # fmt: skip
    with pytest.raises(SlideError, match="claims"):
        open_slide(path)
