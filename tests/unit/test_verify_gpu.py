"""The GPU check's logic, on the CPU with a small model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from staindiffuser.benchmarks import verify_gpu as module


def test_report_on_a_cpu(tmp_path: Path) -> None:
    output = tmp_path / "cpu.json"
    options = ["--device", "cpu", "--preset", "debug", "--tile", "64", "--batch", "1,2", "--seconds-each", "0.01"]
    assert module.main([*options, "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    assert report["parity_passed"]
    assert set(report["parity"]) == {"image k=1", "image k=2", "image k=4", "cells"}
    assert set(report["gflop_per_tile"]) == {"encoder", "image k=1", "image k=2", "image k=4", "cells"}
    assert report["gflop_per_tile"]["image k=4"] > 3 * report["gflop_per_tile"]["image k=1"]
    assert len(report["measurements"]) == 5 * 2
    for measurement in report["measurements"]:
        assert measurement["how"] == "eager"
        assert measurement["milliseconds"] > 0
        assert measurement["share_of_peak"] > 0
    assert report["left_out"] == []


def test_what_does_not_fit_the_time_limit_is_listed() -> None:
    report = module.verify_gpu(preset="debug", device="cpu", tile=64, batches=(1,), limit=0.0, seconds_each=0.01)
    assert report.measurements == ()
    assert len(report.left_out) == 5
    assert all("the time limit" in line for line in report.left_out)
    assert report.parity_passed


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_one_line_and_exit_6() -> None:
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['onnx', 'onnxruntime', 'safetensors', 'lightning', 'scipy', "
        "'skimage', 'typer', 'tritonclient']));"
        "from staindiffuser.benchmarks.verify_gpu import main; sys.exit(main([]))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 6, result.stderr
    assert result.stderr.startswith("error: no NVIDIA GPU that torch can use")
    assert len(result.stderr.splitlines()) == 1
