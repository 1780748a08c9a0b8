"""``bench scaling``: the simulation agrees with what can be said without one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from staindiffuser.benchmarks.scaling import Workload, simulate
from staindiffuser.cli import app

WORKLOAD = Workload(
    server_ms=500, client_ms=20, client_cores=2, request_bytes=800_000, response_bytes=2_000_000, storage_bytes=300_000
)


@pytest.mark.parametrize("shared_client", [True, False])
def test_few_servers_are_the_limit_themselves(shared_client: bool) -> None:
    for scale in simulate(WORKLOAD, shared_client=shared_client, counts=(1, 4)):
        assert scale.bottleneck == "the servers"
        assert scale.tiles_per_second == pytest.approx(2 * scale.servers, rel=0.01)


def test_many_servers_wait_for_one_client() -> None:
    (scale,) = simulate(WORKLOAD, shared_client=True, counts=(64,))
    assert scale.bottleneck == "the client's processor"
    assert scale.tiles_per_second == pytest.approx(2 / 0.020, rel=0.02)
    (scale,) = simulate(WORKLOAD, shared_client=False, counts=(64,))
    assert scale.tiles_per_second == pytest.approx(128, rel=0.01)


def test_slow_links_are_named() -> None:
    slow = dataclasses.replace(WORKLOAD, network_gbit=0.1)
    (scale,) = simulate(slow, shared_client=True, counts=(16,))
    assert scale.bottleneck == "the client's network, in"
    assert scale.tiles_per_second == pytest.approx(0.1e9 / 8 / 2_000_000, rel=0.05)
    (scale,) = simulate(slow, shared_client=False, counts=(64,))
    assert scale.bottleneck == "the storage's network"
    assert scale.tiles_per_second == pytest.approx(0.1e9 / 8 / 300_000, rel=0.05)


def test_the_command_writes_lines_and_a_chart(tmp_path: Path) -> None:
    arguments = ["bench", "scaling", "--server-rate", "2", "--client-ms", "20", "--chart", str(tmp_path / "chart.png")]
    result = CliRunner().invoke(app, [*arguments, "--json", str(tmp_path / "report.json")])
    assert result.exit_code == 0, result.output
    assert "  64 servers:    " in result.stdout
    assert "limited by the client's processor" in result.stdout
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((tmp_path / "report.json").read_text())["one client, one slide"]) == 7
