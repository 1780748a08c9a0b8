"""The benchmarks' page and charts come from their files alone, and the README's numbers are those of the files."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from staindiffuser.benchmarks.report import headline, read_results, write_report
from staindiffuser.errors import InputError, UsageError

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ROOT / "docs" / "explanation" / "benchmarks"


def test_the_page_is_that_of_the_results(tmp_path: Path) -> None:
    page = write_report(RESULTS, tmp_path)
    assert page.read_text(encoding="utf-8") == (PAGES / "benchmarks.md").read_text(encoding="utf-8"), (
        "docs/explanation/benchmarks is not what benchmarks/results says: run `staindiffuser bench report`"
    )
    charts = re.findall(r"\]\(([^)]+\.png)\)", page.read_text(encoding="utf-8"))
    assert charts
    for chart in charts:
        assert (PAGES / chart).is_file()
        with Image.open(tmp_path / chart) as drawn:
            assert min(drawn.size) > 150
            assert len(drawn.convert("RGB").getcolors(1 << 20) or ()) > 10


def test_a_changed_number_changes_the_page(tmp_path: Path) -> None:
    shutil.copytree(RESULTS, tmp_path / "results")
    file = next((tmp_path / "results").glob("engines-*.json"))
    report = json.loads(file.read_text(encoding="utf-8"))
    report["rows"][0]["ms"]["cpu"] = 123456.0
    file.write_text(json.dumps(report), encoding="utf-8")
    assert "| 123456 |" in write_report(tmp_path / "results", tmp_path).read_text(encoding="utf-8")


def test_a_file_that_is_no_report_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no engines-\*\.json"):
        read_results(tmp_path)
    (tmp_path / "engines-mine.json").write_text('{"rows": 3}', encoding="utf-8")
    with pytest.raises(InputError, match=r"engines-mine\.json is no report of `bench engines`: "):
        read_results(tmp_path)


def readme_row(start: str) -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in row.strip("|").split("|")]


@pytest.mark.parametrize(
    ("start", "metric"),
    [("DAB-Dice", "dab_dice"), ("Dice of the cell map", "cell_dice"), ("radial power", "radial_power")],
)
def test_the_scores_in_the_readme_are_those_of_the_checkpoints(start: str, metric: str) -> None:
    cells = readme_row(start)[2:]
    for checkpoint, told in zip(("demo", "demo-teacher"), cells, strict=True):
        file = ROOT / "checkpoints" / checkpoint / "metrics.json"
        stains = json.loads(file.read_text(encoding="utf-8"))["stains"]
        assert told == f"{stains['cd3'][metric]:.2f} / {stains['ck818'][metric]:.2f}", checkpoint


def test_the_speed_in_the_readme_is_that_of_the_reference_machine() -> None:
    engine, ratio = headline(read_results(RESULTS)["engines-amd-epyc-avx512-bf16.json"])
    (text,) = [cell for cell in readme_row("time of a tile") if "×" in cell]
    assert text == f"{engine}: × {ratio:.2f}"
