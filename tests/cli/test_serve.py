"""``staindiffuser serve``: says when it is ready and what it serves, and ends cleanly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tritonclient.grpc as triton

from staindiffuser.export.repository import build_repository
from tests.synthetic_graphs import write_graphs

PROGRAM = (
    "import sys; sys.modules.update({name: None for name in ('torch', 'safetensors')});"
    "from staindiffuser.cli import main; main()"
)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    write_graphs(folder / "graphs", tile=32)
    return build_repository(folder / "graphs", folder / "repository", max_batch=1, threads=1)


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, "serve", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_ready_line_and_clean_end(repository: Path, number: int, code: int) -> None:
    process = start(repository, "--grpc-port", 0, "--metrics-port", 0, "--json")
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate()[1]
    ready = json.loads(line)
    assert ready["ready"] is True
    assert ready["stains"] == ["cd3", "ck818"]
    assert ready["max_batch"] == 1
    with triton.InferenceServerClient(ready["grpc"]) as client:
        assert client.is_model_ready("staindiffuser")
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == code
    assert "Traceback" not in stderr
    with pytest.raises(ProcessLookupError):
        os.killpg(ready["pid"], 0)


def test_several_repositories(repository: Path, tmp_path: Path) -> None:
    graphs = write_graphs(tmp_path / "graphs", tile=32, seed=1)
    other = build_repository(tmp_path / "graphs", tmp_path / "other", max_batch=1, threads=1)
    process = start(repository, other, "--grpc-port", 0, "--metrics-port", 0, "--json", "--audit", tmp_path / "audit")
    assert process.stdout is not None
    ready = json.loads(process.stdout.readline())
    assert [model["name"] for model in ready["models"]] == ["synthetic", "synthetic"]
    assert ready["models"][1]["version"] == graphs.model_version
    assert [model["ensemble"] for model in ready["models"]] == [
        "staindiffuser",
        f"staindiffuser-synthetic-{graphs.model_version[:8]}",
    ]
    with triton.InferenceServerClient(ready["grpc"]) as client:
        assert all(client.is_model_ready(model["ensemble"]) for model in ready["models"])
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 0, stderr
    events = [json.loads(line) for line in (tmp_path / "audit").read_text(encoding="utf-8").splitlines()]
    assert [event["event"] for event in events] == ["start", "ready", "drained", "stop"]
    assert events[0]["repositories"] == [str(repository), str(other)]
    assert events[1]["models"] == ready["models"]


def test_lost_server_and_taken_port(repository: Path) -> None:
    first = start(repository, "--grpc-port", 0, "--metrics-port", 0, "--restarts", 0, "--json")
    assert first.stdout is not None
    ready = json.loads(first.stdout.readline())
    port = ready["grpc"].rpartition(":")[2]
    second = start(repository, "--grpc-port", port)
    stdout, stderr = second.communicate(timeout=30)
    assert second.returncode == 2
    assert stdout == ""
    assert f"error: port {port} is in use by another StainDiffuser server" in stderr
    os.kill(ready["pid"], signal.SIGKILL)
    _, stderr = first.communicate(timeout=30)
    assert first.returncode == 3
    assert "error: Triton was ended by SIGKILL: out of memory?" in stderr
    assert "Traceback" not in stderr
