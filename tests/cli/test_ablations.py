"""``staindiffuser bench ablations`` on the debug preset: every arm, resumed, refused; and what it says of the claim."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import staindiffuser.training
from staindiffuser.benchmarks.ablation_report import Difference, Spread, claim, differences
from staindiffuser.benchmarks.ablation_tiles import open_tiles, subset
from staindiffuser.benchmarks.ablations import _CODE, ARMS, SMALL, AblationStudy, _code, chosen_preset
from staindiffuser.benchmarks.ablations_cli import ablations
from staindiffuser.errors import UsageError
from staindiffuser.training.data.targets import load_tile
from staindiffuser.training.errors import DataError
from staindiffuser.training.loop import fit
from staindiffuser.training.tiles.paired_tiles import PairedTiles

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(ablations)
TINY = ["--preset", "debug", "--steps", "2", "--batch", "2", "--crop", "32", "--tile", "48", "--test-tiles", "3"]


def run(tiles: Path, output: Path, *options: str) -> tuple[dict[str, Any], str]:
    result = CliRunner().invoke(app, ["--data", str(tiles), "--output", str(output), *TINY, *options])
    if result.exception is not None:
        raise result.exception
    return json.loads((output / "results.json").read_text()), result.stderr


@pytest.fixture(scope="module")
def other_tiles(tiles_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiles without CK8/18."""
    folder = tmp_path_factory.mktemp("other") / "tiles"
    shutil.copytree(tiles_folder, folder)
    with (folder / "tiles.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = [name for name in rows[0] if not name.startswith("ck818")]
    with (folder / "tiles.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return folder


@pytest.fixture(scope="module")
def table(tiles_folder: Path, other_tiles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every arm once, at four tiles."""
    output = tmp_path_factory.mktemp("ablations")
    run(tiles_folder, output, "--sizes", "4", "--seeds", "1", "--arms", ",".join(ARMS), "--simulated", str(other_tiles))
    return output


def test_every_arm_is_in_the_table(table: Path) -> None:
    report = json.loads((table / "results.json").read_text())
    records = {record["settings"]["arm"]: record for record in report["runs"]}
    assert tuple(records) == ARMS
    for arm, record in records.items():
        assert set(record["stains"]) == {"cd3", "ck818"}
        for values in record["stains"].values():
            assert {"dab_dice", "psnr", "ssim"} <= set(values)
            assert ("cell_dice" in values) == (arm in ("plain", "separate", "mixed", "dual"))
        assert (record["models"], record["steps"]) == ((2, 4) if arm == "separate" else (1, 2))
        assert record["seconds"] > 0
    size = {arm: record["parameters"] for arm, record in records.items()}
    assert size["single"] < size["plain"] < size["dual"] == size["mixed"] < size["separate"]
    assert size["regression"] == size["pix2pix"] == pytest.approx(size["single"], rel=0.05)
    text = (table / "ablations.md").read_text()
    assert "| stains one by one | 4 |" in text
    assert "2 × 2 |" in text
    assert (table / "ablations.png").stat().st_size > 5000
    assert sorted(path.suffix for path in (table / "runs").iterdir()) == [".json"] * len(ARMS)


def test_finished_runs_are_kept_until_their_settings_change(table: Path, tiles_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "ablations"
    shutil.copytree(table, output)
    options = ["--sizes", "4", "--arms", "single,dual"]
    report, told = run(tiles_folder, output, *options, "--seeds", "2")
    assert told.count("done before") == 2
    assert [(d["other"], len(d["values"])) for d in report["differences"]] == [("single", 2)] * 2
    before = json.loads((table / "runs" / "dual-4-0.json").read_text())
    assert report["runs"][1] == before
    _, told = run(tiles_folder, output, *options, "--seeds", "1", "--batch", "4")
    assert "done before" not in told
    assert json.loads((output / "runs" / "dual-4-0.json").read_text())["key"] != before["key"]


@pytest.mark.parametrize("name", ["augmentation.py", "dataset.py", "targets.py"])
def test_other_samples_are_other_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = staindiffuser.training.__path__
    shutil.copytree(source, tmp_path / "training")
    monkeypatch.setattr(staindiffuser.training, "__path__", [str(tmp_path / "training")])
    before = _code(*_CODE)
    with (tmp_path / "training" / "data" / name).open("a") as file:
        file.write("# says nothing new\n")
    assert _code(*_CODE) == before
    with (tmp_path / "training" / "data" / name).open("a") as file:
        file.write("CHANGED = True\n")
    assert _code(*_CODE) != before


def test_an_interrupted_table_goes_on(
    table: Path, tiles_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = 0

    def stopped(*arguments: Any, **more: Any) -> Any:
        nonlocal started
        started += 1
        if started == 2:
            raise KeyboardInterrupt
        return fit(*arguments, **more)

    options = ["--sizes", "4", "--seeds", "1", "--arms", "regression,single"]
    with monkeypatch.context() as patch:
        patch.setattr("staindiffuser.benchmarks.ablations.fit", stopped)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            run(tiles_folder, tmp_path, *options)
    assert [path.name for path in (tmp_path / "runs").glob("*.json")] == ["regression-4-0.json"]
    report, told = run(tiles_folder, tmp_path, *options)
    assert told.count("done before") == 1
    whole = json.loads((table / "results.json").read_text())["runs"]
    for record in report["runs"]:
        same = next(r for r in whole if r["settings"]["arm"] == record["settings"]["arm"])
        assert record["stains"] == same["stains"]  # and so does a run that is done twice


def study(tiles: Path, output: Path, **changes: Any) -> AblationStudy:
    preset = chosen_preset("debug", crop=32)
    return dataclasses.replace(AblationStudy(data=tiles, output=output, preset=preset, sizes=(4,), tile=48), **changes)


def test_tiles_are_cut_from_the_middle(tiles_folder: Path, tmp_path: Path) -> None:
    tiles, rows = open_tiles(study(tiles_folder, tmp_path), print)
    assert len(tiles.tiles) == 4
    assert {row.split for row in rows} == {"test"}
    source = {f"{row.split}-{row.row:07d}.png": row for row in PairedTiles.load(tiles_folder).tiles}
    for row in (*tiles.tiles, *rows):
        whole, cut = (load_tile(r, tiles.stains) for r in (source[row.he.name], row))
        for name, array in cut.items():
            np.testing.assert_array_equal(array, whole[name][8:56, 8:56])


def test_larger_sets_hold_smaller_ones_and_seeds_draw_their_own(tiles_folder: Path, tmp_path: Path) -> None:
    tiles, _ = open_tiles(study(tiles_folder, tmp_path, sizes=(None,), tile=None), print)
    chosen = {
        (size, seed): {row.he for row in subset(tiles, size, seed).tiles} for size in (2, 4, None) for seed in range(4)
    }
    assert all(chosen[2, seed] < chosen[4, seed] < chosen[None, seed] for seed in range(4))
    assert len({frozenset(chosen[4, seed]) for seed in range(4)}) > 1


def test_which_runs_there_are(tiles_folder: Path, tmp_path: Path) -> None:
    runs = list(study(tiles_folder, tmp_path, sizes=(64, 256, 1024), seeds=3).runs())
    assert len(runs) == 3 * (3 * 3 + 3)
    assert {run.tiles for run in runs if run.arm == "pix2pix"} == {256}
    assert {run.tiles for run in runs if run.arm == "single"} == {64, 256, 1024}
    assert len({run.name for run in runs}) == len(runs)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--sizes", "9"], DataError, "8 training tiles, but --sizes asks for 9"),
        (["--sizes", "few"], UsageError, "--sizes few: must be numbers of tiles"),
        (["--sizes", "4", "--arms", "dual,cyclegan"], UsageError, "'cyclegan' is unknown"),
        (["--sizes", "4", "--arms", "mixed"], UsageError, "name the folder of the other tiles"),
        (["--sizes", "4", "--tile", "40"], UsageError, "--tile 40: must be a multiple of 16"),
        (["--sizes", "4", "--tile", "80"], DataError, "row 2: the tile is 64 × 64, smaller than 80"),
        (["--sizes", "4", "--sampler-steps", "3"], UsageError, "there are 1, 2, 4"),
    ],
)
def test_what_cannot_be_is_refused_before_any_training(
    tiles_folder: Path, tmp_path: Path, options: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(tiles_folder, tmp_path / "out", *options)
    assert not (tmp_path / "out" / "runs").exists()


def test_scoring_on_a_slide_that_was_trained_on_is_refused(tiles_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiles"
    shutil.copytree(tiles_folder, folder)
    csv = folder / "tiles.csv"
    csv.write_text(csv.read_text().replace(",train,", ",test,"))
    with pytest.raises(DataError, match="slide 's"):
        run(tiles_folder, tmp_path / "out", "--sizes", "4", "--test", str(folder))


def test_help_needs_no_torch() -> None:
    program = (
        "import sys; sys.modules['torch'] = None; import typer;"
        "from staindiffuser.benchmarks.ablations_cli import ablations; typer.run(ablations)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, "--help"], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "pix2pix" in result.stdout


def test_the_small_preset_lies_between_debug_and_demo() -> None:
    assert chosen_preset("small", steps=7).train.steps == 7
    debug, demo = chosen_preset("debug").model, chosen_preset("demo").model
    assert sum(debug.image.channels) < sum(SMALL.model.image.channels) < sum(demo.image.channels)


def record(arm: str, tiles: int, seed: int, dice: float) -> dict[str, Any]:
    stains = {"cd3": {"dab_dice": dice - 0.1}, "ck818": {"dab_dice": dice + 0.1}}
    return {"settings": {"arm": arm, "tiles": tiles, "seed": seed}, "stains": stains}


def test_spread_is_students() -> None:
    low, high = Spread(values=(1.0, 2.0, 3.0)).interval
    assert (low, high) == pytest.approx((2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3)), abs=1e-4)
    assert Spread(values=(0.5,)).interval == (-math.inf, math.inf)
    assert Spread(values=(0.1, 0.3)).text(2, sign=True) == "+0.20 ± 0.14"


def test_differences_pair_by_seed() -> None:
    records = [record("dual", 64, seed, 0.5 + 0.1 * seed) for seed in range(3)]
    records += [record("single", 64, seed, 0.45 + 0.1 * seed) for seed in (2, 1)]
    found, correlation = differences(records)
    assert (found.metric, correlation.metric) == ("dab_dice", "od_correlation")
    assert (found.arm, found.other, found.tiles) == ("dual", "single", 64)
    assert found.spread.values == pytest.approx((0.05, 0.05))
    assert found.verdict == "better"


@pytest.mark.parametrize(
    ("few", "many", "words"),
    [
        ((0.10, 0.11, 0.12), (0.01, -0.01, 0.02), ["holds in this test", "less: +0.007, no difference shown"]),
        (
            (0.10, 0.11, 0.12),
            (0.20, 0.21, 0.22),
            ["holds in this test", "no less: +0.210, better", "By OD correlation with 64 tiles: -0.110 ± 0.010, worse"],
        ),
        ((0.10, -0.11, 0.12), (0.20, 0.21, 0.22), ["is not shown by this test", "With 1024 tiles it was +0.210"]),
        ((-0.10, -0.11, -0.12), (0.0, 0.01, -0.01), ["the segmentation task hurt"]),
        ((0.5,), (0.1,), ["is not shown by this test"]),
    ],
)
def test_the_claim_is_judged_either_way(few: tuple[float, ...], many: tuple[float, ...], words: list[str]) -> None:
    pairs = [
        Difference(arm="dual", other="single", tiles=tiles, spread=Spread(values=values))
        for tiles, values in ((1024, many), (64, few))
    ]
    opposite = Spread(values=tuple(-value for value in few))
    pairs.append(Difference(metric="od_correlation", arm="dual", other="single", tiles=64, spread=opposite))
    text = claim(pairs)
    for word in words:
        assert word in text
    assert "not tested" in claim([])
