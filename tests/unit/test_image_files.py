"""Images are decoded to 8 bits as what they show: transparent pixels are glass, and deeper images are refused."""

from __future__ import annotations

from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from staindiffuser.imaging.errors import ImageError, SlideError
from staindiffuser.imaging.image_files import image_size, read_image, write_png
from staindiffuser.imaging.slides import open_slide

RGB = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)


@pytest.mark.parametrize("mode", ["RGB", "L", "1"])
def test_opaque_pngs_are_read_as_pillow_reads_them(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(RGB).convert(mode).save(path)
    for wanted in ("RGB", "L"):
        with Image.open(path) as opened:
            expected = np.asarray(opened.convert(wanted))
        image = read_image(path, mode=wanted)
        np.testing.assert_array_equal(image, expected)
        assert image.flags.writeable, "torch warns of arrays that are not"


@pytest.mark.parametrize("kind", ["alpha", "grey and alpha", "palette", "one transparent colour"])
def test_transparent_pixels_are_glass_and_not_in_a_mask(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.png"
    pixels = np.full((9, 7, 3), 60, np.uint8)
    pixels[:, 3:] = 200
    alpha = np.where(pixels[..., 0] == 200, 255, 0).astype(np.uint8)
    if kind == "alpha":
        Image.fromarray(np.dstack([pixels, alpha])).save(path)
    elif kind == "grey and alpha":
        Image.fromarray(np.dstack([pixels[..., 0], alpha])).save(path)
    elif kind == "palette":
        image = Image.fromarray((pixels[..., 0] == 200).astype(np.uint8)).convert("P")
        image.putpalette([60, 60, 60, 200, 200, 200])
        image.save(path, transparency=0)
    else:
        Image.fromarray(pixels).save(path, transparency=(60, 60, 60))
    expected = np.where(pixels == 200, 200, 255)
    np.testing.assert_array_equal(read_image(path), expected)
    np.testing.assert_array_equal(read_image(path, mode="L"), np.where(pixels[..., 0] == 200, 200, 0))


def test_labels_with_a_coloured_palette_are_read_as_labels(tmp_path: Path) -> None:
    labels = (np.arange(63, dtype=np.uint8) % 5).reshape(9, 7)
    image = Image.fromarray(labels).convert("P")
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, 0, 0, 128])
    image.save(tmp_path / "labels.png")
    np.testing.assert_array_equal(read_image(tmp_path / "labels.png", mode="L"), labels)


@pytest.mark.parametrize("suffix", ["png", "tif", "grey.png"])
def test_more_than_8_bits_are_refused(tmp_path: Path, suffix: str) -> None:
    """12-bit data in 16 bits: taken for 8 bits it would be nearly black."""
    path = tmp_path / f"deep.{suffix}"
    pixels = RGB.astype(np.uint16) * 16
    if suffix == "tif":
        tifffile.imwrite(path, pixels, photometric="rgb")
    else:
        path.write_bytes(imagecodecs.png_encode(pixels if suffix == "png" else pixels[..., 0].copy()))
    for read in (read_image, image_size):
        with pytest.raises(ImageError, match=r"deep.*more than 8 bits a channel: convert it"):
            read(path)
    with pytest.raises(SlideError, match=r"deep.*8"):
        open_slide(path)


def test_images_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="does not exist"):
        read_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no image", encoding="utf-8")
    write_png(tmp_path / "cut.png", RGB)
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:-40])
    for name in ("text.png", "cut.png"):
        with pytest.raises(ImageError, match=f"{name} cannot be read"):
            read_image(tmp_path / name)
    assert image_size(tmp_path / "cut.png") == (7, 9)
    with pytest.raises(ImageError, match="cannot be read"):
        image_size(tmp_path / "cut.png", decode=True)
