"""The shell completes commands and options."""

import os
import subprocess
import sys

import pytest

PROGRAM = "import sys; from staindiffuser.cli import main; sys.argv = ['staindiffuser']; main()"


@pytest.mark.parametrize(
    ("words", "expected"), [("staindiffuser sta", "stain"), ("staindiffuser stain --par", "--parquet")]
)
def test_bash(words: str, expected: str) -> None:
    asked = {"_STAINDIFFUSER_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**os.environ, **asked}, capture_output=True, text=True, check=False
    )
    assert result.stdout.split() == [expected], result.stderr
