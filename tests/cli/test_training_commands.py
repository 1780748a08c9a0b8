"""Tiles → train → evaluate → graphs → repository, as a user types it, on the debug preset."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def staindiffuser(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command line in its own process."""
    program = "from staindiffuser.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, timeout=240, check=False
    )


@pytest.fixture(scope="module")
def run_folder(tiles_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a few steps."""
    folder = tmp_path_factory.mktemp("run")
    options = ["--preset", "debug", "--steps", "4", "--crop", "32", "--no-progress", "--trained-on", "coloured blobs"]
    result = staindiffuser("train", "--data", tiles_folder, "--output", folder, *options)
    assert result.returncode == 0, result.stderr
    assert "checkpoint" in result.stdout
    return folder


def test_checkpoint_says_what_it_is(run_folder: Path) -> None:
    config = json.loads((run_folder / "checkpoint" / "config.json").read_text())
    assert "coloured blobs" in config["notice"]
    assert "no medical meaning" in config["notice"]
    assert config["provenance"]["recipe"]["steps"] == 4
    assert 0 <= config["provenance"]["speed"]["data_wait_share"] <= 1


@pytest.mark.parametrize("steps", [1, 18])
def test_evaluate_writes_every_metric(run_folder: Path, tiles_folder: Path, tmp_path: Path, steps: int) -> None:
    scores, report = tmp_path / "scores.json", tmp_path / "report"
    outputs: list[str | Path] = ["--json", scores, "--report", report]
    result = staindiffuser(
        "evaluate", run_folder / "checkpoint", "--data", tiles_folder, "--steps", str(steps), "--limit", "2", *outputs
    )
    assert result.returncode == 0, result.stderr
    data = json.loads(scores.read_text())
    assert data["steps"] == steps
    assert data["tiles"] == 2
    for stain in ("cd3", "ck818"):
        low, high = data["intervals_95"][stain]["psnr"]
        assert low <= data["stains"][stain]["psnr"] <= high
        for pick in ("best", "median", "worst"):
            assert f"{stain}-{pick}.png" in (report / "report.md").read_text()
            assert (report / f"{stain}-{pick}.png").is_file()
        assert set(data["stains"][stain]) >= {"dab_dice", "od_correlation", "positive_area_error", "cell_dice", "ssim"}


def test_evaluate_refuses_a_sampler_that_is_not_there(run_folder: Path, tiles_folder: Path) -> None:
    result = staindiffuser("evaluate", run_folder / "checkpoint", "--data", tiles_folder, "--steps", "3")
    assert result.returncode == 2
    assert result.stderr == "error: --steps 3: this checkpoint has samplers of 1, 2, 4, 18 steps\n"


def test_graphs_and_repository_follow(run_folder: Path, tmp_path: Path) -> None:
    checkpoint, graphs, repository = run_folder / "checkpoint", tmp_path / "graphs", tmp_path / "repository"
    result = staindiffuser("export", "graphs", checkpoint, "--steps", "1", "--tile", "64", "--output", graphs)
    assert result.returncode == 0, result.stderr
    result = staindiffuser("export", "build", graphs, "--target", "onnxruntime", "--output", repository)
    assert result.returncode == 0, result.stderr
    assert staindiffuser("export", "verify", repository).returncode == 0
