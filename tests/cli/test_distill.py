"""``staindiffuser distill`` as a user types it, on the debug preset."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from staindiffuser.cli import main

Command = Callable[..., tuple[int, str, str]]
SMALL = ("--steps", "2", "--batch", "2", "--crop", "32", "--workers", "0", "--gate-tiles", "1", "--no-progress")


@pytest.fixture
def staindiffuser(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command line in this process: arguments → (exit code, output, errors)."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["staindiffuser", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        printed = capsys.readouterr()
        return int(end.value.code or 0), printed.out, printed.err

    return run


def test_distil_shows_the_table_and_stores_the_verdict(
    staindiffuser: Command, tiny_checkpoint: Path, tiles_folder: Path, tmp_path: Path
) -> None:
    arguments = ["distill", tiny_checkpoint, "--data", tiles_folder, "--output", tmp_path, "--name", "few", *SMALL]
    code, out, err = staindiffuser(*arguments, "--search-tiles", "1", "--undistilled")
    assert code == 0, err
    metrics = json.loads((tmp_path / "checkpoint" / "metrics.json").read_text())
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    rows = [(row["role"], row["steps"]) for row in metrics["gate"]["rows"]]
    assert rows == [
        ("teacher", 18),
        *(("undistilled", k) for k in (1, 2, 4)),
        *(("student", k) for k in (1, 2, 4)),
    ]
    for role, steps in rows:
        assert f"{role}, k = {steps}" in out
    assert metrics["gate"]["verdict"] in out
    assert out.splitlines()[-1] == f"checkpoint: {tmp_path / 'checkpoint'}; look at {tmp_path / 'gate.jpg'}"
    assert config["name"] == "few"
    assert config["steps"] == metrics["gate"]["steps"]
    for row in metrics["gate"]["rows"][-3:]:
        assert row["sigmas"] == config["sigmas"][str(row["steps"])]
    assert config["provenance"]["search for σ"]["trials"] > 10

    # The same student judged again, on other tiles, without training
    again = tmp_path / "again"
    (tmp_path / "checkpoint" / "curves.png").write_bytes(b"an image")  # so short a run has drawn none
    options = ["--only-gate", "--no-search", "--student", tmp_path / "checkpoint", "--split", "test"]
    code, out, err = staindiffuser(
        "distill", tiny_checkpoint, "--data", tiles_folder, "--output", again, *options, "--gate-tiles", "1"
    )
    assert code == 0, err
    judged = json.loads((again / "checkpoint" / "metrics.json").read_text())
    assert judged["gate"]["split"] == "test"
    assert json.loads((again / "checkpoint" / "config.json").read_text())["sigmas"] == config["sigmas"]
    weights = "model.safetensors"
    for name in (weights, "curves.png"):
        assert (again / "checkpoint" / name).read_bytes() == (tmp_path / "checkpoint" / name).read_bytes()


def test_a_gate_that_nothing_passes_ends_with_0_and_says_so(
    staindiffuser: Command, tiny_checkpoint: Path, tiles_folder: Path, tmp_path: Path
) -> None:
    # random weights pass nothing
    code, out, _ = staindiffuser(
        "distill", tiny_checkpoint, "--data", tiles_folder, "--output", tmp_path, "--only-gate", "--no-search"
    )
    assert code == 0
    assert "\ngate not passed, " in out
    assert "Gate not passed" in (tmp_path / "checkpoint" / "MODEL_CARD.md").read_text()


def test_dry_run_checks_and_writes_nothing(
    staindiffuser: Command, tiny_checkpoint: Path, tiles_folder: Path, tmp_path: Path
) -> None:
    for more in ((), ("--only-gate",)):
        code, out, _ = staindiffuser(
            "distill", tiny_checkpoint, "--data", tiles_folder, "--output", tmp_path / "run", "--dry-run", *SMALL, *more
        )
        assert (code, out) == (0, f"{tiles_folder}: everything checked, nothing trained\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--crop", "128"], 4, "smaller than the crop of 128: use --crop"),
        (["--stages", "0"], 2, "stages is 0, must be at least 1"),
        (["--learning-rate", "0"], 2, "learning_rate is 0.0, must be positive"),
        (["--max-share", "2"], 2, "image_max_share is 2.0, must be a share between 0 and 1"),
        (["--student", "somewhere"], 2, "--student goes with --only-gate"),
    ],
)
def test_refusals(
    staindiffuser: Command,
    tiny_checkpoint: Path,
    tiles_folder: Path,
    tmp_path: Path,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    found, _, err = staindiffuser(
        "distill", tiny_checkpoint, "--data", tiles_folder, "--output", tmp_path / "run", "--dry-run", *arguments
    )
    assert found == code
    assert err.startswith("error: ")
    assert message in err
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_checkpoint_is_refused(staindiffuser: Command, tiles_folder: Path, tmp_path: Path) -> None:
    code, _, err = staindiffuser("distill", tmp_path, "--data", tiles_folder, "--output", tmp_path / "run")
    assert code == 4
    assert "is not a checkpoint folder" in err
