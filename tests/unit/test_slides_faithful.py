"""Readers read faithfully, or refuse and say why: no file gives a wrong image."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from staindiffuser.imaging import pixel_size
from staindiffuser.imaging.errors import PixelSizeError, SlideError
from staindiffuser.imaging.slides import DamagedRegion, open_slide

RESOLUTION: dict[str, Any] = {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}
TILED: dict[str, Any] = {"tile": (128, 128), **RESOLUTION}


def image(height: int = 512, width: int = 640) -> np.ndarray:
    """Tissue of a kind: smooth, coloured, different everywhere, so that JPEG changes little."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([170 + 30 * np.sin(x / 19), 110 + 30 * np.cos(y / 23), 150 + 25 * np.sin((x + y) / 31)], axis=-1)
    return pixels.astype(np.uint8)


def label(height: int = 100, width: int = 140) -> np.ndarray:
    pixels = np.full((height, width, 3), 255, np.uint8)
    pixels[30:60, 20:100] = 20
    return pixels


def read_all(path: Path, **options: Any) -> np.ndarray:
    with open_slide(path, **options) as slide:
        return slide.read(0, 0, 0, *slide.size)


def hurt(path: Path, tile: int, change: Callable[[bytearray], None]) -> None:
    """Change the compressed bytes of a tile."""
    with tifffile.TiffFile(path) as tiff:
        offset, count = tiff.pages.first.dataoffsets[tile], tiff.pages.first.databytecounts[tile]
    content = bytearray(path.read_bytes())
    part = content[offset : offset + count]
    change(part)
    content[offset : offset + count] = part[:count]
    path.write_bytes(content)


def zero_second_half(data: bytearray) -> None:
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)


def end_early(data: bytearray) -> None:
    data[len(data) // 2 : len(data) // 2 + 2] = b"\xff\xd9"


def cut_off(data: bytearray) -> None:
    data[-40:] = bytes(40)


@pytest.mark.parametrize(
    ("compression", "change"),
    [
        *((compression, zero_second_half) for compression in ("jpeg", "jpeg2000", "deflate", "lzw", "zstd")),
        *((compression, cut_off) for compression in ("jpeg", "jpeg2000", "deflate", "zstd")),
        *((compression, end_early) for compression in ("jpeg", "deflate")),
    ],
)
def test_a_damaged_tile_is_refused(tmp_path: Path, compression: str, change: Callable[[bytearray], None]) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, image(), photometric="rgb", compression=compression, **TILED)
    read_all(path)
    hurt(path, 7, change)
    with pytest.raises(SlideError, match=r"tile 7 .*--allow-damaged"):
        read_all(path)


def test_a_damaged_tile_may_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, image(), photometric="rgb", compression="jpeg", compressionargs={"level": 95}, **TILED)
    whole = read_all(path)
    hurt(path, 7, zero_second_half)
    with open_slide(path, allow_damaged=True) as slide:
        pixels = slide.read(0, 0, 0, *slide.size)
        assert slide.damaged == (DamagedRegion(level=0, x=256, y=128, width=128, height=128),)
    assert (pixels[128:256, 256:384] == 255).all()
    pixels[128:256, 256:384] = whole[128:256, 256:384]
    np.testing.assert_array_equal(pixels, whole)


@pytest.mark.parametrize("change", [zero_second_half, end_early])
def test_a_damaged_tile_of_a_whole_slide(real_data: Path, tmp_path: Path, change: Callable[[bytearray], None]) -> None:
    path = tmp_path / "a.svs"
    path.write_bytes((real_data / "slides/CMU-1-Small-Region.svs").read_bytes())
    hurt(path, 65, change)
    with pytest.raises(SlideError, match="damaged"):
        read_all(path)
    with open_slide(path, allow_damaged=True) as slide:
        slide.read(0, 0, 0, *slide.size)
        assert slide.damaged == (DamagedRegion(level=0, x=1200, y=1440, width=240, height=240),)


@pytest.mark.parametrize("change", [zero_second_half, end_early, cut_off])
def test_a_damaged_flat_jpeg_is_refused(tmp_path: Path, change: Callable[[bytearray], None]) -> None:
    buffer = io.BytesIO()
    Image.fromarray(image()).save(buffer, "JPEG", quality=95)
    content = bytearray(buffer.getvalue())
    change(content)
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(SlideError, match="damaged"):
        open_slide(tmp_path / "a.jpg")


def test_the_largest_image_is_the_slide(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(label(), photometric="rgb", subfiletype=1, metadata=None, **RESOLUTION)
        tiff.write(image(), photometric="rgb", metadata=None, **TILED)
    np.testing.assert_array_equal(read_all(path), image())


def test_an_ome_tiffs_macro_is_not_stained(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as tiff:
        for pixels, name, mpp in ((label(900, 900), "macro image", 16.0), (image(), "slide", 0.25)):
            metadata = {"axes": "YXS", "Name": name, "PhysicalSizeX": mpp, "PhysicalSizeY": mpp}
            tiff.write(pixels, photometric="rgb", tile=(128, 128), metadata=metadata)
    with open_slide(path) as slide:
        assert slide.size == (640, 512), "the macro is larger, but it is a macro"
        assert slide.mpp == (0.25, 0.25), "its own pixel size, not the first image's"
    with tifffile.TiffWriter(path, ome=True) as tiff:
        tiff.write(label(), photometric="rgb", metadata={"axes": "YXS", "Name": "Label"})
    with pytest.raises(SlideError, match="only label, macro"):
        open_slide(path)


def test_a_second_large_image_is_mentioned(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as tiff:
        for pixels in (image(), image(500, 640)):
            tiff.write(pixels, photometric="rgb", tile=(128, 128), metadata={"axes": "YXS"})
    with open_slide(path) as slide:
        assert slide.size == (640, 512)
        assert "2 large images" in slide.notes[0]


def test_an_ome_tiff_of_several_files_is_refused(tmp_path: Path) -> None:
    xml = (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:1"><Image ID="Image:0"><Pixels '
        'ID="Pixels:0" Type="uint8" SizeX="640" SizeY="512" SizeC="3" SizeZ="1" SizeT="1" DimensionOrder="XYCZT">'
        '<Channel ID="Channel:0" SamplesPerPixel="3"/><TiffData IFD="0"><UUID FileName="b.ome.tif">urn:uuid:2</UUID>'
        "</TiffData></Pixels></Image></OME>"
    )
    for name in ("a.ome.tif", "b.ome.tif"):
        tifffile.imwrite(tmp_path / name, image(), photometric="rgb", description=xml, metadata=None, **TILED)
    with pytest.raises(SlideError, match="several files"):
        open_slide(tmp_path / "a.ome.tif")


@pytest.mark.parametrize(
    ("mode", "words"), [("L", "greyscale"), ("CMYK", "CMYK"), ("LAB", "CIELab"), ("P", "palette"), ("1", "greyscale")]
)
def test_other_colour_models_are_refused_by_name(tmp_path: Path, mode: str, words: str) -> None:
    path = tmp_path / "a.tif"
    if mode == "LAB":
        tifffile.imwrite(path, image(), photometric="cielab", **TILED)
    else:
        Image.fromarray(image()).convert(mode).save(path)
    with pytest.raises(SlideError, match=words):
        open_slide(path)


def test_a_cmyk_jpeg_is_refused_by_name(tmp_path: Path) -> None:
    Image.fromarray(image()).convert("CMYK").save(tmp_path / "a.jpg")
    with pytest.raises(SlideError, match="CMYK"):
        open_slide(tmp_path / "a.jpg")


def test_a_fourth_sample_is_what_the_file_says(tmp_path: Path) -> None:
    rgb = image()
    alpha = np.full((*rgb.shape[:2], 1), 128, np.uint8)
    unnamed, premultiplied, straight = (
        tmp_path / "unnamed.tif",
        tmp_path / "premultiplied.tif",
        tmp_path / "straight.tif",
    )
    tifffile.imwrite(unnamed, np.dstack([rgb, 0 * alpha]), photometric="rgb", extrasamples=["unspecified"], **TILED)
    half = (rgb.astype(int) * 128 // 255).astype(np.uint8)
    tifffile.imwrite(premultiplied, np.dstack([half, alpha]), photometric="rgb", extrasamples=["assocalpha"], **TILED)
    tifffile.imwrite(straight, np.dstack([rgb, alpha]), photometric="rgb", extrasamples=["unassalpha"], **TILED)
    np.testing.assert_array_equal(read_all(unnamed), rgb)
    expected = rgb.astype(float) * 128 / 255 + 127
    assert np.abs(read_all(premultiplied) - expected).max() <= 1
    assert np.abs(read_all(straight) - expected).max() <= 1


@pytest.mark.parametrize(
    "options", [TILED, RESOLUTION, {**TILED, "compression": "jpeg"}, {**TILED, "compression": "zlib"}]
)
def test_planar_rgb_is_read(tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "a.tif"
    planes = np.ascontiguousarray(np.moveaxis(image(), -1, 0))
    tifffile.imwrite(path, planes, photometric="rgb", planarconfig="separate", **options)
    assert np.abs(read_all(path).astype(int) - image()).mean() < (1.5 if options.get("compression") == "jpeg" else 1e-9)


def test_tiles_that_are_not_stored_are_glass(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, image(), photometric="rgb", **TILED)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        page = tiff.pages.first
        offsets, counts = list(page.dataoffsets), list(page.databytecounts)
        for tile in (0, 6):
            offsets[tile] = counts[tile] = 0
        page.tags["TileOffsets"].overwrite(offsets)
        page.tags["TileByteCounts"].overwrite(counts)
    expected = image()
    expected[:128, :128] = 255
    expected[128:256, 128:256] = 255
    np.testing.assert_array_equal(read_all(path), expected)


def test_reduced_levels_that_show_something_else_are_ignored(tmp_path: Path) -> None:
    for name, reduced in (("blank", np.full((256, 320, 3), 255, np.uint8)), ("right", image()[::2, ::2])):
        path = tmp_path / f"{name}.tif"
        with tifffile.TiffWriter(path) as tiff:
            tiff.write(image(), photometric="rgb", subifds=1, **TILED)
            tiff.write(reduced, photometric="rgb", subfiletype=1, tile=(128, 128))
        with open_slide(path) as slide:
            assert len(slide.level_sizes) == (2 if name == "right" else 1)
            assert bool(slide.notes) == (name == "blank")


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_flat_images_orientation_is_obeyed(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / "a.png"
    upright = image(200, 300)
    turns: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: np.swapaxes(a, 0, 1),
        6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(np.swapaxes(a, 0, 1), 2), 8: lambda a: np.rot90(a, 3),
    }  # fmt: skip
    Image.fromarray(np.ascontiguousarray(turns[orientation](upright))).save(path, exif=exif)
    np.testing.assert_array_equal(read_all(path), upright)


def test_a_tiffs_orientation_is_not_ignored(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, image(), photometric="rgb", extratags=[(274, "H", 1, 3, True)], **TILED)
    with pytest.raises(SlideError, match="orientation 3"):
        open_slide(path)


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.svs")
    with pytest.raises(SlideError, match="not a regular file"):
        open_slide(tmp_path / "a.svs")


def test_several_images_in_a_flat_file_are_refused(tmp_path: Path) -> None:
    first, second = Image.fromarray(image()), Image.fromarray(255 - image())
    first.save(tmp_path / "a.png", save_all=True, append_images=[second])
    with pytest.raises(SlideError, match="2 images"):
        open_slide(tmp_path / "a.png")


def test_pixels_equal_openslides_at_every_level(real_data: Path) -> None:
    path = real_data / "slides/tcga-cr-7395-01a-01-ts1.svs"
    with open_slide(path) as slide, openslide.OpenSlide(path) as reference:
        # Elsewhere in level 1 OpenSlide interpolates: it is addressed by level-0 coordinates, 2.0005 times as large.
        for level, x, y in ((0, 100, 200), (0, 3000, 3100), (1, 0, 0)):
            expected = np.asarray(reference.read_region((x, y), level, (300, 200)))
            np.testing.assert_array_equal(slide.read(level, x, y, 300, 200), expected[..., :3])


@pytest.mark.parametrize(
    ("unit", "number"), [("micron", 2.0), ("\\u00B5m", 2.0), ("um", 2.0), ("mm", 2000.0), ("nm", 0.002)]
)
def test_imagejs_units_are_read(tmp_path: Path, unit: str, number: float) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, image(), imagej=True, resolution=(number, number), metadata={"unit": unit, "axes": "YXS"})
    with open_slide(path) as slide:
        assert slide.mpp == pytest.approx((0.5, 0.5), rel=1e-3)
    assert pixel_size.from_imagej("pixel", (2, 1), (2, 1)) is None
    assert pixel_size.from_imagej(None, (2, 1), (2, 1)) is None


def test_a_given_pixel_size_does_not_contradict_the_file(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", image(), photometric="rgb", **TILED)
    with open_slide(tmp_path / "a.tif") as slide:
        with pytest.raises(PixelSizeError, match=r"states a pixel size of 0\.5 µm, not 0\.25.*--force-mpp"):
            slide.pixel_size(0.25, force="--force-mpp")
        assert slide.pixel_size(0.25) == (0.25, 0.25)
        assert slide.pixel_size(0.501, force="--force-mpp") == pytest.approx((0.5, 0.5)), (
            "the file's own, if they agree"
        )
