"""``bench slide SLIDE``: what is refused, and how a program's time and memory are taken."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from staindiffuser.benchmarks.whole_slide import run_measured
from staindiffuser.cli import app


@pytest.mark.parametrize(
    ("peer", "words"), [("Nobody=/bin/true", "--peer Nobody: there is LazySlide"), ("LazySlide", "NAME=PYTHON")]
)
def test_what_cannot_be_compared_is_refused(peer: str, words: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "slide", str(tmp_path / "slide.svs"), "--peer", peer])
    assert result.exit_code != 0
    assert words in str(result.exception)


def test_memory_is_that_of_all_processes_of_a_program(tmp_path: Path) -> None:
    hold = "import time; block = bytearray(64 << 20); time.sleep(0.8)"
    both = f"import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', {hold!r}]); {hold}; print('done')"
    seconds, peak, said, failed = run_measured([sys.executable, "-c", both], tmp_path)
    assert said == "done"
    assert failed == ""
    assert seconds > 0.8
    assert 128 < peak < 400


def test_a_program_that_fails_says_why(tmp_path: Path) -> None:
    _, _, _, failed = run_measured([sys.executable, "-c", "raise SystemExit('no tissue')"], tmp_path)
    assert failed == "no tissue"
