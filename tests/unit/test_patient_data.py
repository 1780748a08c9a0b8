"""Patient data: names planted in file and folder names, in every header and on the label come out nowhere."""

from __future__ import annotations

import base64
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pydicom
import pytest
import tifffile
from PIL import Image, PngImagePlugin

from staindiffuser.client.command import run_command
from staindiffuser.client.names import find_slide, slide_identity
from staindiffuser.client.options import StainingOptions
from staindiffuser.client.run_record import read_run, slide_sha256
from staindiffuser.client.target import Target
from staindiffuser.client.testing import FakeTriton
from staindiffuser.errors import InputError, StainDiffuserError
from staindiffuser.imaging.slides import open_slide
from tests.dicom_series import write_series
from tests.unit.test_slides_zarr import write as write_zarr

MARK = "Zzmueller"
"""Planted everywhere."""
LABEL = (10, 250, 10)
"""Colour of label and macro, which no tissue has."""
OPTIONS = StainingOptions(stains=("cd3",), preview=True, combined=True, formats=("ome-zarr", "dicom", "spatialdata"))
RESOLUTION: dict[str, Any] = {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}


def tissue(height: int = 512, width: int = 640) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([170 + 30 * np.sin(x / 19), 90 + 30 * np.cos(y / 23), 160 + 0 * x], axis=-1).astype(np.uint8)
    pixels[200:216, 200:216] = (80, 50, 110)
    return pixels


def label() -> np.ndarray:
    return np.full((256, 256, 3), LABEL, np.uint8)


def xmp() -> bytes:
    return f"<x:xmpmeta xmlns:x='adobe:ns:meta/'><dc:creator>{MARK}</dc:creator></x:xmpmeta>".encode()


def icc() -> bytes:
    """A valid profile with a marked description."""
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    name = "sRGB built-in".encode("utf-16-be")
    assert name in profile
    return profile.replace(name, f"{MARK:<13}".encode("utf-16-be"))


def tags() -> dict[str, Any]:
    """Every text tag that scanners fill."""
    texts = {269: "DocumentName", 271: "Make", 272: "Model", 285: "PageName", 315: "Artist", 316: "HostComputer",
             33432: "Copyright", 65000: "Private"}  # fmt: skip
    extra = [(code, 2, 0, f"{name} {MARK}", True) for code, name in texts.items()]
    return {
        "software": f"Scanner {MARK}",
        "iccprofile": icc(),
        "extratags": [*extra, (700, 1, len(xmp()), xmp(), True)],
    }


def svs(path: Path) -> None:
    head = "Aperio Image Library v11.2.1 \r\n640x512 [0,0 640x512] (256x256) JPEG/RGB Q=70"
    about = f"{head}|AppMag = 20|MPP = 0.5|User = {MARK}|Filename = {MARK}|Title = {MARK}|ScanScope ID = {MARK}"
    with tifffile.TiffWriter(path) as writer:
        options: dict[str, Any] = {"photometric": "rgb", "compression": "jpeg", "metadata": None}
        writer.write(tissue(), tile=(256, 256), description=about, **tags(), **options)
        writer.write(tissue()[::4, ::4], rowsperstrip=128, description=about, **options)
        for name, kind in (("label", 1), ("macro", 9)):
            text = f"Aperio Image Library v11.2.1\r\n{name} 256x256|{MARK}"
            writer.write(label(), rowsperstrip=256, subfiletype=kind, description=text, **options)
    with openslide.OpenSlide(path) as slide:  # the test is worth nothing if this is not what it should be
        assert {"label", "macro"} <= set(slide.associated_images)
        assert MARK in str(dict(slide.properties))


def tiff(path: Path) -> None:
    tifffile.imwrite(
        path, tissue(), photometric="rgb", tile=(256, 256), description=f"Patient {MARK}", metadata=None,
        datetime="2026:01:01 00:00:00", **tags(), **RESOLUTION,
    )  # fmt: skip


def ome(path: Path) -> None:
    metadata = {
        "axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5, "Name": MARK, "Description": MARK,
        "AcquisitionDate": "2001-02-03T04:05:06", "MapAnnotation": {"Patient": MARK, "Namespace": MARK},
        "Experimenter": {"LastName": MARK},
    }  # fmt: skip
    with tifffile.TiffWriter(path, ome=True) as writer:
        writer.write(tissue(), photometric="rgb", tile=(256, 256), metadata=metadata)
        writer.write(label(), photometric="rgb", tile=(256, 256), metadata={"axes": "YXS", "Name": f"label {MARK}"})
    with tifffile.TiffFile(path) as file:
        assert MARK in (file.ome_metadata or "")


def jpeg(path: Path) -> None:
    exif = Image.Exif()
    for tag in (0x010E, 0x010F, 0x0110, 0x0131, 0x013B, 0x013C, 0x8298, 0x9C9F):
        exif[tag] = MARK if tag < 0x9C00 else MARK.encode("utf-16-le")
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0" + MARK.encode()
    image = Image.fromarray(tissue())
    thumbnail = io.BytesIO()
    Image.fromarray(label()).save(thumbnail, "JPEG", comment=MARK)
    image.save(path, quality=95, exif=exif, comment=MARK, xmp=xmp(), icc_profile=icc(), dpi=(50800, 50800))


def png(path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("Author", MARK)
    info.add_text("Comment", MARK, zip=True)
    info.add_itxt("XML:com.adobe.xmp", xmp().decode(), zip=True)
    Image.fromarray(tissue()).save(path, pnginfo=info, icc_profile=icc(), dpi=(50800, 50800))


def dicom(path: Path) -> None:
    base, *_ = write_series(path.parent, tissue(), mark=MARK)
    (path.parent / "label.dcm").rename(path.parent / f"{MARK}.label")
    base.rename(path)
    assert MARK in str(pydicom.dcmread(path, stop_before_pixels=True).PatientName)


def zarr(path: Path) -> None:
    group = write_zarr(path, tissue(), name=MARK, omero={"name": MARK, "channels": []})
    group.attrs["patient"] = MARK


KINDS: dict[str, Callable[[Path], None]] = {
    "svs": svs, "tif": tiff, "ome.tif": ome, "jpg": jpeg, "png": png, "dcm": dicom, "zarr": zarr,
}  # fmt: skip


def spellings() -> list[bytes]:
    encodings = ("utf-8", "utf-16-le", "utf-16-be", "utf-32-le")
    return [*(MARK.encode(name) for name in encodings), base64.b64encode(MARK.encode()).rstrip(b"=")[:-1]]


def texts_in(data: bytes) -> Iterator[bytes]:
    """The bytes, and whatever is compressed in them."""
    yield data
    if data.startswith(b"\x1f\x8b"):
        yield gzip.decompress(data)
    if data.startswith(b"\x89PNG"):
        yield repr(Image.open(io.BytesIO(data)).info).encode()
    for match in re.finditer(rb"\x78[\x01\x5e\x9c\xda]", data):
        try:
            yield zlib.decompressobj().decompress(data[match.start() :], 2**22)
        except zlib.error:
            continue


def reveals(data: bytes) -> bool:
    wanted = [mark.lower() for mark in spellings()]
    return any(mark in text.lower() for text in texts_in(data) for mark in wanted)


def test_the_search_finds_what_is_hidden() -> None:
    assert reveals(gzip.compress(json.dumps({"a": f"x{MARK.upper()}y"}).encode()))
    assert reveals(b"head" + zlib.compress(MARK.encode("utf-16-le")) + b"tail")
    assert not reveals(b"nothing" * 99)


@pytest.fixture(scope="module")
def server() -> Iterator[FakeTriton]:
    with FakeTriton() as fake:
        yield fake


def marked_slide(kind: str, folder: Path) -> Path:
    scans = folder / f"case of {MARK}"
    scans.mkdir()
    path = scans / f"{MARK}-1960.{kind}"
    KINDS[kind](path)
    return path


@pytest.mark.parametrize("kind", list(KINDS))
def test_no_output_and_no_log_names_the_patient(
    kind: str, tmp_path: Path, server: FakeTriton, capfd: pytest.CaptureFixture[str]
) -> None:
    path = marked_slide(kind, tmp_path)
    out = tmp_path / "out"
    assert run_command([path], out, Target(addresses=(server.url,)), OPTIONS, as_json=True, command=f"x {path}") == 0
    printed = capfd.readouterr()
    run = read_run(out)
    with open_slide(path) as slide:
        identity = slide_identity(slide_sha256(slide.files))
    assert identity in printed.err
    assert json.loads(printed.out)["slide"] == identity
    assert run.input.path is None
    for file in out.rglob("*"):
        assert not reveals(str(file.relative_to(out)).encode())
        assert file.is_dir() or not reveals(file.read_bytes()), file.name
    assert not reveals(printed.out.encode() + printed.err.encode())
    with tifffile.TiffFile(out / "cd3.ome.tiff") as image:
        assert identity in (image.ome_metadata or "")
        pixels = image.asarray()
    sheet = np.asarray(Image.open(out / "preview.png").convert("RGB"))
    for shown in (pixels, sheet):
        assert not ((shown[..., 1] > 200) & (shown[..., 0] < 60)).any(), "the label is on it"


def test_names_are_kept_on_request(tmp_path: Path, server: FakeTriton, capfd: pytest.CaptureFixture[str]) -> None:
    path = marked_slide("tif", tmp_path)
    options = StainingOptions(stains=("cd3",), keep_names=True)
    assert run_command([path], tmp_path / "out", Target(addresses=(server.url,)), options, as_json=True) == 0
    assert read_run(tmp_path / "out").input.path == str(path)
    for name in ("cd3.ome.tiff", "cells.geojson.gz"):
        assert reveals((tmp_path / "out" / name).read_bytes())
    assert MARK in capfd.readouterr().err
    again = StainingOptions(stains=("cd3",), resume=True)
    with pytest.raises(StainDiffuserError, match="keep_names True → False"):
        run_command([path], tmp_path / "out", Target(addresses=(server.url,)), again)


def test_a_batch_names_nobody(tmp_path: Path, server: FakeTriton, capfd: pytest.CaptureFixture[str]) -> None:
    path = marked_slide("tif", tmp_path)
    broken = path.with_name(f"{MARK} broken.svs")
    broken.write_bytes(path.read_bytes()[:2000])
    listed = tmp_path / "night.csv"
    text = f"slide,mpp,output\n{path},,case-1\n{broken},,\n{path.with_name(MARK)}.tif,0.5,case-3\n"
    listed.write_text(text, encoding="utf-8")
    target = Target(addresses=(server.url,))
    assert run_command([listed], tmp_path / "out", target, OPTIONS, as_json=True) == 1
    printed = capfd.readouterr()
    summary = (tmp_path / "out/summary.csv").read_text(encoding="utf-8")
    assert not reveals((summary + printed.out + printed.err).encode())
    identities = [slide_identity(slide_sha256([file])) for file in (path, broken)]
    lines = [json.loads(line) for line in printed.out.splitlines()]
    assert [line["slide"] for line in lines] == [*identities, "slide 3"]
    assert [Path(line["output"] or "-").name for line in lines] == ["case-1", "-", "case-3"]
    assert "slide 3 does not exist" in summary


@pytest.mark.parametrize("given", ["gone.svs", "", "*.svs", "bad.csv"])
def test_errors_in_a_log_name_nobody(given: str, tmp_path: Path) -> None:
    folder = tmp_path / f"case of {MARK}"
    folder.mkdir()
    (folder / "bad.csv").write_text("patient\nx\n", encoding="utf-8")
    with pytest.raises(StainDiffuserError, match=r"input 1|slide 1") as caught:
        run_command([folder / given], tmp_path / "out", Target(addresses=("127.0.0.1:9",)), OPTIONS)
    assert not reveals(str(caught.value).encode())


def test_the_slide_of_a_result_is_found_by_its_content(tmp_path: Path, server: FakeTriton) -> None:
    path = marked_slide("tif", tmp_path)
    other = path.with_name("other.tif")
    tifffile.imwrite(other, tissue()[::-1], photometric="rgb", **RESOLUTION)
    run_command([path], tmp_path / "out", Target(addresses=(server.url,)), OPTIONS)
    run = read_run(tmp_path / "out")
    assert find_slide(run, [path.parent]) == path
    with pytest.raises(InputError, match=slide_identity(run.input.sha256)):
        find_slide(run)
    with pytest.raises(InputError, match="not among"):
        find_slide(run, [other])
