"""Files of the kinds that people report to slide tools: each is read as what it is, or refused with its reason."""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image
from pydicom import uid

from staindiffuser.imaging.errors import MissingPixelSizeError, SlideError
from staindiffuser.imaging.slides import open_slide
from staindiffuser.imaging.slides.codestreams import DamagedCodestreamError, require_intact_jpeg2000
from tests.dicom_series import BASE, write_instance, write_series
from tests.unit.test_slides_faithful import TILED, image
from tests.unit.test_slides_zarr import write as write_zarr

DPI = (50800, 50800)


def tiff(**options: Any) -> Callable[[Path], None]:
    data = options.pop("data", None)

    def write(path: Path) -> None:
        tifffile.imwrite(path, image() if data is None else data, **{"photometric": "rgb", **TILED, **options})

    return write


def ome(**metadata: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with tifffile.TiffWriter(path, ome=True) as writer:
            writer.write(image(), photometric="rgb", tile=(128, 128), metadata={"axes": "YXS", **metadata})

    return write


def content(data: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(data)


def flat(mode: str = "RGB", **options: Any) -> Callable[[Path], None]:
    return lambda path: Image.fromarray(image()).convert(mode).save(path, dpi=DPI, **options)


def encoded(kind: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image()).save(stream, kind, dpi=DPI, **({"quality": 95} if kind == "JPEG" else {}))
    return stream.getvalue()


def dicom(**changes: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.mkdir()
        write_instance(path / "a.dcm", image(), BASE, "1.2.3.4", mpp=0.5, **changes)

    return write


def zarr(change: Callable[[dict[str, Any]], object], file: str = ".zattrs") -> Callable[[Path], None]:
    def write(path: Path) -> None:
        write_zarr(path, image())
        data = json.loads((path / file).read_text(encoding="utf-8"))
        change(data)
        (path / file).write_text(json.dumps(data), encoding="utf-8")

    return write


def bomb() -> str:
    entities = "".join(f'<!ENTITY {name} "{f"&{inner};" * 50}">' for name, inner in zip("bcdef", "abcde", strict=True))
    start = '<?xml version="1.0"?><!DOCTYPE l [<!ENTITY a "' + "x" * 1000 + '">' + entities + "]>"
    return (
        start + '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0"/><d>&f;</d></OME>'
    )


READ: dict[str, Callable[[Path], Any]] = {
    "lzw.tif": tiff(compression="lzw", predictor=True),
    "zstd.tif": tiff(compression="zstd"),
    "packbits.tif": tiff(compression="packbits"),
    "lzma.tif": tiff(compression="lzma"),
    "webp.tif": tiff(compression="webp", compressionargs={"level": 100, "lossless": True}),
    "jpeg420.tif": tiff(compression="jpeg", subsampling=(2, 2)),
    "bigtiff.tif": tiff(bigtiff=True),
    "big-endian.tif": tiff(byteorder=">"),
    "tiles of 16.tif": tiff(tile=(16, 16)),
    "long description.tif": tiff(description="a" * 200_000, metadata=None),
    "millimetres.ome.tif": ome(
        PhysicalSizeX=0.0005, PhysicalSizeXUnit="mm", PhysicalSizeY=0.0005, PhysicalSizeYUnit="mm"
    ),
    "progressive.jpg": flat(quality=95, progressive=True),
    "bytes after the end.jpg": content(encoded("JPEG") + bytes(1000)),
    "png inside.jpg": content(encoded("PNG")),
    "-rf.tif": tiff(),
    "--help.tif": tiff(),
    " .tif": tiff(),
    "tab\t.tif": tiff(),
    "[a]*.tif": tiff(),
    "%s $(id).tif": tiff(),
    "新しい.tif": tiff(),
    "a" * 240 + ".tif": tiff(),
    "series": lambda path: write_series(path, image(), syntax=uid.JPEG2000Lossless),
    "image.zarr": lambda path: write_zarr(path, image()),
}

REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "16 bits.tif": (tiff(data=np.zeros((64, 64, 3), np.uint16), tile=None), "uint16"),
    "floats.tif": (tiff(data=np.zeros((64, 64, 3), np.float32), tile=None), "float32"),
    "five samples.tif": (
        tiff(data=np.zeros((128, 128, 5), np.uint8), extrasamples=("unspecified", "unspecified")), "5 samples"
    ),
    "stack.tif": (tiff(data=np.stack([image()] * 3)), "a stack"),
    "72 dpi.tif": (tiff(resolution=(72, 72), resolutionunit="INCH"), "pixel size"),
    "not square.tif": (tiff(resolution=(20000, 5000)), "pixel size"),
    "pixels.ome.tif": (
        ome(PhysicalSizeX=1, PhysicalSizeXUnit="pixel", PhysicalSizeY=1, PhysicalSizeYUnit="pixel"), "pixel size"
    ),
    "negative.ome.tif": (ome(PhysicalSizeX=-0.5, PhysicalSizeY=-0.5), "pixel size"),
    "not a number.ome.tif": (ome(PhysicalSizeX=float("nan"), PhysicalSizeY=float("nan")), "pixel size"),
    "entities.ome.tif": (tiff(description=bomb(), metadata=None), "damaged|pixel size"),
    "login page.svs": (content(b"<!DOCTYPE html><html>Login required</html>" * 20), "not a supported"),
    "pointer.svs": (content(b"version https://git-lfs.github.com/spec/v1\noid sha256:a\n"), "not a supported"),
    "packed.svs": (content(gzip.compress(bytes(1000))), "not a supported"),
    "zeros.tif": (content(bytes(10_000)), "not a supported"),
    "directory behind the end.tif": (content(b"II*\0" + (10**6).to_bytes(4, "little") + bytes(100)), "after its end"),
    "cut.jpg": (content(encoded("JPEG")[:9000]), "Premature end"),
    "no end.jpg": (content(encoded("JPEG")[:-2]), "Premature end"),
    "cut.png": (content(encoded("PNG")[:-100]), "incomplete"),
    "palette.png": (flat("P"), "palette"),
    "grey.jpg": (flat("L"), "greyscale"),
    "grey with alpha.png": (flat("LA"), "greyscale"),
    "cmyk.jpg": (flat("CMYK"), "CMYK"),
    "animated.png": (flat(save_all=True, append_images=[Image.fromarray(image()[::-1])]), "2 images"),
    "photo.webp": (flat(), "not a supported"),
    "huge.png": (lambda path: Image.new("1", (20_000, 9_500)).save(path), "too large"),
    "nowhere.tif": (lambda path: path.symlink_to(path.with_name("gone")), "does not exist"),
    "itself.tif": (lambda path: path.symlink_to(path), "cannot be read"),
    "pipe.tif": (lambda path: os.mkfifo(path), "not a regular file"),
    "folder.svs": (lambda path: path.mkdir(), "a folder, not a slide"),
    "dicom 16 bits": (dicom(BitsAllocated=16, BitsStored=12, HighBit=11), "16 bits"),
    "dicom no width": (dicom(TotalPixelMatrixColumns=0), "claims 0"),
    "dicom too wide": (dicom(TotalPixelMatrixColumns=10**6, TotalPixelMatrixRows=10**6), "of 61"),
    "dicom no rows": (dicom(Rows=0), "claims"),
    "dicom no series": (dicom(SeriesInstanceUID=None), "lacks SeriesInstanceUID"),
    "dicom no type": (dicom(ImageType=None), "lacks ImageType"),
    "dicom no spacing": (dicom(SharedFunctionalGroupsSequence=None), "DICOM"),
    "dicom of another colour": (dicom(PhotometricInterpretation="RGB"), "JPEG YCbCr"),
    "levels swapped.zarr": (zarr(lambda data: data["multiscales"][0]["datasets"].reverse()), "not in order"),
    "outside.zarr": (
        zarr(lambda data: data["multiscales"][0]["datasets"][0].update(path="../other.zarr/0")), "damaged or no"
    ),
    "too wide.zarr": (zarr(lambda data: data["shape"].__setitem__(-1, 10**7), "0/.zarray"), "chunks are stored"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(READ))
def test_what_is_valid_is_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    READ[name](path)
    with open_slide(path) as slide:
        assert slide.pixel_size() == pytest.approx((0.5, 0.5))
        pixels = slide.read(0, 0, 0, *slide.size)
    assert np.abs(pixels.astype(int) - image()).mean() < 1.5


def looked_at(path: Path) -> None:
    with open_slide(path) as slide:
        slide.pixel_size()
        slide.read(0, 0, 0, min(slide.size[0], 4096), min(slide.size[1], 4096))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", list(REFUSED))
def test_what_cannot_be_read_faithfully_is_refused(tmp_path: Path, name: str) -> None:
    write, words = REFUSED[name]
    path = tmp_path / name
    write(path)
    with pytest.raises((SlideError, MissingPixelSizeError), match=words) as caught:
        looked_at(path)
    assert "\n" not in str(caught.value)


def test_levels_of_another_shape_or_far_too_small_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "levels.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as writer:
        metadata = {"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
        writer.write(image(), photometric="rgb", tile=(128, 128), subifds=1, metadata=metadata)
        writer.write(image()[::2, ::4].copy(), photometric="rgb", tile=(128, 128), subfiletype=1)
    with open_slide(path) as slide:
        assert slide.level_sizes == ((640, 512),)
        assert "another shape" in slide.notes[0]


@pytest.mark.parametrize("quality", [None, 60, 30])
def test_jpeg_2000_tiles_that_end_early_are_found_and_intact_ones_pass(quality: int | None) -> None:
    rng = np.random.default_rng(0)
    for side in (64, 256):
        pixels = np.clip(image()[:side, :side] + rng.normal(0, 12, (side, side, 3)), 0, 255).astype(np.uint8)
        options: dict[str, Any] = {"reversible": True} if quality is None else {"level": quality}
        whole = bytes(imagecodecs.jpeg2k_encode(pixels, codecformat="j2k", **options))
        require_intact_jpeg2000(whole)
        half = len(whole) // 2
        for damaged in (
            whole[:half],
            whole[:half] + bytes(len(whole) - half),
            whole[:half] + b"\xff\xd9" + whole[half + 2 :],
            whole[:half] + b"\xff\xd9",
            whole[:-2],
        ):
            with pytest.raises(DamagedCodestreamError):
                require_intact_jpeg2000(damaged)
