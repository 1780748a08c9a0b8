"""``data check``: all that is wrong with a folder is said at once, and planted faults are among those to look at."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from typer.testing import CliRunner

from staindiffuser.cli import app
from staindiffuser.training.check.check import CheckReport, check_tiles
from staindiffuser.training.errors import DataError
from staindiffuser.training.simulate.config import SimulatorConfig
from staindiffuser.training.simulate.folder import TilesRequest, write_tiles
from staindiffuser.training.tiles.paired_tiles import PairedTile, PairedTiles

COUNT, SIDE = 96, 128


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clean")
    config = SimulatorConfig(misaligned_share=0.0, pen_share=0.0, damage=False)
    write_tiles(TilesRequest(output=folder, count=COUNT, size=SIDE, seed=5, config=config))
    return folder


@pytest.fixture(scope="module")
def report(clean: Path) -> CheckReport:
    return check_tiles(clean)


@pytest.fixture
def folder(clean: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clean, tmp_path / "tiles"))


def change(path: Path, how: Callable[[np.ndarray], np.ndarray]) -> None:
    image = np.asarray(Image.open(path))
    Image.fromarray(how(image)).save(path)


def rich_in_nuclei(folder: Path) -> list[PairedTile]:
    """Tiles full of tissue, in file order."""
    tiles = PairedTiles.load(folder).tiles
    return [tile for tile in tiles if (np.asarray(Image.open(tile.he)).mean(axis=-1) < 200).mean() > 0.6]


def said_of(report: CheckReport, tile: PairedTile) -> dict[str, str]:
    return {part.kind: part.words for part in report.suspicions if part.tile.he == tile.he}


def test_the_summary_of_a_clean_folder(clean: Path, report: CheckReport) -> None:
    assert report.errors == ()
    assert sum(report.tiles.values()) == COUNT
    assert report.sizes == {f"{SIDE} x {SIDE}": COUNT}
    assert report.mpp == (0.5, 0.5)
    assert report.patients == 0
    for stain in ("cd3", "ck818"):
        masks = [
            np.asarray(Image.open(mask)) >= 128
            for tile in PairedTiles.load(clean).split("train")
            if (mask := tile.masks[stain]) is not None
        ]
        assert report.stains[stain].masks == "grey"
        assert report.stains[stain].positive["train"] == pytest.approx(np.mean(masks), abs=1e-4)
        assert report.stains[stain].tiles_with_positive["train"] == sum(mask.mean() >= 0.01 for mask in masks)
        assert report.stains[stain].correlation > 0.8
    assert {part.kind for part in report.suspicions} <= {"colour", "mask"}
    assert len(report.suspicions) < 0.1 * COUNT


def test_planted_faults_are_suspicious(folder: Path) -> None:
    blurred, moved, red, hazy, erased = rich_in_nuclei(folder)[:50:10]
    change(blurred.he, lambda image: ndimage.gaussian_filter(image, (4, 4, 0)))
    change(moved.image("cd3"), lambda image: np.roll(image, 9, axis=1))
    change(red.he, lambda image: (image * [1.0, 0.45, 0.45]).astype(np.uint8))
    change(hazy.image("ck818"), lambda image: (image * [0.9, 0.82, 0.76]).astype(np.uint8))
    change(erased.image("ck818"), lambda image: np.full_like(image, (140, 95, 60)))
    found = check_tiles(folder)
    assert "H&E blurred" in said_of(found, blurred)["blurred"]
    assert "cd3 fits better when shifted by 9 px" in said_of(found, moved)["misaligned"]
    assert "odd colour" in said_of(found, red)["colour"]
    assert "ck818 is brown where it is negative" in said_of(found, hazy)["background"]
    assert "DAB 100.0%" in said_of(found, erased)["mask"]


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "tiles.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_rows(folder: Path, rows: list[dict[str, str]]) -> None:
    with (folder / "tiles.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["data", "check", "--jobs", "1", *map(str, arguments)])


def test_everything_wrong_is_said_at_once_and_ends_with_4(folder: Path) -> None:
    first = next(tile for tile in rich_in_nuclei(folder) if tile.split == "train")
    second = PairedTiles.load(folder).split("val")[0]
    shutil.copy(first.he, second.he)
    for row in rows_of(folder):
        mask = np.asarray(Image.open(folder / row["cd3_mask"])) >= 128
        Image.fromarray((ndimage.label(mask)[0] % 3).astype(np.uint8)).save(folder / row["cd3_mask"])
    rows = rows_of(folder)
    write_rows(folder, [*rows, rows[-1]])
    with pytest.raises(DataError):
        PairedTiles.load(folder)
    result = invoke(folder, "--json")
    assert isinstance(result.exception, DataError)
    assert "and 2 more" in str(result.exception)
    errors = json.loads(result.stdout)["errors"]
    assert len(errors) == 3
    for error, words in zip(
        errors, ("delete one of the rows", "hold the values 0, 1, 2", "is the same image"), strict=True
    ):
        assert words in error
    assert any(part["kind"] == "copy" for part in json.loads(result.stdout)["suspicions"])


def test_the_tables_and_the_sheet(folder: Path, tmp_path: Path) -> None:
    worst = rich_in_nuclei(folder)[3]
    change(worst.image("ck818"), lambda image: np.roll(image, 9, axis=0))
    result = invoke(folder, "--sheet", tmp_path / "sheet.png", "--count", 4)
    assert result.exit_code == 0, result.output
    for words in ("CK8/18", "0 to 255", "positive", worst.he.name, "fits better when shifted by 9 px"):
        assert words in result.output
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape[0] >= 192
    shown = np.asarray(Image.fromarray(np.asarray(Image.open(worst.he))).resize((192, 192), Image.Resampling.BOX))
    shown_tiles = [(sheet[34 + row * 226 :][:192, column * 586 :][:, :192]) for row in range(2) for column in range(3)]
    assert any(part.shape == shown.shape and np.abs(part.astype(int) - shown).max() == 0 for part in shown_tiles)


def test_patients_are_counted(folder: Path) -> None:
    write_rows(folder, [row | {"patient": row["slide"][-2:]} for row in rows_of(folder)])
    assert check_tiles(folder).patients == COUNT // 8


def test_a_damaged_image_is_named(folder: Path) -> None:
    path = PairedTiles.load(folder).tiles[7].he
    path.write_bytes(path.read_bytes()[:-60])
    result = invoke(folder)
    assert path.name in str(result.exception)


def test_a_mask_without_an_image_is_enough(folder: Path, tmp_path: Path) -> None:
    rows = rows_of(folder)
    alone = rows[0]["slide"]
    before = {part.slide: part for part in check_tiles(folder).slides}[alone]
    write_rows(folder, [row | ({"cd3": ""} if row["slide"] == alone else {}) for row in rows])
    report = check_tiles(folder)
    assert report.errors == ()
    assert report.stains["cd3"].with_mask == COUNT
    assert report.stains["cd3"].with_image == COUNT - sum(row["slide"] == alone for row in rows)
    assert report.stains["ck818"].with_image == COUNT
    assert {part.slide: part for part in report.slides}[alone].positive == before.positive
    assert invoke(folder, "--sheet", tmp_path / "sheet.jpg").exit_code == 0
