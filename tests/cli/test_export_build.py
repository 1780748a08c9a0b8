"""``staindiffuser export build`` and ``verify``: without torch, one line for every failure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from staindiffuser.export.manifest import Manifest
from tests.synthetic_graphs import write_graphs

BLOCKED = "torch safetensors torchmetrics"


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    write_graphs(folder, tile=32)
    return folder


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in a process in which torch and its like cannot be imported."""
    program = (
        f"import sys; sys.modules.update({{name: None for name in {BLOCKED.split()!r}}});"
        "from staindiffuser.cli import main; main()"
    )
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def refused(result: subprocess.CompletedProcess[str], code: int, words: str) -> None:
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    assert words in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in result.stderr


def test_build_twice_then_verify(graphs: Path, tmp_path: Path) -> None:
    output = tmp_path / "repository"
    first = run("export", "build", graphs, "--target", "onnxruntime", "--output", output, "--max-batch", 2)
    assert first.returncode == 0, first.stderr
    assert "5 engines built, 0 kept" in first.stdout
    second = run("export", "build", graphs, "--output", output, "--max-batch", 2, "--json")
    assert second.returncode == 0, second.stderr
    report = json.loads(second.stdout)
    assert report["up_to_date"] is True
    assert report["built"] == []
    assert report["seconds"] < 2
    verified = run("export", "verify", output, "--json")
    assert verified.returncode == 0, verified.stderr
    assert json.loads(verified.stdout)["model_version"] == report["model_version"]
    assert "engines" in run("export", "verify", output).stdout

    engine = output / Manifest.load(output).engines["cells_cd3"].file
    engine.write_bytes(engine.read_bytes()[:-1])
    refused(run("export", "verify", output), 5, f"{engine} differs from manifest.json (sha256)")
    refused(run("serve", output, "--grpc-port", 0, "--metrics-port", 0), 5, f"{engine} differs")


def test_failures_are_one_line_with_their_code(graphs: Path, tmp_path: Path) -> None:
    output = tmp_path / "repository"
    refused(run("export", "build", tmp_path / "nowhere", "--output", output), 4, "graphs.json is missing")
    refused(run("export", "build", graphs, "--output", output, "--target", "abacus"), 2, "unknown target 'abacus'")
    refused(run("export", "build", graphs, "--output", output, "--max-batch", 0), 2, "max batch 0: must be between")
    refused(run("export", "build", graphs, "--output", "/proc/repository"), 2, "cannot be written")
    refused(run("export", "verify", tmp_path), 5, "is not a model repository")
    assert not output.exists()
    assert [path.name for path in tmp_path.iterdir()] == []
