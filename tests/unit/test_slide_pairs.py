"""Real sections, registered against the landmarks that people set (ANHIR), and cut into paired tiles."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from staindiffuser.cli import app
from staindiffuser.errors import UsageError
from staindiffuser.training.errors import DataError
from staindiffuser.training.prepare.records import Records, check_settings
from staindiffuser.training.prepare.request import PairRequest
from staindiffuser.training.simulate.slide import SimulatedSlide
from staindiffuser.training.tiles.paired_tiles import PairedTiles

PAIRS = {
    # folder: H&E, IHC, stain; median and largest error allowed, shares of the diagonal
    "rat-kidney_": ("Rat-Kidney_HE", "Rat-Kidney_PanCytokeratin", "panck", 0.0030, 0.018),
    "lesions_": ("Izd2-29-041-w35_HE", "Izd2-29-041-w35_proSPC", "prospc", 0.0060, 0.022),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_sections_are_registered_and_cut(pair: str, real_data: Path, tmp_path: Path) -> None:
    he, ihc, stain, median, largest = PAIRS[pair]
    folder = real_data / "anhir-pairs" / pair / "scale-5pc"
    options = [
        "--he",
        str(folder / f"{he}.jpg"),
        "--ihc",
        f"{stain}={folder / ihc}.jpg",
        "--output",
        str(tmp_path / "t"),
    ]
    options += ["--landmarks", f"{stain}={folder / he}.csv,{folder / ihc}.csv", "--split", "train", "--json"]
    options += ["--he-mpp", "5", "--ihc-mpp", "5", "--mpp", "5"]  # only their ratio matters here
    result = CliRunner().invoke(app, ["prepare", "pairs", *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    error = report["stains"][stain]["target_error"]
    assert error["median"] <= median
    assert error["maximum"] <= largest
    assert len(PairedTiles.load(tmp_path / "t", check="pixels").split("train")) >= 5


def test_sections_of_different_tissue_are_refused(real_data: Path, tmp_path: Path) -> None:
    kidney = real_data / "anhir-pairs" / "rat-kidney_" / "scale-5pc" / "Rat-Kidney_HE.jpg"
    lesion = real_data / "anhir-pairs" / "lesions_" / "scale-5pc" / "Izd2-29-041-w35_proSPC.jpg"
    options = ["--he", str(kidney), "--ihc", f"prospc={lesion}", "--output", str(tmp_path / "t")]
    options += ["--he-mpp", "5", "--ihc-mpp", "5", "--mpp", "5"]
    with pytest.raises(DataError, match="score"):
        CliRunner().invoke(app, ["prepare", "pairs", *options], catch_exceptions=False)
    assert not (tmp_path / "t" / "tiles.csv").exists()


def test_a_pair_is_looked_at_then_cut_then_taken_over(tmp_path: Path) -> None:
    slide = SimulatedSlide(3, 1536, 1152)
    Image.fromarray(slide.read(0, 0, 1536, 1152)).save(tmp_path / "he.png")
    Image.fromarray(np.rot90(slide.read_ihc("cd3", 0, 0, 1536, 1152))).save(tmp_path / "ihc.png")
    options = ["--he", str(tmp_path / "he.png"), "--he-mpp", "0.5", "--ihc-mpp", "0.5", "--jobs", "1"]
    options += ["--output", str(tmp_path / "t"), "--json"]

    def run(*more: str) -> dict:
        result = CliRunner().invoke(app, ["prepare", "pairs", *options, *more], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    ihc = str(tmp_path / "ihc.png")
    looked_at = run("--ihc", f"wrong_name={ihc}", "--dry-run")
    assert abs(looked_at["stains"]["wrong_name"]["rotation"]) == pytest.approx(90, abs=0.5)
    assert (tmp_path / "t" / looked_at["stains"]["wrong_name"]["image"]).is_file()
    assert not (tmp_path / "t" / "tiles.csv").exists()
    cut = run("--ihc", f"cd3={ihc}")  # what was only looked at does not decide which stains the folder holds
    assert cut["written"] == cut["kept"] > 5
    assert cut["kept"] + sum(cut["dropped"].values()) == cut["tiles"] == 6 * 4
    assert PairedTiles.load(tmp_path / "t", check="pixels").stains == ("cd3",)
    assert run("--ihc", f"cd3={ihc}")["written"] == 0
    with pytest.raises(UsageError, match="stains differs"):
        run("--ihc", f"ck818={ihc}")


def test_slides_of_one_name_and_size_are_told_apart(tmp_path: Path) -> None:
    requests = []
    for case in ("case1", "case2"):
        for name in ("he.tif", "cd3.tif"):
            (tmp_path / case).mkdir(exist_ok=True)
            (tmp_path / case / name).write_bytes(f"{case} {name}".encode() * 40_000)
        ihc = {"cd3": tmp_path / case / "cd3.tif"}
        requests.append(PairRequest(he=tmp_path / case / "he.tif", ihc=ihc, output=tmp_path / "t"))
    assert requests[0].settings() != requests[1].settings()
    records = tmp_path / "t/pairs/he.regions.jsonl"
    Records(records, requests[0].settings())
    assert check_settings(records, requests[0].settings()) == []
    with pytest.raises(UsageError, match="other slides"):
        check_settings(records, requests[1].settings())
