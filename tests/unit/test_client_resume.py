"""Interrupted work is continued with the pixels of an uninterrupted run; nothing that was saved is lost unasked."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from staindiffuser.client.errors import OutputError
from staindiffuser.client.journal import JOURNAL
from staindiffuser.client.options import StainingOptions
from staindiffuser.client.result_folder import UNFINISHED
from staindiffuser.client.run_record import read_run
from staindiffuser.client.staining import stain_slide
from staindiffuser.client.testing import FAKE_CONTRACT, FakeStainer
from staindiffuser.errors import ServerLostError
from staindiffuser.imaging.arrays import UInt8Array

OPTIONS = StainingOptions(batch=2, in_flight=2, combined=True)
CONTRACT = dataclasses.replace(FAKE_CONTRACT, tile=512, margin=32)
HEIGHT, WIDTH = 3100, 520


def paint(tensor: str, tiles_BTT3: UInt8Array, origins_B2: NDArray[np.int64]) -> UInt8Array:
    """Depends on the other tiles of the batch, as an engine's rounding may; cells where the tile is dark."""
    if tensor.startswith("STAIN"):
        neighbours = (origins_B2.sum() % 40).astype(np.uint8)
        return tiles_BTT3 // 2 + neighbours
    return np.where(tiles_BTT3.min(axis=-1, keepdims=True) < 100, 255, 0).astype(np.uint8)


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven rows of the result, with cells, and glass in the middle."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    pixels = np.stack([170 + 30 * np.sin(x / 19), 120 + 30 * np.cos(y / 23), 160 + 20 * np.sin((x + y) / 31)], axis=-1)
    for cy, cx in np.random.default_rng(0).uniform(20, (HEIGHT - 20, WIDTH - 20), (100, 2)):
        pixels[int(cy) - 8 : int(cy) + 8, int(cx) - 8 : int(cx) + 8] = (80, 50, 110)
    pixels[1300:1700] = 245
    path = tmp_path_factory.mktemp("slide") / "t.tif"
    tifffile.imwrite(
        path, pixels.astype(np.uint8), photometric="rgb", tile=(256, 256),
        resolution=(20000, 20000), resolutionunit="CENTIMETER",
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def whole(slide: Path) -> Path:
    """The uninterrupted result."""
    output = slide.parent / "whole"
    assert stain_slide(slide, output, FakeStainer(paint, CONTRACT), OPTIONS).resumed_rows == 0
    return output


def same(output: Path, whole: Path) -> None:
    assert sorted(path.name for path in output.iterdir()) == sorted(path.name for path in whole.iterdir())
    for path in whole.glob("*.tiff"):
        with tifffile.TiffFile(path) as expected, tifffile.TiffFile(output / path.name) as found:
            for level, (one, other) in enumerate(zip(expected.series[0].levels, found.series[0].levels, strict=True)):
                np.testing.assert_array_equal(other.asarray(), one.asarray(), err_msg=f"{path.name}, level {level}")
    assert (output / "cells.geojson.gz").read_bytes() == (whole / "cells.geojson.gz").read_bytes()
    assert read_run(output).cells == read_run(whole).cells
    assert read_run(output).scores == read_run(whole).scores


@pytest.mark.parametrize("steps", [(1, 2, 2), (3, 1, 1, 1), (5,)])
def test_interrupted_work_is_continued_with_the_same_pixels(
    slide: Path, whole: Path, tmp_path: Path, steps: tuple[int, ...]
) -> None:
    output = tmp_path / "out"
    for requests in steps:
        with pytest.raises(ServerLostError):
            stain_slide(slide, output, FakeStainer(paint, CONTRACT, fail_after=requests), OPTIONS)
        assert not (output / "run.json").exists()
        assert {path.name for path in output.iterdir()} <= {UNFINISHED} if output.exists() else True
    record = stain_slide(slide, output, FakeStainer(paint, CONTRACT), OPTIONS)
    assert record.resumed_rows > 0
    same(output, whole)


@pytest.mark.parametrize("row", [0, 1, 2, 4, 6])
def test_work_can_be_continued_after_any_row(slide: Path, whole: Path, tmp_path: Path, row: int) -> None:
    """Also if it was killed between saving a row and the next."""
    output = tmp_path / "out"
    interrupted(slide, output, after_rows=row)
    journal = output / UNFINISHED / JOURNAL
    with journal.open("ab") as file:  # the next line was being written
        file.write(b'{"images": [[')
    with (output / UNFINISHED / "cd3.ome.tiff.spool").open("ab") as file:
        file.write(b"part of a row that was not saved")
    record = stain_slide(slide, output, FakeStainer(paint, CONTRACT), OPTIONS)
    assert record.resumed_rows == row + 1
    same(output, whole)


class StopAfter(BaseException):
    """A crash: nothing catches it as an expected error."""


def interrupted(slide: Path, output: Path, after_rows: int, monkey: pytest.MonkeyPatch | None = None) -> None:
    """Crash after saving this row."""
    from staindiffuser.client.slide_run import SlideRun

    def stop(self: SlideRun) -> None:
        if self.saved_rows == after_rows + 1:
            raise StopAfter

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SlideRun, "_require_space", stop)
        with pytest.raises(StopAfter):
            stain_slide(slide, output, FakeStainer(paint, CONTRACT), OPTIONS)


def test_a_crash_while_the_files_are_completed(
    slide: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from staindiffuser.client.result_files import ResultFiles

    def crash(self: ResultFiles) -> list[str]:
        complete(self)
        raise StopAfter

    output = tmp_path / "out"
    complete = ResultFiles.finish
    monkeypatch.setattr(ResultFiles, "finish", crash)
    with pytest.raises(StopAfter):
        stain_slide(slide, output, FakeStainer(paint, CONTRACT), OPTIONS)
    monkeypatch.setattr(ResultFiles, "finish", complete)
    stainer = FakeStainer(paint, CONTRACT)
    stain_slide(slide, output, stainer, OPTIONS)
    assert stainer.batches == [], "everything was stained before"
    same(output, whole)


def test_unfinished_work_of_other_settings_is_kept_unless_overwritten(slide: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    interrupted(slide, output, after_rows=1)
    other = tmp_path / "other.tif"
    shutil.copy(slide, other)
    with tifffile.TiffFile(other, mode="r+") as tiff:
        tiff.pages.first.tags["Software"].overwrite("another")
    for path, options, stainer, words in (
        (slide, dataclasses.replace(OPTIONS, seed=4), FakeStainer(paint, CONTRACT), "seed 0 → 4"),
        (slide, dataclasses.replace(OPTIONS, batch=3), FakeStainer(paint, CONTRACT), "batch 2 → 3"),
        (other, OPTIONS, FakeStainer(paint, CONTRACT), "input_sha256"),
        (slide, OPTIONS, FakeStainer(paint, dataclasses.replace(CONTRACT, model_version="a" * 64)), "model_version"),
    ):
        with pytest.raises(OutputError, match=words):
            stain_slide(path, output, stainer, options)
    overwritten = dataclasses.replace(OPTIONS, seed=4, overwrite=True)
    assert stain_slide(slide, tmp_path / "out", FakeStainer(paint, CONTRACT), overwritten).resumed_rows == 0
    interrupted(slide, tmp_path / "again", after_rows=1)
    assert stain_slide(slide, tmp_path / "again", FakeStainer(paint, CONTRACT), OPTIONS).resumed_rows == 2
    same(tmp_path / "again", whole)


@pytest.mark.parametrize("name", ["cd3.ome.tiff.spool", "cd3.ome.tiff.pending-1", JOURNAL])
def test_damaged_unfinished_work_is_done_again(slide: Path, whole: Path, tmp_path: Path, name: str) -> None:
    output = tmp_path / "out"
    interrupted(slide, output, after_rows=2)
    path = output / UNFINISHED / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3] if name != JOURNAL else b"nonsense\n")
    assert stain_slide(slide, output, FakeStainer(paint, CONTRACT), OPTIONS).resumed_rows == 0
    same(output, whole)


def test_a_disk_that_fills_up_stops_the_work_in_time(
    slide: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 10 << 20

    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: Usage)
        with pytest.raises(OutputError, match="nearly full: 10 MiB are free"):
            stain_slide(slide, output, FakeStainer(paint, CONTRACT), OPTIONS)
    assert stain_slide(slide, output, FakeStainer(paint, CONTRACT), OPTIONS).resumed_rows == 1
    same(output, whole)


def test_the_record_says_what_was_resumed(slide: Path, tmp_path: Path) -> None:
    interrupted(slide, tmp_path / "out", after_rows=3)
    stain_slide(slide, tmp_path / "out", FakeStainer(paint, CONTRACT), OPTIONS)
    assert json.loads((tmp_path / "out/run.json").read_text(encoding="utf-8"))["resumed_rows"] == 4
