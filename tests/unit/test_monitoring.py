"""The alert rules and the dashboard in ``deploy/monitoring``: they load, and the rules fire when they should."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from staindiffuser.triton_models.shared.meters import COUNTERS, GAUGES

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "monitoring"
ALERTS, DASHBOARD = FOLDER / "alerts.yml", FOLDER / "dashboard.json"
METRIC = re.compile(r"\b(?:nv|staindiffuser)_[a-z_]+\b")
TRITON = {
    "nv_cpu_memory_total_bytes", "nv_cpu_memory_used_bytes", "nv_cpu_utilization",
    "nv_inference_compute_infer_duration_us", "nv_inference_pending_request_count", "nv_inference_queue_duration_us",
    "nv_inference_request_duration_us", "nv_inference_request_failure", "nv_inference_request_success",
}  # fmt: skip
"""What the dashboard and the rules may use of Triton's; tests/integration/test_scheduling.py asks a server for them."""


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    return list(json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"])


def promtool(*arguments: object) -> subprocess.CompletedProcess[str]:
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("no promtool here: install the package prometheus")
    return subprocess.run([tool, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_only_metrics_that_exist_are_used() -> None:
    expressions = [rule["expr"] for rule in rules()]
    expressions += [target["expr"] for panel in panels() for target in panel["targets"]]
    used = {name for expression in expressions for name in METRIC.findall(expression)}
    ours = {*COUNTERS, *GAUGES}
    assert used <= TRITON | ours
    assert used >= ours


def test_panels_have_places_of_their_own() -> None:
    seen: set[tuple[int, int]] = set()
    for panel in panels():
        place = panel["gridPos"]
        columns, rows = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        cells = {(x, y) for x in columns for y in rows}
        assert not cells & seen, panel["title"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        seen |= cells
        assert panel["targets"], panel["title"]
        assert all(target["expr"] and target["legendFormat"] for target in panel["targets"]), panel["title"]
    assert len({panel["id"] for panel in panels()}) == len(panels())


def test_rules_say_what_to_do() -> None:
    for rule in rules():
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert {"summary", "description"} <= rule["annotations"].keys()


def test_prometheus_loads_the_rules() -> None:
    outcome = promtool("check", "rules", ALERTS)
    assert outcome.returncode == 0, outcome.stderr


def test_prometheus_parses_the_panels(tmp_path: Path) -> None:
    recorded = [
        {"record": f"panel:{panel['id']}:{target['refId'].lower()}", "expr": target["expr"].replace("$instance", ".*")}
        for panel in panels()
        for target in panel["targets"]
    ]
    file = tmp_path / "panels.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": recorded}]}), encoding="utf-8")
    outcome = promtool("check", "rules", file)
    assert outcome.returncode == 0, outcome.stderr


JOB = 'job="staindiffuser", instance="a"'
ENSEMBLE = f'{JOB}, model="staindiffuser"'


@pytest.mark.parametrize(
    ("alert", "series", "minutes"),
    [
        ("StainDiffuserDown", {f"up{{{JOB}}}": "0x60"}, 10),
        (
            "StainDiffuserStuck",
            {
                f"nv_inference_pending_request_count{{{ENSEMBLE}}}": "3x60",
                f"nv_inference_request_success{{{ENSEMBLE}}}": "100x60",
            },
            20,
        ),
        (
            "StainDiffuserStuck",
            {
                f"staindiffuser_waiting_requests{{{JOB}}}": "3x60",
                f'staindiffuser_requests_total{{{JOB}, status="OK"}}': "100x60",
                f"nv_inference_request_success{{{ENSEMBLE}}}": "0+100x60",
            },
            20,
        ),
        (
            "StainDiffuserStuck",
            {
                f"staindiffuser_waiting_requests{{{JOB}}}": "0x60",
                f'staindiffuser_refused_total{{{JOB}, reason="late"}}': "0+3x60",
            },
            20,
        ),
        (
            "StainDiffuserFailures",
            {
                f'staindiffuser_requests_total{{{JOB}, status="INTERNAL"}}': "0+2x60",
                f'staindiffuser_requests_total{{{JOB}, status="OK"}}': "0+100x60",
            },
            20,
        ),
        (
            "StainDiffuserFailures",
            {
                f'nv_inference_request_failure{{{ENSEMBLE}, reason="BACKEND"}}': "0+2x60",
                f"nv_inference_request_success{{{ENSEMBLE}}}": "0+100x60",
            },
            20,
        ),
        ("StainDiffuserOverloaded", {f'nv_inference_request_failure{{{ENSEMBLE}, reason="REJECTED"}}': "0+1x60"}, 40),
        ("StainDiffuserOverloaded", {f'nv_inference_request_failure{{{ENSEMBLE}, reason="OTHER"}}': "0+1x60"}, 40),
        ("StainDiffuserOverloaded", {f'staindiffuser_refused_total{{{JOB}, reason="full"}}': "0+1x60"}, 40),
        (
            "StainDiffuserSlowQueue",
            {
                f"staindiffuser_queue_seconds_total{{{JOB}}}": "0+1200x60",
                f'staindiffuser_requests_total{{{JOB}, status="OK"}}': "0+100x60",
            },
            30,
        ),
        (
            "StainDiffuserSlowQueue",
            {
                f"nv_inference_queue_duration_us{{{ENSEMBLE}}}": "0+1200000000x60",
                f"nv_inference_request_success{{{ENSEMBLE}}}": "0+100x60",
            },
            30,
        ),
        ("StainDiffuserRestarts", {f"nv_inference_request_success{{{ENSEMBLE}}}": "5 6 0 3 0 2 0 4x60"}, 20),
        (
            "StainDiffuserUnlikeTissue",
            {
                f'staindiffuser_flagged_tiles_total{{{JOB}, flag="unlike", model_version="1"}}': "0+30x120",
                f'staindiffuser_tiles_total{{{JOB}, output="QUALITY", model_version="1"}}': "0+100x120",
            },
            110,
        ),
    ],
)
def test_a_rule_fires_and_is_quiet(tmp_path: Path, alert: str, series: dict[str, str], minutes: int) -> None:
    """Prometheus' own test of rules: with these series it fires; with a quiet server's it does not."""
    assert {rule["alert"] for rule in rules()} >= {alert}
    quiet = {
        f"up{{{JOB}}}": "1x200",
        f"nv_inference_pending_request_count{{{ENSEMBLE}}}": "1x200",
        f"nv_inference_request_success{{{ENSEMBLE}}}": "0+100x200",
        f'nv_inference_request_failure{{{ENSEMBLE}, reason="REJECTED"}}': "0x200",
        f'nv_inference_request_failure{{{ENSEMBLE}, reason="BACKEND"}}': "0x200",
        f"nv_inference_queue_duration_us{{{ENSEMBLE}}}": "0+1000x200",
        f"staindiffuser_waiting_requests{{{JOB}}}": "1x200",
        f"staindiffuser_queue_seconds_total{{{JOB}}}": "0+10x200",
        f'staindiffuser_requests_total{{{JOB}, status="OK"}}': "0+100x200",
        f'staindiffuser_requests_total{{{JOB}, status="CANCELLED"}}': "0+10x200",
        f'staindiffuser_refused_total{{{JOB}, reason="stopping"}}': "0+1x200",
        f'staindiffuser_flagged_tiles_total{{{JOB}, flag="unlike", model_version="1"}}': "0+1x200",
        f'staindiffuser_tiles_total{{{JOB}, output="QUALITY", model_version="1"}}': "0+100x200",
    }
    severity = next(rule["labels"]["severity"] for rule in rules() if rule["alert"] == alert)
    labels = {"severity": severity, "instance": "a"}
    if alert in ("StainDiffuserDown", "StainDiffuserRestarts"):
        labels["job"] = "staindiffuser"
    if alert in ("StainDiffuserRestarts", "StainDiffuserSlowQueue"):
        labels["model"] = "staindiffuser"
    if alert == "StainDiffuserUnlikeTissue":
        labels["flag"] = "unlike"

    def case(values: dict[str, str], expected: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "interval": "1m",
            "input_series": [{"series": name, "values": value} for name, value in values.items()],
            "alert_rule_test": [{"eval_time": f"{minutes}m", "alertname": alert, "exp_alerts": expected}],
        }

    def run(values: dict[str, str], expected: list[dict[str, Any]]) -> subprocess.CompletedProcess[str]:
        file = tmp_path / "test.yml"
        tests = {"rule_files": [str(ALERTS)], "tests": [case(values, expected)]}
        file.write_text(yaml.safe_dump(tests), encoding="utf-8")
        return promtool("test", "rules", file)

    silent = run(quiet, [])
    assert silent.returncode == 0, silent.stdout + silent.stderr
    fired = run(series, [])  # fails, and shows what it got instead of nothing
    assert fired.returncode != 0
    output = fired.stdout + fired.stderr
    assert f'alertname="{alert}"' in output
    for name, value in labels.items():
        assert f'{name}="{value}"' in output, output
