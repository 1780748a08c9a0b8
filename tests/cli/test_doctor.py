"""``staindiffuser doctor``: one line per capability, and an exit code for what does not work."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from staindiffuser.benchmarks.certificates import Authority
from staindiffuser.export.repository import build_repository
from tests.synthetic_graphs import write_graphs


def doctor(*arguments: object, without: tuple[str, ...] = ()) -> tuple[int, dict[str, dict[str, Any]], str]:
    """Exit code, findings by name, and standard error; ``without`` are packages that are not installed."""
    program = f"import sys; sys.modules.update(dict.fromkeys({without!r})); from staindiffuser.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", program, "doctor", "--json", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    findings = json.loads(result.stdout)["findings"] if result.stdout else []
    return result.returncode, {finding["name"]: finding for finding in findings}, result.stderr


@pytest.fixture
def ports() -> list[object]:
    """Options for two ports that are free."""
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        return ["--grpc-port", one.getsockname()[1], "--metrics-port", two.getsockname()[1]]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doctor")
    write_graphs(folder / "graphs", tile=32)
    return build_repository(folder / "graphs", folder / "models", max_batch=1, threads=1)


def test_a_machine_that_can_serve(repository: Path, ports: list[object]) -> None:
    code, findings, stderr = doctor(repository, *ports)
    assert code == 0, stderr
    for name in ("python", "shared memory", "target onnxruntime", "Triton", "demonstration model", "repository"):
        assert findings[name]["status"] == "ok", findings[name]
    assert "usable cores" in findings["processor"]["detail"]
    assert "enough for the repository" in findings["shared memory"]["detail"]
    assert "model synthetic" in findings["repository"]["detail"]
    assert findings[f"port {ports[1]}"]["detail"] == "free (--grpc-port)"
    code, findings, _ = doctor(repository, repository.parent / "nothing", *ports)
    assert code == 5, "of several repositories, each is verified"
    assert "nothing is not a model repository" in findings["repository"]["detail"]


def test_missing_packages_are_absent_and_not_fatal(ports: list[object]) -> None:
    code, findings, stderr = doctor(*ports, without=("pynvml", "psutil"))
    assert code == 0, stderr
    assert findings["GPU"] == {
        "name": "GPU",
        "status": "absent",
        "detail": "unknown: the package pynvml is not installed",
        "exit_code": 0,
    }
    assert findings["memory"]["detail"] == "unknown: the package psutil is not installed"


def test_a_port_in_use_is_a_warning_and_a_changed_repository_a_problem(repository: Path, ports: list[object]) -> None:
    (changed,) = repository.glob("*/*/philox.py")
    original = changed.read_bytes()
    changed.write_bytes(original + b"\n")
    try:
        with socket.socket() as held:
            held.bind(("127.0.0.1", int(str(ports[1]))))
            held.listen()
            code, findings, _ = doctor(repository, *ports)
            assert findings[f"port {ports[1]}"]["status"] == "warning"
            assert "is in use by process" in findings[f"port {ports[1]}"]["detail"]
    finally:
        changed.write_bytes(original)
    assert code == 5
    assert f"{changed.relative_to(repository)} differs from manifest.json" in findings["repository"]["detail"]


@pytest.mark.parametrize(
    ("days", "start", "status", "code", "words"),
    [
        (365, -1, "ok", 0, "CN=server: valid until 2"),
        (10.5, -1, "warning", 0, "CN=server: expires in 10 days, on 2"),
        (-1, -30, "problem", 4, "CN=server: expired on 2"),
        (60, 5, "problem", 4, "CN=server: not valid before 2"),
    ],
)
def test_certificates_dates(
    tmp_path: Path, ports: list[object], days: float, start: float, status: str, code: int, words: str
) -> None:
    path = Authority.create(tmp_path).issue("server", days=days, start=start)
    result, findings, _ = doctor(*ports, "--certificate", path)
    finding = findings[f"certificate {path}"]
    assert (result, finding["status"]) == (code, status)
    assert words in finding["detail"]


def test_what_is_no_certificate(tmp_path: Path, ports: list[object]) -> None:
    (tmp_path / "x.pem").write_text("hello", encoding="utf-8")
    code, findings, _ = doctor(*ports, "--certificate", tmp_path / "x.pem")
    assert code == 4
    assert "x.pem is not a readable PEM certificate" in findings[f"certificate {tmp_path / 'x.pem'}"]["detail"]


def test_text_has_one_line_per_finding(ports: list[object]) -> None:
    program = "from staindiffuser.cli import main; main()"
    command = [sys.executable, "-c", program, "doctor", *map(str, ports)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0
    statuses = {line.split()[0] for line in result.stdout.splitlines()}
    assert statuses <= {"ok", "warning", "absent"}
    assert "ok       python: " in result.stdout
