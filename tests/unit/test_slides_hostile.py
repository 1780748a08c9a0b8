"""Damaged files of every kind: each is refused in one line, or read; none crashes, hangs or fills the memory."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from staindiffuser.imaging.errors import SlideError
from staindiffuser.imaging.slides import open_slide
from tests.unit.test_slides_faithful import RESOLUTION, TILED, image

CASES = 40
"""Per kind of file."""


def tiff(path: Path, **options: object) -> None:
    tifffile.imwrite(path, image(), photometric="rgb", **{**TILED, **options})


def ome_tiff(path: Path) -> None:
    with tifffile.TiffWriter(path, ome=True) as writer:
        metadata = {"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
        writer.write(image(), photometric="rgb", tile=(128, 128), subifds=1, metadata=metadata)
        writer.write(image()[::2, ::2], photometric="rgb", subfiletype=1, tile=(128, 128))


KINDS: dict[str, Callable[[Path], object]] = {
    "jpeg.tif": lambda path: tiff(path, compression="jpeg"),
    "deflate.tif": lambda path: tiff(path, compression="zlib"),
    "strips.tif": lambda path: tifffile.imwrite(path, image(), photometric="rgb", rowsperstrip=16, **RESOLUTION),
    "pyramid.ome.tif": ome_tiff,
    "flat.png": lambda path: Image.fromarray(image()).save(path),
    "flat.jpg": lambda path: Image.fromarray(image()).save(path, quality=90),
}


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Cut off, with bytes of the header or the end changed, or with zeros in the middle."""
    changed = bytearray(content)
    kind = rng.choice(["cut", "bit", "byte", "zeros"])
    if kind == "cut":
        return bytes(changed[: rng.randrange(len(changed))])
    if kind == "zeros":
        start, count = rng.randrange(len(changed)), rng.choice([1, 8, 200])
        changed[start : start + count] = bytes(len(changed[start : start + count]))
        return bytes(changed)
    position = rng.choice([rng.randrange(600), len(changed) - 1 - rng.randrange(3000)]) % len(changed)
    changed[position] = changed[position] ^ (1 << rng.randrange(8)) if kind == "bit" else rng.randrange(256)
    return bytes(changed)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", list(KINDS))
def test_damaged_files_are_refused_or_read(tmp_path: Path, kind: str) -> None:
    whole, path = tmp_path / kind, tmp_path / f"damaged-{kind}"
    KINDS[kind](whole)
    rng = random.Random(kind)
    messages: list[str] = []
    for case in range(CASES):
        path.write_bytes(damaged(whole.read_bytes(), rng))
        try:
            with open_slide(path) as slide:
                width, height = slide.size
                pixels = slide.read(0, 0, 0, min(width, 4096), min(height, 4096))
        except SlideError as error:
            messages.append(str(error))
            continue
        if kind == "flat.png":  # its checksums tell every change
            np.testing.assert_array_equal(pixels, image(), err_msg=f"case {case}")
    assert len(messages) >= 5
    assert all("\n" not in message and path.name in message for message in messages)


def test_a_loop_of_directories_ends(tmp_path: Path) -> None:
    path = tmp_path / "loop.tif"
    tiff(path)
    with tifffile.TiffFile(path) as file:
        page = file.pages.first
        next_pointer = page.offset + 2 + 12 * len(page.tags)
        first = page.offset
    with path.open("r+b") as raw:
        raw.seek(next_pointer)
        raw.write(first.to_bytes(4, "little"))
    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.read(0, 0, 0, *slide.size), image())


@pytest.mark.parametrize(("tag", "value"), [("ImageWidth", 10**6), ("ImageLength", 10**6), ("TileWidth", 2**20)])
def test_absurd_sizes_are_refused_at_once(tmp_path: Path, tag: str, value: int) -> None:
    path = tmp_path / "absurd.tif"
    tiff(path)
    with tifffile.TiffFile(path, mode="r+") as file:
        file.pages.first.tags[tag].overwrite(value, dtype="I")
    with pytest.raises(SlideError), open_slide(path) as slide:
        slide.read(0, 0, 0, 512, 512)
