"""``staindiffuser bench engines``: it runs on tiny graphs, counts what it claims, and names graphs that do not fit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from staindiffuser.benchmarks.engines import bench_engines, count_flops
from staindiffuser.export.errors import ManifestError


def test_report(tiny_checkpoint: Path, tiny_graphs: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    command = [sys.executable, "-c", "from staindiffuser.cli import main; main()", "bench", "engines"]
    options = ["--graphs", str(tiny_graphs), "--batch", "1,2", "--rounds", "2", "--threads", "1", "--json", str(file)]
    result = subprocess.run(
        [*command, str(tiny_checkpoint), *options], capture_output=True, text=True, timeout=200, check=False
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(file.read_text())
    assert [entry["batch"] for entry in report["batches"]] == [1, 2]
    for entry in report["batches"]:
        assert entry["speed_up"] > 0
        assert 0 < entry["share_of_peak"] < 1.5
    assert 0.2 < report["four_stains_ratio"] < 5
    assert set(report["engine_ms"]) == {"he_encoder", "stain_cd3", "cells_cd3", "stain_ck818", "cells_ck818"}
    assert "convolution peak:" in result.stdout
    assert "four stains:" in result.stdout


def test_operations_are_counted_from_the_graph(tiny_graphs: Path) -> None:
    one = count_flops(tiny_graphs / "he_encoder.onnx")
    # Stem 12 -> 16 at 32 px, blocks of two 3x3 convolutions at 32, 16, 8, 4 px, three 2x2 convolutions between them.
    channels, size = (16, 16, 24, 32), (32, 16, 8, 4)
    expected = 2 * 12 * 16 * 9 * 32**2
    expected += sum(2 * 2 * c * c * 9 * s * s for c, s in zip(channels, size, strict=True))
    expected += sum(2 * a * b * 4 * s * s for a, b, s in zip(channels, channels[1:], size[1:], strict=False))
    assert one == expected


def test_graphs_of_another_checkpoint_are_refused(tiny_graphs: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"others")
    with pytest.raises(ManifestError, match="was exported from another checkpoint"):
        bench_engines(tiny_graphs, tmp_path)
