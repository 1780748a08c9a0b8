"""``staindiffuser evaluate`` as a user types it, on a checkpoint of random weights."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from staindiffuser.cli import main


@dataclass(frozen=True)
class Ended:
    returncode: int
    stdout: str
    stderr: str


Evaluate = Callable[..., Ended]


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Evaluate:
    """Run the command in this process: torch is loaded once."""

    def run(*arguments: str | Path) -> Ended:
        monkeypatch.setattr(sys, "argv", ["staindiffuser", "evaluate", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        stdout, stderr = capsys.readouterr()
        code = end.value.code
        return Ended(code if isinstance(code, int) else 0, stdout, stderr)

    return run


def test_several_numbers_of_steps_in_one_run(
    evaluate: Evaluate, tiny_checkpoint: Path, tiles_folder: Path, tmp_path: Path
) -> None:
    scores, report = tmp_path / "scores.json", tmp_path / "report"
    outputs: list[str | Path] = ["--json", scores, "--report", report]
    result = evaluate(tiny_checkpoint, "--data", tiles_folder, "--steps", "1,18", *outputs)
    assert result.returncode == 0, result.stderr
    data = json.loads(scores.read_text())
    assert data["tiles"] == 4
    assert data["networks"]["encoder"].startswith("tiny, weights ")
    assert [r["steps"] for r in data["results"]] == [1, 18]
    for stain in ("cd3", "ck818"):
        assert f"tiny, {stain}, 4 test tiles" in result.stdout
        for pick in ("best", "median", "worst"):
            assert f"{stain}-{pick}.png" in (report / "report.md").read_text()
            assert (report / f"{stain}-{pick}.png").is_file()
        for figures in data["results"]:
            metrics = figures["stains"][stain]
            assert set(metrics) >= {"dab_dice", "iou", "hausdorff95_um", "positive_cell_f1", "cell_f1", "kid_encoder"}
            low, high = figures["intervals_95"][stain]["psnr"]
            assert low <= metrics["psnr"] <= high


def test_quick_leaves_out_what_takes_long(
    evaluate: Evaluate, tiny_checkpoint: Path, tiles_folder: Path, tmp_path: Path
) -> None:
    result = evaluate(tiny_checkpoint, "--data", tiles_folder, "--quick", "--limit", "2", "--json", tmp_path / "s.json")
    assert result.returncode == 0, result.stderr
    (figures,) = json.loads((tmp_path / "s.json").read_text())["results"]
    assert figures["steps"] == 2  # what the checkpoint is served with
    assert set(figures["stains"]["cd3"]) == {
        "dab_dice",
        "iou",
        "od_correlation",
        "positive_area_error",
        "cell_dice",
        "radial_power",
        "ssim",
        "psnr",
    }


def test_thresholds_are_chosen_and_scored_by(
    evaluate: Evaluate, tiny_checkpoint: Path, tiles_folder: Path, tmp_path: Path
) -> None:
    """One slide with few cells chooses none; what stands in the checkpoint is what evaluation scores by."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    result = evaluate(folder, "--data", tiles_folder, "--thresholds", "--json", tmp_path / "t.json")
    assert result.returncode == 0, result.stderr
    assert "cd3: threshold 0.5; F1 – at one half, – at 0.5; best – at 0.5 (" in result.stdout
    assert json.loads((tmp_path / "t.json").read_text())["cd3"]["threshold"] == 0.5
    assert "## Thresholds of the cell maps" in (folder / "MODEL_CARD.md").read_text()
    config = json.loads((folder / "config.json").read_text())
    assert config["thresholds"] == {}
    (folder / "config.json").write_text(json.dumps(config | {"thresholds": {"cd3": 0.3}}))
    assert evaluate(folder, "--data", tiles_folder, "--json", tmp_path / "s.json").returncode == 0
    (figures,) = json.loads((tmp_path / "s.json").read_text())["results"]
    assert [figures["cells"][stain]["threshold"] for stain in ("cd3", "ck818")] == [0.3, 0.5]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--calibrate", "--thresholds"], 2, "--calibrate and --thresholds: calibrate first, then choose"),
        (["--steps", "3"], 2, "--steps 3: this checkpoint has samplers of 1, 2, 4, 18 steps"),
        (["--steps", "1,two"], 2, "--steps 1,two: give a number of steps, or several with commas, such as 1,2,4,18"),
        (["--quick", "--kid-encoder", "x"], 2, "--quick leaves out KID, and --kid-encoder asks for it: give one"),
        (["--kid-encoder", "missing"], 4, "missing is not a checkpoint folder"),
    ],
)
def test_refusals(
    evaluate: Evaluate, options: list[str], code: int, message: str, tiny_checkpoint: Path, tiles_folder: Path
) -> None:
    result = evaluate(tiny_checkpoint, "--data", tiles_folder, *options)
    assert result.returncode == code
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.skipif(
    importlib.util.find_spec("torch_fidelity") is not None, reason="torch-fidelity is installed: nothing is missing"
)
def test_published_networks_that_are_not_installed(
    evaluate: Evaluate, tiny_checkpoint: Path, tiles_folder: Path
) -> None:
    result = evaluate(tiny_checkpoint, "--data", tiles_folder, "--networks")
    assert result.returncode == 6
    assert result.stderr == "error: torch-fidelity is not installed: pip install 'staindiffuser[metrics]'\n"
