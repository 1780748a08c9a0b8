"""Many slides: each has its outcome, none stops the others, and what was done is written down."""

from __future__ import annotations

import csv
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile

from staindiffuser.client.command import run_command
from staindiffuser.client.inspection import check_slide, slide_info
from staindiffuser.client.options import StainingOptions
from staindiffuser.client.target import Target
from staindiffuser.client.testing import FakeTriton, identity
from staindiffuser.errors import ServerLostError
from staindiffuser.imaging.errors import MissingPixelSizeError, SlideError

OPTIONS = StainingOptions(stains=("cd3",), batch=2, keep_names=True)


@pytest.fixture
def server() -> Iterator[FakeTriton]:
    with FakeTriton() as fake:
        yield fake


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Three tiles and a damaged one."""
    y, x = np.mgrid[:300, :300]
    pixels = np.stack([170 + 30 * np.sin(x / 19), 90 + 30 * np.cos(y / 23), 160 + 0 * x], axis=-1).astype(np.uint8)
    pixels[100:116, 100:116] = (80, 50, 110)
    folder = tmp_path / "scans"
    folder.mkdir()
    for name in ("a", "b", "d"):
        tifffile.imwrite(
            folder / f"{name}.tif", pixels, photometric="rgb", resolution=(20000, 20000), resolutionunit="CENTIMETER"
        )
    (folder / "c.tif").write_bytes(b"II*\0nonsense")
    return folder


def summary(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "summary.csv").open(encoding="utf-8", newline="") as file:
        return {Path(row["slide"]).name: row for row in csv.DictReader(file)}


def test_a_folder_of_slides(
    scans: Path, tmp_path: Path, server: FakeTriton, capsys: pytest.CaptureFixture[str]
) -> None:
    target, out = Target(addresses=(server.url,)), tmp_path / "out"
    assert run_command([scans / "b.tif"], out / "b-stained", target, OPTIONS) == 0
    (out / "d-stained").mkdir()
    (out / "d-stained/run.json").write_text("{}", encoding="utf-8")
    capsys.readouterr()
    assert run_command([scans], out, target, OPTIONS, as_json=True) == 1
    printed = capsys.readouterr()
    lines = {Path(line["input"]["path"]).name: line for line in map(json.loads, printed.out.splitlines())}
    assert {name: line["status"] for name, line in lines.items()} == {
        "a.tif": "stained", "b.tif": "kept", "c.tif": "failed", "d.tif": "failed",
    }  # fmt: skip
    assert lines["c.tif"]["exit_code"] == 4
    assert "run.json" in lines["d.tif"]["error"], "a result that cannot be read is not replaced"
    assert lines["a.tif"]["tiles"]["stained"] == int(summary(out)["a.tif"]["tiles"]) > 0
    assert summary(out)["c.tif"]["status"] == "failed"
    assert (
        summary(out)["a.tif"]["cells CD3"] == str(lines["a.tif"]["cells"]["CD3"]) if lines["a.tif"]["cells"] else True
    )
    assert "1 stained, 1 kept, 2 failed" in " ".join(printed.err.split())
    assert "3 of 4 slides" in printed.err


def test_a_lost_server_ends_the_batch_but_not_its_record(scans: Path, tmp_path: Path) -> None:
    def die(tensor: str, tiles: np.ndarray, origins: np.ndarray) -> np.ndarray:
        if dying.requests > 3:
            threading.Thread(target=dying.kill).start()
            time.sleep(2)
        return identity(tensor, tiles, origins)

    with FakeTriton(die) as dying, pytest.raises(ServerLostError):
        run_command([scans], tmp_path / "out", Target(addresses=(dying.url,), patience=0), OPTIONS)
    states = {name: row["status"] for name, row in summary(tmp_path / "out").items()}
    assert states == {"a.tif": "stained", "b.tif": "interrupted", "c.tif": "not started", "d.tif": "not started"}


def test_a_list_gives_each_slide_its_pixel_size(scans: Path, tmp_path: Path, server: FakeTriton) -> None:
    for name in ("a", "b"):
        tifffile.imwrite(scans / f"{name}.tif", tifffile.imread(scans / f"{name}.tif"), photometric="rgb")
    (scans / "night.csv").write_text("slide,mpp,output\na.tif,0.25,fine\nb.tif,0.5,\n", encoding="utf-8")
    assert run_command([scans / "night.csv"], tmp_path / "out", Target(addresses=(server.url,)), OPTIONS) == 0
    sizes = {
        folder: json.loads((tmp_path / "out" / folder / "run.json").read_text(encoding="utf-8"))["result"]["size"]
        for folder in ("fine", "b-stained")
    }
    assert sizes == {"fine": [150, 150], "b-stained": [300, 300]}


def test_a_dry_run_sends_nothing_and_leaves_nothing(
    scans: Path, tmp_path: Path, server: FakeTriton, capsys: pytest.CaptureFixture[str]
) -> None:
    slides = [scans / "a.tif", scans / "b.tif"]
    options = (Target(addresses=(server.url,)), OPTIONS)
    assert run_command(slides, tmp_path / "out", *options, as_json=True, dry_run=True) == 0
    printed = capsys.readouterr()
    plans = [json.loads(line) for line in printed.out.splitlines()]
    assert [plan["status"] for plan in plans] == ["planned", "planned"]
    assert plans[0]["tiles"] == 4
    assert 0 < plans[0]["disk_bytes"] < plans[0]["memory_bytes"]
    assert "MiB of disk" in printed.err
    assert server.requests == 0
    assert not (tmp_path / "out").exists()


def test_info_and_check(scans: Path, real_data: Path) -> None:
    found = slide_info(real_data / "slides/tcga-cr-7395-01a-01-ts1.svs")
    assert found["size"] == "4443 × 3567"
    assert found["mpp"] is None
    assert found["levels"] == ["4443 × 3567", "2221 × 1783"]
    assert "ok" in check_slide(real_data / "slides/CMU-1-Small-Region.svs")
    with pytest.raises(MissingPixelSizeError, match="--mpp"):
        check_slide(real_data / "slides/tcga-cr-7395-01a-01-ts1.svs")
    with pytest.raises(SlideError):
        check_slide(scans / "c.tif")
