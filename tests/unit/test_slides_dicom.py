"""DICOM slides: any file of the series is the slide, pixels are OpenSlide's, and what is missing is refused."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pydicom
import pytest
from pydicom import uid

from staindiffuser.client.inputs import find_inputs
from staindiffuser.client.run_record import slide_sha256
from staindiffuser.imaging.errors import SlideError
from staindiffuser.imaging.slides import open_slide
from tests.dicom_series import BASE, REDUCED, write_instance, write_series
from tests.unit.test_slides_faithful import image
from tests.unit.test_slides_hostile import damaged

SYNTAXES: dict[str, dict[str, Any]] = {
    "jpeg": {"syntax": uid.JPEGBaseline8Bit},
    "jpeg, rgb": {"syntax": uid.JPEGBaseline8Bit, "photometric": "RGB"},
    "jpeg 2000": {"syntax": uid.JPEG2000Lossless},
    "jpeg 2000, rgb": {"syntax": uid.JPEG2000Lossless, "photometric": "RGB"},
    "not compressed": {"syntax": uid.ExplicitVRLittleEndian},
}


@pytest.fixture
def series(tmp_path: Path) -> Path:
    """A folder with two levels and a label."""
    folder = tmp_path / "series"
    write_series(folder, image())
    return folder


@pytest.mark.parametrize("kind", list(SYNTAXES))
def test_pixels_are_those_of_openslide(tmp_path: Path, kind: str) -> None:
    pixels = image()[:500, :610]
    write_series(tmp_path, pixels, **SYNTAXES[kind])
    with open_slide(tmp_path) as slide, openslide.OpenSlide(tmp_path / "level0.dcm") as reference:
        assert slide.level_sizes == reference.level_dimensions == ((610, 500), (305, 250))
        assert slide.mpp == pytest.approx((0.5, 0.5))
        for level, (width, height) in enumerate(slide.level_sizes):
            found = slide.read(level, 0, 0, width, height)
            expected = np.asarray(reference.read_region((0, 0), level, (width, height)).convert("RGB"))
            np.testing.assert_array_equal(found, expected)
        part = slide.read(0, 100, 50, 200, 300)
        np.testing.assert_array_equal(part, slide.read(0, 0, 0, 610, 500)[50:350, 100:300])
    assert np.abs(found.astype(int) - pixels[::2, ::2]).mean() < 12


def test_any_file_of_a_series_is_the_slide_and_the_label_is_not(series: Path) -> None:
    hashes = set()
    for path in [series, *sorted(series.iterdir())]:
        with open_slide(path) as slide:
            assert slide.size == (640, 512)
            assert [file.name for file in slide.files] == ["level0.dcm", "level1.dcm"]
            hashes.add(slide_sha256(slide.files))
    (series / "label.dcm").unlink()
    with open_slide(series) as slide:
        hashes.add(slide_sha256(slide.files))
    assert len(hashes) == 1
    shutil.copy(series / "level0.dcm", series / "copy of level0.dcm")
    with open_slide(series / "level1.dcm") as slide:
        assert len(slide.files) == 2, "the same instance twice is one"


def test_folders_of_series_are_found(series: Path, tmp_path: Path) -> None:
    assert [slide.path for slide in find_inputs([series], None)] == [series]
    assert find_inputs([series], None)[0].output == Path("series-stained")
    second = tmp_path / "1.2.840.77"
    write_series(second, image())
    assert [slide.output.name for slide in find_inputs([tmp_path], None)] == ["1.2.840.77-stained", "series-stained"]
    for path in second.iterdir():
        shutil.copy(path, series / f"second-{path.name}")
    with pytest.raises(SlideError, match="2 DICOM slides: name a file"):
        open_slide(series)
    assert [slide.path.name for slide in find_inputs([series], None)] == ["level0.dcm", "second-level0.dcm"]


def without_base(folder: Path) -> None:
    (folder / "level0.dcm").unlink()


def without_a_part(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    for number, frames in ((1, slice(0, 8)), (3, slice(14, 20))):
        write_instance(folder / f"{number}.dcm", image(), BASE, "1.2.3", mpp=0.5, part=(number, 3), frames=frames)


def without_the_last_part(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    write_instance(folder / "1.dcm", image(), BASE, "1.2.3", mpp=0.5, part=(1, 2), frames=slice(0, 10))


def without_frames(folder: Path) -> None:
    write_instance(folder / "level0.dcm", image(), BASE, series_of(folder), mpp=0.5, frames=slice(0, 17))


def cut_off(folder: Path) -> None:
    content = (folder / "level0.dcm").read_bytes()
    (folder / "level0.dcm").write_bytes(content[: len(content) * 2 // 3])


def grey(folder: Path) -> None:
    change(folder, PhotometricInterpretation="MONOCHROME2", SamplesPerPixel=1)


def two_paths(folder: Path) -> None:
    change(folder, NumberOfOpticalPaths=2)


def of_another_kind(folder: Path) -> None:
    without_base(folder)
    (folder / "level1.dcm").unlink()
    (folder / "label.dcm").unlink()
    write_instance(folder / "a.dcm", image(), BASE, "1.2.3", mpp=0.5, SOPClassUID=uid.CTImageStorage)


def only_a_label(folder: Path) -> None:
    for name in ("level0.dcm", "level1.dcm"):
        (folder / name).unlink()


def series_of(folder: Path) -> str:
    return str(pydicom.dcmread(folder / "level1.dcm", stop_before_pixels=True).SeriesInstanceUID)


def change(folder: Path, **changes: Any) -> None:
    write_instance(folder / "level0.dcm", image(), BASE, series_of(folder), mpp=0.5, **changes)


WRONG: dict[str, tuple[Callable[[Path], None], str]] = {
    "no full resolution": (without_base, "full resolution is missing"),
    "a part is missing": (without_a_part, r"an instance of a level is missing \(2 are"),
    "the last part is missing": (without_the_last_part, r"an instance of a level is missing \(1 are"),
    "frames are missing": (without_frames, "17 of 20 frames"),
    "cut off": (cut_off, "damaged|incomplete"),
    "greyscale": (grey, "8-bit RGB|damaged|cannot be read"),
    "two optical paths": (two_paths, "of 40 frames|optical paths"),
    "no slide": (of_another_kind, "no whole slide"),
    "only a label": (only_a_label, "only labels"),
}


@pytest.mark.parametrize("kind", list(WRONG))
def test_what_is_missing_or_wrong_is_refused(series: Path, kind: str) -> None:
    make, words = WRONG[kind]
    make(series)
    with pytest.raises(SlideError, match=words) as caught:
        open_slide(series)
    assert "\n" not in str(caught.value)


def test_a_missing_reduced_level_does_no_harm(series: Path) -> None:
    (series / "level1.dcm").unlink()
    with open_slide(series) as slide:
        assert slide.level_sizes == ((640, 512),)


def test_a_concatenation_is_one_level(tmp_path: Path) -> None:
    for number, frames in ((1, slice(0, 8)), (2, slice(8, 20))):
        write_instance(
            tmp_path / f"{number}.dcm", image(), BASE, "1.2.3", mpp=0.5, part=(number, 2), frames=frames,
            syntax=uid.ExplicitVRLittleEndian,
        )  # fmt: skip
    write_instance(tmp_path / "small.dcm", image()[::2, ::2], REDUCED, "1.2.3", mpp=1.0)
    with open_slide(tmp_path / "2.dcm") as slide:
        assert len(slide.files) == 3
        np.testing.assert_array_equal(slide.read(0, 0, 0, 640, 512), image())


def test_a_damaged_frame_is_refused_or_left_out(series: Path) -> None:
    content = bytearray((series / "level0.dcm").read_bytes())
    starts = [i for i in range(len(content) - 3) if content[i : i + 3] == b"\xff\xd8\xff"]
    assert len(starts) == 20
    middle = (starts[6] + starts[7]) // 2
    content[middle : starts[7] - 40] = bytes(starts[7] - 40 - middle)
    (series / "level0.dcm").write_bytes(content)
    with pytest.raises(SlideError, match=r"frame \(1, 1\) of level 0 cannot be decoded"), open_slide(series) as slide:
        slide.read(0, 0, 0, 640, 512)
    with open_slide(series, allow_damaged=True) as slide:
        pixels = slide.read(0, 0, 0, 640, 512)
        assert (pixels[128:256, 128:256] == 255).all()
        assert (pixels[:128] != 255).any()
        assert [(region.x, region.y, region.width) for region in slide.damaged] == [(128, 128, 128)]


@pytest.mark.timeout(120)
def test_damaged_files_are_refused_or_read(series: Path) -> None:
    whole = (series / "level0.dcm").read_bytes()
    rng = random.Random(7)
    messages: list[str] = []
    for _ in range(40):
        (series / "level0.dcm").write_bytes(damaged(whole, rng))
        try:
            with open_slide(series) as slide:
                slide.read(0, 0, 0, *slide.size)
        except SlideError as error:
            messages.append(str(error))
    assert len(messages) >= 10
    assert not any("\n" in message for message in messages)
