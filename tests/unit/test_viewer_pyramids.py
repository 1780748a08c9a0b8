"""The H&E as tiles: a slide's own JPEG tiles are sent as they lie in the file, the rest is made of its pixels."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.errors import SlideError
from staindiffuser.imaging.slides import open_slide
from staindiffuser.viewer.errors import NotThereError
from staindiffuser.viewer.pyramids import SlidePyramid, TileCache

SIZE = (1300, 1100)


def decoded(data: bytes) -> UInt8Array:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.fixture(scope="module")
def drawn() -> UInt8Array:
    """Smooth colours: JPEG hardly changes them, and every place has its own."""
    yy, xx = np.mgrid[: SIZE[1], : SIZE[0]]
    return np.stack([xx * 200 / SIZE[0] + 40, yy * 200 / SIZE[1] + 40, (xx + yy) % 200 / 2 + 80], -1).astype(np.uint8)


def write(path: Path, drawn: UInt8Array, *, tile: int = 256, reductions: tuple[int, ...] = (1, 4)) -> Path:
    """A pyramidal TIFF of JPEG tiles whose reduced levels are rounded down, as Aperio's are."""
    with tifffile.TiffWriter(path) as tiff:
        for reduction in reductions:
            height, width = (length // reduction for length in drawn.shape[:2])
            small = np.asarray(Image.fromarray(drawn).resize((width, height), Image.Resampling.BOX))
            tiff.write(
                small, tile=(tile, tile), photometric="rgb", compression="jpeg", compressionargs={"level": 95},
                subfiletype=int(reduction > 1), metadata=None, resolution=(20000 / reduction, 20000 / reduction),
                resolutionunit="CENTIMETER",
            )  # fmt: skip
    return path


def pyramid(path: Path) -> SlidePyramid:
    return SlidePyramid(open_slide(path), TileCache(10**7), "he", own_tiles=True)


def test_a_slides_own_tiles_are_sent_and_the_rest_shows_the_same(tmp_path: Path, drawn: UInt8Array) -> None:
    path = write(tmp_path / "slide.tiff", drawn)
    image = pyramid(path)
    assert image.levels == ((1300, 1100), (650, 550), (325, 275))
    assert image.sides == (256, 512, 512)
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        stored = path.read_bytes()[page.dataoffsets[7] :][: page.databytecounts[7]]
    assert image.tile(0, 1, 1)[-1000:] == stored[-1000:]  # the tables and the colour's mark stand before
    for level, side in enumerate(image.sides):
        columns, rows = (-(-length // side) for length in image.levels[level])
        whole = np.asarray(Image.fromarray(drawn).resize(image.levels[level], Image.Resampling.BOX)).astype(int)
        for column in range(columns):
            for row in range(rows):
                tile = decoded(image.tile(level, column, row)).astype(int)
                part = whole[row * side :, column * side :][:side, :side]
                assert tile.shape == part.shape
                assert np.abs(tile - part).mean() < 3
        with pytest.raises(NotThereError):
            image.tile(level, columns, 0)


def test_a_level_that_is_made_of_the_slides_own_tiles(tmp_path: Path, drawn: UInt8Array) -> None:
    """Without a small level, a coarse tile is put together from smaller ones."""
    large = np.tile(drawn, (3, 3, 1))
    image = pyramid(write(tmp_path / "flat.tiff", large, tile=240, reductions=(1,)))
    assert image.sides == (240, 512, 512, 512)
    assert (len(image.levels), image.levels[2]) == (4, (975, 825))
    shown = np.asarray(Image.fromarray(large).resize(image.levels[2], Image.Resampling.BOX)).astype(int)
    assert np.abs(decoded(image.tile(2, 0, 0)).astype(int) - shown[:512, :512]).mean() < 4
    assert np.abs(decoded(image.tile(2, 1, 1)).astype(int) - shown[512:, 512:]).mean() < 4


@pytest.mark.parametrize("tile", [128, 2048])
def test_tiles_of_a_side_that_does_not_fit_are_made(tmp_path: Path, drawn: UInt8Array, tile: int) -> None:
    image = pyramid(write(tmp_path / "slide.tiff", drawn, tile=tile, reductions=(1,)))
    assert image.sides == (512, 512, 512)
    assert decoded(image.tile(0, 1, 1)).shape == (512, 512, 3)


def test_a_damaged_tile_is_never_sent(tmp_path: Path, drawn: UInt8Array) -> None:
    path = write(tmp_path / "slide.tiff", drawn, reductions=(1,))
    with tifffile.TiffFile(path) as tiff:
        offset, count = tiff.pages[0].dataoffsets[7], tiff.pages[0].databytecounts[7]
    content = bytearray(path.read_bytes())
    content[offset + count // 2 : offset + count] = bytes(count - count // 2)
    path.write_bytes(content)
    image = pyramid(path)
    assert decoded(image.tile(0, 0, 0)).shape == (256, 256, 3)
    with pytest.raises(SlideError, match=r"damaged: tile 7 of level 0"):
        image.tile(0, 1, 1)


def test_aperios_rgb_is_marked_as_such(real_data: Path) -> None:
    """Aperio's tiles are RGB and do not say so: a browser would take them for YCbCr."""
    slide = open_slide(real_data / "slides" / "CMU-1-Small-Region.svs")
    image = SlidePyramid(slide, TileCache(10**7), "he", own_tiles=True)
    assert image.sides[0] == 240
    pixels = slide.read(0, 720, 720, 240, 240).astype(int)
    assert np.abs(decoded(image.tile(0, 3, 3)).astype(int) - pixels).max() <= 2
