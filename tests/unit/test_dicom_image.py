"""``--format dicom``: valid instances, the OME-TIFF's pixels, references to the source, and nobody's name unasked."""

import dataclasses
import gzip
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import tifffile

from staindiffuser.client.options import StainingOptions
from staindiffuser.client.staining import stain_slide
from staindiffuser.client.testing import FakeStainer
from staindiffuser.imaging import dicom_image
from staindiffuser.imaging.ome_xml import Channel, ImageInfo
from staindiffuser.imaging.slides import open_slide
from tests.dicom_series import write_series

MARK = "MARKEDNAME"
OPTIONS = StainingOptions(formats=("dicom",), mask="none", nuclei=False)
SIZE = (900, 640)


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    y, x = np.mgrid[: SIZE[1], : SIZE[0]]
    pixels = np.stack([180 + 40 * np.sin(x / 30), 110 + 40 * np.cos(y / 25), 160 + 0 * x], axis=-1).astype(np.uint8)
    for top in range(40, 600, 100):
        pixels[top : top + 20, 50 + top : 70 + top] = 40  # cells
    folder = tmp_path_factory.mktemp("dicom") / "he"
    write_series(folder, pixels, mark=MARK)
    return folder


@pytest.fixture(scope="module")
def result(slide: Path) -> Path:
    stain_slide(slide, slide.parent / "out", FakeStainer(), OPTIONS)
    return slide.parent / "out"


def headers(folder: Path) -> list[Any]:
    return [pydicom.dcmread(path) for path in sorted(folder.glob("level-*.dcm"))]


def test_every_level_has_the_pixels_of_the_tiff(result: Path) -> None:
    with tifffile.TiffFile(result / "ck818.ome.tiff") as tiff, open_slide(result / "ck818.dicom") as found:
        levels = tiff.series[0].levels
        assert found.level_sizes == tuple((level.shape[1], level.shape[0]) for level in levels)
        assert found.mpp == pytest.approx((0.5, 0.5))
        for number, level in enumerate(levels):
            read = found.read(number, 0, 0, *found.level_sizes[number])
            np.testing.assert_array_equal(read, level.asarray())
    assert sorted(path.name for path in result.glob("*.dicom")) == ["cd3.dicom", "ck818.dicom"], "no cell maps"


def test_it_refers_to_the_slide_and_lies_on_it(slide: Path, result: Path) -> None:
    source = pydicom.dcmread(slide / "level0.dcm", stop_before_pixels=True)
    for header in headers(result / "cd3.dicom"):
        assert header.ImageType[0] == "DERIVED"
        assert header.SourceImageSequence[0].ReferencedSOPInstanceUID == source.SOPInstanceUID
        (other,) = header.StudiesContainingOtherReferencedInstancesSequence
        assert other.StudyInstanceUID == source.StudyInstanceUID
        assert other.ReferencedSeriesSequence[0].SeriesInstanceUID == source.SeriesInstanceUID
        assert header.FrameOfReferenceUID == source.FrameOfReferenceUID
        assert "research use only" in header.ImageComments
    of_stains = [headers(result / f"{name}.dicom") for name in ("cd3", "ck818")]
    assert len({header.StudyInstanceUID for stain in of_stains for header in stain}) == 1
    assert [len({header.SeriesInstanceUID for header in stain}) for stain in of_stains] == [1, 1]
    assert len({header.SOPInstanceUID for stain in of_stains for header in stain}) == 2 * len(of_stains[0])


def test_whose_slide_it_is_is_copied_only_on_request(slide: Path, result: Path, tmp_path: Path) -> None:
    source = pydicom.dcmread(slide / "level0.dcm", stop_before_pixels=True)
    for path in result.rglob("*"):
        assert path.is_dir() or MARK.encode() not in path.read_bytes(), path
    assert headers(result / "cd3.dicom")[0].StudyInstanceUID != source.StudyInstanceUID
    options = dataclasses.replace(OPTIONS, keep_names=True, stains=("cd3",), cells=False)
    stain_slide(slide, tmp_path / "out", FakeStainer(), options)
    for header in headers(tmp_path / "out/cd3.dicom"):
        for name in ("PatientName", "PatientID", "StudyInstanceUID"):
            assert header.get(name) == source.get(name), name
        assert header.ReferencedSeriesSequence[0].SeriesInstanceUID == source.SeriesInstanceUID


def test_cells_are_bulk_annotations_of_the_image(result: Path) -> None:
    ann = pytest.importorskip("highdicom.ann", reason="annotations need highdicom")
    with gzip.open(result / "cells.geojson.gz") as file:
        features = json.load(file)["features"]
    expected = [f for f in features if f["properties"]["classification"]["name"] == "CD3"]
    assert len(expected) > 3
    annotations = ann.annread(result / "cd3.dicom/cells.dcm")
    (group,) = annotations.get_annotation_groups()
    outlines = group.get_graphic_data(coordinate_type="2D")
    assert len(outlines) == len(expected)
    for outline, feature in zip(outlines, expected, strict=True):
        np.testing.assert_allclose(outline, feature["geometry"]["coordinates"][0][:-1], atol=0.01)
    level = headers(result / "cd3.dicom")[0]
    assert annotations.ReferencedImageSequence[0].ReferencedSOPInstanceUID == level.SOPInstanceUID
    assert annotations.StudyInstanceUID == level.StudyInstanceUID
    _, values, _ = group.get_measurements()
    assert values[:, 0] == pytest.approx([f["properties"]["measurements"]["Area µm^2"] for f in expected], rel=1e-4)


def test_it_validates(result: Path) -> None:
    if shutil.which("dciodvfy") is None:
        pytest.skip("validating DICOM needs dciodvfy (Debian's dicom3tools)")
    for path in sorted((result / "cd3.dicom").glob("*.dcm")):
        done = subprocess.run(["dciodvfy", path], capture_output=True, text=True, check=False, errors="replace")
        assert "Microscopy" in done.stdout + done.stderr
        errors = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("Error")]
        if path.name == "cells.dcm":  # dciodvfy of 2022 asks 2D annotations for it, which have none, as they should
            errors = [line for line in errors if "CommonZCoordinateValue> = <>" not in line]
        assert errors == []


def test_long_frames_are_found_by_the_extended_table(result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tifffile.TiffFile(result / "cd3.ome.tiff") as tiff:
        info = ImageInfo(name="n", description="d", mpp=(0.5, 0.5), channels=(Channel("CD3"),))
        expected = tiff.asarray()
    monkeypatch.setattr(dicom_image, "_BASIC_OFFSETS", 100)
    folder = result.parent / "long"
    dicom_image.write_dicom(result / "cd3.ome.tiff", folder, info, study=dicom_image.new_uid(), source=None)
    assert len(headers(folder)[0].ExtendedOffsetTable) == 8 * 4
    with open_slide(folder) as found:
        np.testing.assert_array_equal(found.read(0, 0, 0, *SIZE), expected)
