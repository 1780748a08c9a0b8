"""``staindiffuser bench serving``: a report that holds the ratio, its spread and what was measured."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from staindiffuser.benchmarks.measuring import Spread
from staindiffuser.export.repository import build_repository
from tests.synthetic_graphs import write_graphs


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    program = "import sys; sys.modules['torch'] = None; from staindiffuser.cli import main; main()"
    command = [sys.executable, "-c", program, "bench", "serving", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_report(tmp_path: Path) -> None:
    write_graphs(tmp_path / "graphs", tile=64)
    repository = build_repository(
        tmp_path / "graphs", tmp_path / "repository", flavour="python", max_batch=2, threads=1
    )
    file = tmp_path / "report.json"
    options: list[object] = ["--batch", 2, "--rounds", 2, "--requests", 2, "--two-clients", "--overhead", 3]
    proxy = shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin") is not None
    result = run(repository, *options, *["--proxy"] * proxy, "--json", file)
    assert result.returncode == 0, result.stderr
    report = json.loads(file.read_text())
    assert report["same_bytes"] is True
    assert report["batch"] == 2
    assert len(report["outputs"]) == 4
    ratio = report["ratios"]["Triton / direct"]
    assert 0 < ratio["smallest"] <= ratio["median"] <= ratio["largest"]
    assert set(report["direct_ms_per_tile"]) == set(report["triton_ms_per_tile"])
    assert set(report["ratios"]) == {"Triton / direct", *["proxy / Triton"] * proxy}
    assert report["cpu_ratios"].keys() == report["ratios"].keys()
    assert all(spread["smallest"] > 0 for spread in report["cpu_ms_per_tile"].values())
    assert report["two_clients"]["clock"]["median"] > 0
    assert set(report["overhead_ms"]) == {"python", "single"}
    assert "Triton / direct:" in result.stdout
    assert "at most 8 is asked" in result.stdout
    refused = run(repository, "--batch", 3)
    assert refused.returncode == 2
    assert "--batch 3 is more than the 2" in refused.stderr


def test_spread_of_equal_values_has_no_width() -> None:
    spread = Spread.of([2.0, 2.0, 2.0])
    assert (spread.low, spread.median, spread.high) == (2.0, 2.0, 2.0)


def test_a_median_that_the_rounds_do_not_agree_on_is_uncertain() -> None:
    assert Spread.of([0.5, 0.51, 0.5, 0.52, 0.51]).certain
    assert not Spread.of([0.5, 0.6, 0.4, 0.5, 0.62]).certain


def test_spread_encloses_the_median() -> None:
    spread = Spread.of([1.0, 5.0, 2.0, 4.0, 3.0])
    assert spread.median == pytest.approx(3)
    assert spread.smallest == 1
    assert spread.smallest <= spread.low <= spread.median <= spread.high <= spread.largest == 5
