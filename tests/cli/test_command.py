"""The command as a whole: quick, without torch, every verb with help and an example, failures in one line."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

HEAVY = "torch onnxruntime onnx tritonclient pytriton openslide scipy skimage"
VERBS = [
    ["stain"],
    ["serve"],
    ["bench", "serving"],
    ["train"],
    ["evaluate"],
    ["simulate", "tiles"],
    ["simulate", "slide"],
    ["export", "graphs"],
    ["export", "build"],
    ["export", "verify"],
]


def run(*arguments: str, block: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command line in its own process, with the modules named in ``block`` impossible to import."""
    program = (
        f"import sys; sys.modules.update({{name: None for name in {block.split()!r}}});"
        "from staindiffuser.cli import main; main()"
    )
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_needs_nothing_heavy_and_shows_an_example(verb: list[str]) -> None:
    result = run(*verb, "--help", block=HEAVY)
    assert result.returncode == 0, result.stderr
    assert "staindiffuser " + " ".join(verb) in " ".join(result.stdout.split())


@pytest.mark.timing
def test_help_answers_within_a_second() -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        run("stain", "--help")
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1.0, seconds


def test_version() -> None:
    assert run("--version").stdout.startswith("staindiffuser 0.")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["stain"], 2, "Missing argument"),
        (["dye"], 2, "No such command"),
        (["evaluate", "missing", "--data", "missing"], 4, "is not a checkpoint folder"),
        (["train", "--data", "missing", "--output", "x"], 4, "is not a folder of paired tiles"),
        (["train", "--data", "missing", "--output", "x", "--crop", "100"], 2, "crop is 100"),
        (["export", "build", "missing", "--output", "x"], 4, "graphs.json is missing"),
        (["serve", "missing"], 5, "is not a model repository"),
    ],
)
def test_failures_end_with_their_exit_code_and_one_line(
    tmp_path: Path, arguments: list[str], code: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.returncode == code, result.stderr
    assert words in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    if code != 2 or "crop" in words:
        assert len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_missing_package_says_how_to_install_it() -> None:
    result = run("train", "--data", "x", "--output", "y", block="torch")
    assert result.returncode == 6
    assert result.stderr.strip() == "error: torch is not installed: pip install 'staindiffuser[train]'"
