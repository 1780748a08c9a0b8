"""What a client makes of the measures of quality: summary, map, table, warnings, and what an interruption keeps."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from staindiffuser.client import StainClient
from staindiffuser.client.contract import QualityContract
from staindiffuser.client.errors import ContractError
from staindiffuser.client.options import StainingOptions
from staindiffuser.client.quality import COLOURS, FINE, WHITE, QualityRecord
from staindiffuser.client.run_record import read_run
from staindiffuser.client.staining import stain_slide
from staindiffuser.client.testing import FAKE_CONTRACT, FakeStainer, FakeTriton, identity
from staindiffuser.errors import ServerLostError
from staindiffuser.imaging.arrays import UInt8Array

JUDGING = dataclasses.replace(
    FAKE_CONTRACT,
    quality=QualityContract(
        tile=("tissue", "unlike", "blur", "clipped"),
        stain=("positive", "disagreement", "uncertainty"),
        limits={"unlike": 2.0, "blur": 1.5, "clipped": 0.2},
        reference="40 fields",
    ),
)


def judging(tensor: str, tiles_BTT3: UInt8Array, origins_B2: NDArray[np.int64]) -> NDArray[Any]:
    """Tiles right of x = 600 are unlike; the top row is blurred; the measures of stains tell the tile's place."""
    if not tensor.startswith("QUALITY"):
        return identity(tensor, tiles_BTT3, origins_B2)
    x, y = origins_B2.T.astype(np.float32)
    if tensor == "QUALITY":
        tissue = (tiles_BTT3.min(axis=-1) < 207).mean(axis=(1, 2), dtype=np.float32)
        return np.stack([tissue, np.where(x > 600, 3, 1), np.where(y < 0, 2, 1), 0 * x], axis=1).astype(np.float32)
    return np.stack([x, y, x + y], axis=1) / np.float32(1e4)


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    """1,500 × 900 pixels of tissue."""
    y, x = np.mgrid[:900, :1500]
    pixels = np.stack([170 + 30 * np.sin(x / 19), 120 + 30 * np.cos(y / 23), 160 + 20 * np.sin((x + y) / 31)], axis=-1)
    tifffile.imwrite(
        tmp_path / "slide.tiff", pixels.astype(np.uint8), photometric="rgb", resolution=(20000, 20000),
        resolutionunit="CENTIMETER",
    )  # fmt: skip
    return tmp_path / "slide.tiff"


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "quality.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_summary_map_table_and_warning(slide: Path, tmp_path: Path) -> None:
    run = stain_slide(slide, tmp_path / "out", FakeStainer(judging, JUDGING))
    assert read_run(tmp_path / "out") == run
    assert {"quality.csv", "quality.png"} <= run.outputs.keys()
    quality = run.quality
    assert isinstance(quality, QualityRecord)
    rows = table(tmp_path / "out")
    assert quality.judged == len(rows) == run.tiles.stained
    unlike = [row for row in rows if "unlike" in row["flags"]]
    assert quality.flagged["unlike"] == len(unlike) == sum(int(row["x"]) > 600 for row in rows) > 0
    assert quality.flagged["blur"] == sum(int(row["y"]) < 0 for row in rows) > 0
    assert quality.flagged["clipped"] == 0
    assert quality.tiles["unlike"] == pytest.approx(np.mean([float(row["unlike"]) for row in rows]), abs=1e-4)
    assert all(float(row["cd3_positive"]) == pytest.approx(int(row["x"]) / 1e4, abs=1e-5) for row in rows)
    assert quality.stains["CD3"]["positive"] == pytest.approx(np.mean([int(row["x"]) for row in rows]) / 1e4, abs=1e-4)
    (warning,) = [line for line in run.warnings if "unlike" in line]
    assert warning.startswith(
        f"{len(unlike)} of {len(rows)} tiles with tissue are unlike the tissue that the model knows"
    )
    with Image.open(tmp_path / "out" / "quality.png") as image:
        assert "unlike: above 2" in image.info["Description"]
        drawn = np.asarray(image)
    columns, count = max(int(row["column"]) for row in rows) + 1, max(int(row["row"]) for row in rows) + 1
    side = drawn.shape[1] // columns
    assert drawn.shape == (count * side, columns * side, 3)
    for row in rows:
        pixel = tuple(drawn[int(row["row"]) * side + side // 2, int(row["column"]) * side + side // 2])
        reasons = row["flags"].split()
        assert pixel == (COLOURS["unlike"] if "unlike" in reasons else COLOURS["blur"] if reasons else FINE)


def test_without_cells_only_the_tiles_are_judged(slide: Path, tmp_path: Path) -> None:
    run = stain_slide(slide, tmp_path / "out", FakeStainer(judging, JUDGING), StainingOptions(cells=False))
    assert run.quality is not None
    assert run.quality.judged > 0
    assert run.quality.stains == {"CD3": {}, "CK8/18": {}}
    assert {row["cd3_positive"] for row in table(tmp_path / "out")} == {""}


def test_glass_is_not_judged(tmp_path: Path) -> None:
    """A tile that is stained because tissue is near, but shows next to none of it."""
    white = np.full((256, 256, 3), 243, np.uint8)
    white[:4, :4] = (150, 60, 140)
    Image.fromarray(white).save(tmp_path / "tile.png")
    run = stain_slide(tmp_path / "tile.png", tmp_path / "out", FakeStainer(judging, JUDGING), StainingOptions(mpp=0.5))
    assert run.quality is not None
    assert run.quality.judged == 0
    assert run.quality.tiles == {}
    with Image.open(tmp_path / "out" / "quality.png") as image:
        assert set(map(tuple, np.asarray(image).reshape(-1, 3).tolist())) == {WHITE}


def test_a_model_that_does_not_judge_leaves_no_trace(slide: Path, tmp_path: Path) -> None:
    run = stain_slide(slide, tmp_path / "out", FakeStainer())
    assert run.quality is None
    assert not (tmp_path / "out" / "quality.csv").exists()


def test_an_interruption_keeps_what_was_measured(slide: Path, tmp_path: Path) -> None:
    options = StainingOptions(batch=1, in_flight=1)
    whole = stain_slide(slide, tmp_path / "whole", FakeStainer(judging, JUDGING), options)
    half = whole.tiles.stained * 3 // 4
    with pytest.raises(ServerLostError):
        stain_slide(slide, tmp_path / "out", FakeStainer(judging, JUDGING, fail_after=half), options)
    stainer = FakeStainer(judging, JUDGING)
    again = stain_slide(slide, tmp_path / "out", stainer, options)
    assert again.resumed_rows > 0
    assert sum(stainer.batches) < whole.tiles.stained
    assert again.quality == whole.quality
    for name in ("quality.csv", "quality.png"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_measures_come_over_the_wire_and_are_asked_for_by_name() -> None:
    tiles, origins = np.zeros((2, 256, 256, 3), np.uint8), np.array([[0, 0], [640, 16]], np.int64)
    with FakeTriton(judging, JUDGING) as server, StainClient(server.url) as client:
        assert client.contract == JUDGING
        outputs = client.stain_tiles(tiles, origins, quality=True, stains=["ck818"])
        assert list(outputs) == ["STAIN_CK818", "CELLS_CK818", "QUALITY", "QUALITY_CK818"]
        assert outputs["QUALITY"].dtype == np.float32
        np.testing.assert_allclose(outputs["QUALITY"][:, 1], [1, 3])
        assert list(client.stain_tiles(tiles, origins, quality=True, cells=False)) == [
            "STAIN_CD3", "STAIN_CK818", "QUALITY",
        ]  # fmt: skip
        assert "QUALITY" not in client.stain_tiles(tiles, origins)

    def wrong(tensor: str, tiles_BTT3: UInt8Array, origins_B2: NDArray[np.int64]) -> NDArray[Any]:
        value = judging(tensor, tiles_BTT3, origins_B2)
        return value[:, :2].copy() if tensor == "QUALITY" else value

    message = r"returned float32 \[2, 2\] for QUALITY, not float32 \[2, 4\]"
    with (
        FakeTriton(wrong, JUDGING) as server,
        StainClient(server.url) as client,
        pytest.raises(ContractError, match=message),
    ):
        client.stain_tiles(tiles, origins, quality=True)
