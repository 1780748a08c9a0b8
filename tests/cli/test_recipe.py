"""The whole recipe on the debug preset: train → distill → evaluate → export, as a user types it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from staindiffuser.cli import main


@pytest.fixture
def staindiffuser(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run the command line in this process; it must succeed."""

    def run(*arguments: str | Path) -> None:
        monkeypatch.setattr(sys, "argv", ["staindiffuser", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 0

    return run


@pytest.mark.slow  # each command has a test of its own; this is all of them in a row
@pytest.mark.timeout(600)
def test_debug_preset_from_tiles_to_a_verified_repository(
    staindiffuser: Callable[..., None], tiles_folder: Path, tmp_path: Path
) -> None:
    teacher, student = tmp_path / "teacher" / "checkpoint", tmp_path / "student" / "checkpoint"
    tiles, quiet = ["--data", tiles_folder], "--no-progress"
    staindiffuser("train", *tiles, "--output", teacher.parent, "--preset", "debug", "--steps", "24", quiet)
    few = ["--search-tiles", "1", "--gate-tiles", "2"]
    staindiffuser("distill", teacher, *tiles, "--output", student.parent, *few, quiet)
    staindiffuser("evaluate", student, *tiles, "--quick", "--limit", "2", "--json", tmp_path / "scores.json", quiet)
    staindiffuser("export", "graphs", student, "--tile", "64", "--output", tmp_path / "graphs")
    staindiffuser(
        # So small a model does not pass its gate.
        *("export", "build", tmp_path / "graphs", "--allow-ungated", "--target", "onnxruntime"),
        *("--output", tmp_path / "repository"),
    )
    staindiffuser("export", "verify", tmp_path / "repository")
    config, manifest = (
        json.loads(path.read_text()) for path in (student / "config.json", tmp_path / "repository" / "manifest.json")
    )
    assert "distillation" in config["provenance"]
    assert manifest["steps"] == config["steps"]  # the gate's word reaches the engines
    assert list(manifest["sigmas"]) == config["sigmas"][str(config["steps"])]
    assert json.loads((tmp_path / "scores.json").read_text())
