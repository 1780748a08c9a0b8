"""The numbers beside the images: each nucleus counted once, the same after an interruption, areas in mm²."""

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from staindiffuser.client import scores as scores_module
from staindiffuser.client.errors import OutputError
from staindiffuser.client.options import StainingOptions
from staindiffuser.client.run_record import read_run
from staindiffuser.client.staining import stain_slide
from staindiffuser.client.testing import FAKE_CONTRACT, FakeStainer
from staindiffuser.errors import ServerLostError
from staindiffuser.imaging.arrays import UInt8Array

MPP, RADIUS = 0.5, 7
HEIGHT, WIDTH = 1180, 1400
SPACING = 40
CONTRACT = dataclasses.replace(FAKE_CONTRACT, tile=256, margin=48)


def paint(tensor: str, tiles_BTT3: UInt8Array, origins_B2: NDArray[np.int64]) -> UInt8Array:
    """CD3 marks the nuclei whose x is below 720, CK8/18 none."""
    if tensor.startswith("STAIN"):
        return tiles_BTT3
    x = origins_B2[:, 0, None, None, None] + np.arange(tiles_BTT3.shape[2])[None, None, :, None]
    nuclei = tiles_BTT3[..., :1] < 160
    return np.where(nuclei & (x < 720) & (tensor == "CELLS_CD3"), 255, 0).astype(np.uint8)


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nuclei on a jittered grid."""
    rng = np.random.default_rng(0)
    pixels = np.empty((HEIGHT, WIDTH, 3))
    pixels[:] = (225, 170, 205)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    for top in range(20, HEIGHT - 19, SPACING):
        for left in range(20, WIDTH - 19, SPACING):
            cx, cy = left + rng.integers(-4, 5), top + rng.integers(-4, 5)
            box = np.s_[cy - 10 : cy + 11, cx - 10 : cx + 11]
            pixels[box][np.hypot(x[box] - cx, y[box] - cy) <= RADIUS] = (95, 70, 150)
    pixels += rng.normal(0, 2, pixels.shape)
    path = tmp_path_factory.mktemp("slide") / "t.tif"
    tifffile.imwrite(
        path, np.clip(pixels, 0, 255).astype(np.uint8), photometric="rgb", tile=(256, 256),
        resolution=(20000, 20000), resolutionunit="CENTIMETER",
    )  # fmt: skip
    return path


def test_scores_of_known_nuclei(slide: Path, tmp_path: Path) -> None:
    run = stain_slide(slide, tmp_path / "out", FakeStainer(paint, CONTRACT), StainingOptions())
    assert run.scores is not None
    cd3, ck818 = run.scores.stains
    nuclei = len(range(20, HEIGHT - 19, SPACING)) * len(range(20, WIDTH - 19, SPACING))
    assert cd3.nuclei == ck818.nuclei == nuclei
    assert cd3.positive_nuclei == cd3.cells == nuclei // len(range(20, WIDTH - 19, SPACING)) * 18
    assert cd3.positive_share == pytest.approx(cd3.positive_nuclei / nuclei, abs=1e-6)
    assert (ck818.cells, ck818.positive_nuclei, ck818.positive_share, ck818.positive_area_mm2) == (0, 0, 0.0, 0.0)
    assert run.scores.tissue_area_mm2 == pytest.approx(HEIGHT * WIDTH * (MPP / 1000) ** 2, rel=0.02)
    disk = 149 * (MPP / 1000) ** 2  # pixels with a distance of at most 7 from a pixel
    assert cd3.positive_area_mm2 == pytest.approx(cd3.cells * disk, rel=0.02)
    assert cd3.cells_per_mm2 == pytest.approx(cd3.cells / run.scores.tissue_area_mm2, rel=1e-3)
    assert cd3.positive_area_share == pytest.approx(cd3.positive_area_mm2 / run.scores.tissue_area_mm2, rel=1e-3)
    with (tmp_path / "out/scores.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["stain"] for row in rows] == ["CD3", "CK8/18"]
    assert rows[0]["positive_share"] == str(cd3.positive_share)
    assert float(rows[1]["tissue_area_mm2"]) == run.scores.tissue_area_mm2
    assert run.outputs["scores.csv"] == (tmp_path / "out/scores.csv").stat().st_size


def test_an_interruption_changes_no_number(slide: Path, tmp_path: Path) -> None:
    whole = stain_slide(slide, tmp_path / "whole", FakeStainer(paint, CONTRACT), StainingOptions())
    for requests in (13, 6):
        with pytest.raises(ServerLostError):
            stain_slide(slide, tmp_path / "out", FakeStainer(paint, CONTRACT, fail_after=requests), StainingOptions())
    run = stain_slide(slide, tmp_path / "out", FakeStainer(paint, CONTRACT), StainingOptions())
    assert run.resumed_rows > 0
    assert run.scores == whole.scores
    assert (tmp_path / "out/scores.csv").read_bytes() == (tmp_path / "whole/scores.csv").read_bytes()


def test_a_sample_gives_nearly_the_same_share(slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores_module, "SAMPLE", 40)
    run = stain_slide(slide, tmp_path / "out", FakeStainer(paint, CONTRACT), StainingOptions())
    assert run.scores is not None
    assert run.scores.nuclei_tiles == 40 < run.tiles.stained
    assert 0 < run.scores.stains[0].nuclei < 1015
    assert run.scores.stains[0].positive_share == pytest.approx(18 / 35, abs=0.2)


def test_nuclei_and_cells_can_be_left_out(slide: Path, tmp_path: Path) -> None:
    run = stain_slide(slide, tmp_path / "a", FakeStainer(paint, CONTRACT), StainingOptions(nuclei=False))
    assert run.scores is not None
    assert (run.scores.nuclei_tiles, run.scores.stains[0].positive_share) == (0, None)
    assert run.scores.stains[0].cells > 0
    run = stain_slide(slide, tmp_path / "b", FakeStainer(paint, CONTRACT), StainingOptions(cells=False))
    assert run.scores is None
    assert not (tmp_path / "b/scores.csv").exists()


def test_a_cell_begins_at_the_stains_threshold(slide: Path, tmp_path: Path) -> None:
    """The model's, and the user's rather than the model's: for cells, area, nuclei, and in the record."""

    def faint(tensor: str, tiles_BTT3: UInt8Array, origins_B2: NDArray[np.int64]) -> UInt8Array:
        painted = paint(tensor, tiles_BTT3, origins_B2)
        return painted if tensor.startswith("STAIN") else np.minimum(painted, 100)

    stainer = FakeStainer(faint, dataclasses.replace(CONTRACT, thresholds={"cd3": 0.3}))
    run = stain_slide(slide, tmp_path / "a", stainer, StainingOptions(stains=("cd3",)))
    strict = stain_slide(slide, tmp_path / "b", stainer, StainingOptions(stains=("cd3",), thresholds={"cd3": 0.5}))
    sure = stain_slide(slide, tmp_path / "c", FakeStainer(paint, CONTRACT), StainingOptions(stains=("cd3",)))
    assert run.scores is not None
    assert strict.scores is not None
    assert run.scores == sure.scores
    (none,) = strict.scores.stains
    assert none.nuclei > 0
    assert (none.cells, none.positive_nuclei, none.positive_area_mm2) == (0, 0, 0)
    assert [read_run(tmp_path / name).stains[0].threshold for name in "abc"] == [0.3, 0.5, 0.5]
    assert [found.request.thresholds for found in (run, strict, sure)] == [{"cd3": 0.3}, {}, {}]
    with pytest.raises(OutputError, match="thresholds"):
        stain_slide(
            slide, tmp_path / "a", stainer, StainingOptions(stains=("cd3",), resume=True, thresholds={"cd3": 0.4})
        )


@pytest.mark.parametrize("value", [0.0, 1.0, float("nan")])
def test_a_threshold_is_a_probability(value: float) -> None:
    with pytest.raises(ValueError, match="threshold"):
        StainingOptions(thresholds={"cd3": value})
