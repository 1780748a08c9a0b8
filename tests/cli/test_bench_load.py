"""``staindiffuser bench load``: two real servers, the same bytes, and latencies that count the queue."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from staindiffuser.benchmarks.load import bench_load, open_loop
from staindiffuser.benchmarks.report_servers import load_section
from staindiffuser.benchmarks.rivals import RIVALS
from staindiffuser.benchmarks.rivals.pipeline import decode, encode
from staindiffuser.cli import app
from staindiffuser.export.repository import build_repository
from tests.synthetic_graphs import write_graphs


@pytest.mark.parametrize(
    ("rivals", "idle"), [(False, False), (False, True), pytest.param(True, False, marks=pytest.mark.slow)]
)
def test_report(rivals: bool, idle: bool, tmp_path: Path) -> None:
    write_graphs(tmp_path / "graphs", tile=32)
    repository = build_repository(tmp_path / "graphs", tmp_path / "repository", max_batch=2, threads=1)
    file = tmp_path / "load.json"
    options = ["--batch", "2", "--clients", "1,3", "--shares", "0.5", "--seconds", "0.5", "--json", str(file)]
    here = {rival.name for rival in RIVALS if not rival.absent}
    names = {"Triton", *here} if rivals else {"Triton"}
    result = CliRunner().invoke(
        app, ["bench", "load", str(repository), *options, *["--no-rival"][rivals:], *["--idle"] * idle]
    )
    assert result.exit_code == 0, result.output
    report = json.loads(file.read_text(encoding="utf-8"))
    assert report["model_name"] == ("idle" if idle else "synthetic")
    assert report["same_bytes"] is True
    assert set(report["absent"]) == ({rival.name for rival in RIVALS} - here if rivals else set())
    assert set(report["closed"]) == set(report["open"]) == names
    for name, rates in report["closed"].items():
        assert len(rates) == 2
        assert all(rate > 0 for rate in rates)
        (loop,) = report["open"][name]
        assert loop["offered"] == pytest.approx(0.5 * rates[-1])
        assert loop["failed"] < loop["requests"]  # none on free cores; beside other tests the queue may refuse some
        assert 0 < loop["p50"] <= loop["p95"] <= loop["p99"]
    assert report["triton_ms"]["staindiffuser"]["compute"] > 0
    assert all(f"Triton / {name}" in result.output for name in names - {"Triton"})
    assert "p99" in result.output


def test_in_turns(tmp_path: Path) -> None:
    """Rounds of the closed loop, their median, and nothing else changed."""
    write_graphs(tmp_path / "graphs", tile=32)
    repository = build_repository(tmp_path / "graphs", tmp_path / "repository", max_batch=1, threads=1)
    report = bench_load(
        repository, clients=(2,), shares=(0.5,), seconds=0.2, threads=1, rivals=["PyTriton @batch"], rounds=3
    )
    assert list(report.turns) == list(report.closed) == ["Triton", "PyTriton @batch"]
    assert report.same_bytes
    for name, rates in report.turns.items():
        assert len(rates) == 3
        assert report.closed[name] == (sorted(rates)[1],)
    ratios = [own / other for own, other in zip(*report.turns.values(), strict=True)]
    assert report.ratio("PyTriton @batch").median == sorted(ratios)[1]
    assert any(f"({min(ratios):.2f} to {max(ratios):.2f})" in line for line in load_section("load.json", report))


def test_a_request_has_waited_since_it_was_due() -> None:
    """A server that takes one request at a time and is offered twice what it can do: latencies grow to the end."""
    one = threading.Lock()

    def call(inputs: dict[str, object]) -> dict[str, object]:
        with one:
            time.sleep(0.02)
        return {}

    loop = open_loop(call, [{}], share=2.0, saturated=50.0, seconds=1.0)  # type: ignore[arg-type]
    assert loop.requests == 100
    assert loop.answered < 60
    assert loop.p50 is not None
    assert loop.p99 is not None
    assert loop.p99 > 600  # of two seconds' work, one is over when the last request is due
    assert loop.p50 > 200


def test_refusals_are_counted() -> None:
    def call(inputs: dict[str, object]) -> dict[str, object]:
        raise RuntimeError("full")

    loop = open_loop(call, [{}], share=1.0, saturated=100.0, seconds=0.1)  # type: ignore[arg-type]
    assert loop.failed == loop.requests == 10
    assert loop.p50 is None


def test_a_body_is_read_as_it_was_written() -> None:
    rng = np.random.default_rng(0)
    inputs: dict[str, np.ndarray] = {
        "HE": rng.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8),
        "ORIGIN": rng.integers(-5, 5, (3, 2)),
        "SEED": rng.integers(0, 2**40, (3, 1)),
    }
    found = decode(encode(inputs), 16)
    assert all(np.array_equal(found[name], inputs[name]) for name in inputs)
