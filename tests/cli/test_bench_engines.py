"""``staindiffuser bench engines``: it runs on tiny graphs, counts what it claims, and names graphs that do not fit."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from staindiffuser.benchmarks.engines import bench_engines, count_flops
from staindiffuser.benchmarks.measuring import Sample, Timing, in_turns
from staindiffuser.cli import app
from staindiffuser.errors import UsageError
from staindiffuser.export.description import GraphSet
from staindiffuser.export.errors import ManifestError
from tests.synthetic_graphs import write_graphs


def test_report(
    tiny_checkpoint: Path,
    tiny_graphs: Path,
    tiles_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("staindiffuser.benchmarks.engines.STEPS", (1, 2))  # exporting takes seconds
    for name in ("_CHANNELS", "_MATRIX"):  # and so do the peaks
        monkeypatch.setattr(f"staindiffuser.benchmarks.limits.{name}", 16)
    file = tmp_path / "report.json"
    options = ["--graphs", str(tiny_graphs), "--batch", "1,2", "--rounds", "2", "--turn", "0.01", "--threads", "1"]
    options += ["--json", str(file), "--tiles", str(tiles_folder)]
    result = CliRunner().invoke(app, ["bench", "engines", str(tiny_checkpoint), *options])
    assert result.exit_code == 0, result.output
    report = json.loads(file.read_text(encoding="utf-8"))
    graphs = GraphSet.load(tiny_graphs)
    rows = {(row["engine"], row["what"], row["batch"]): row for row in report["rows"]}
    parts = {"1 stain", "2 stains", "4 stains", "encoder", "image, 1 step", "image, 2 steps"}
    assert {what for engine, what, _ in rows if engine == "onnxruntime fp32"} == {*parts, "cell map"}
    joined = {"1 stain, one graph", "2 stains, one graph"}
    if any(engine == "openvino fp32" for engine, _, _ in rows):
        assert {what for engine, what, _ in rows if engine == "openvino fp32"} == {*parts, "cell map", *joined}
    assert report["gflop"]["2 stains, one graph"] == report["gflop"]["2 stains"]
    assert {batch for _, _, batch in rows} == {1, 2}
    assert ("torch as trained", "2 stains", 2) in rows
    assert report["gflop"]["4 stains"] == pytest.approx(2 * report["gflop"]["2 stains"] - report["gflop"]["encoder"])
    assert report["gflop"]["image, 2 steps"] > 1.5 * report["gflop"]["image, 1 step"]
    kept_mm2 = ((graphs.tile - 2 * graphs.margin) * graphs.mpp / 1000) ** 2
    for (engine, what, _), row in rows.items():
        ms = row["ms"]
        assert 0 < ms["p50"] <= ms["p95"] <= ms["p99"]
        assert ms["cpu"] > 0
        assert row["tiles_per_second"] == pytest.approx(1000 / ms["p50"])
        assert row["mm2_per_second"] == pytest.approx(kept_mm2 * row["tiles_per_second"])
        assert row["gflops"] == pytest.approx(report["gflop"][what] * row["tiles_per_second"])
        assert row["share_of_peak_cpu"] > 0
        assert (row["relative"] is None) == (engine == "onnxruntime fp32")
        if what in joined:
            assert row["relative_cpu"]["median"] > 0
    assert report["peaks"]["convolution fp32"] > 0
    assert report["machine"]["packages"]["onnxruntime"]
    engines = {engine for engine, _, _ in rows} - {"torch as trained"}
    assert {name for name in report["memory_mib"] if not name.endswith("one graph")} == engines
    assert report["dice_tiles"] == 4
    assert set(report["dab_dice"]) == engines
    exact = report["dab_dice"]["onnxruntime fp32"]
    assert all(0 <= value <= 1 for value in exact.values())
    assert "convolution fp32 peak:" in result.stdout
    assert "tensorrt fp32: not here: " in result.stdout


def test_one_graph_stands_beside_the_engines_that_it_joins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On graphs without a network: no export, no torch."""
    pytest.importorskip("openvino")
    monkeypatch.setattr("staindiffuser.benchmarks.engines.STEPS", (2,))
    for name in ("torch_sides", "_other_steps"):
        monkeypatch.setattr(f"staindiffuser.benchmarks.engines.{name}", lambda *arguments: {})
    for name in ("_CHANNELS", "_MATRIX"):
        monkeypatch.setattr(f"staindiffuser.benchmarks.limits.{name}", 16)
    write_graphs(tmp_path, tile=32, steps=2)
    (tmp_path / "model.safetensors").write_text("0", encoding="ascii")  # what the synthetic graphs say they come from
    only = ["onnxruntime fp32", "openvino fp32"]
    report = bench_engines(tmp_path, tmp_path, batches=(1, 2), rounds=1, turn=0.01, threads=1, only=only)
    rows = {(row.engine, row.what, row.batch): row for row in report.rows}
    joined = {(engine, what) for engine, what, _ in rows if what.endswith("one graph")}
    assert joined == {("openvino fp32", "1 stain, one graph"), ("openvino fp32", "2 stains, one graph")}
    assert {what for _, what, batch in rows if batch == 2} == {"2 stains", "2 stains, one graph"}
    assert report.gflop["1 stain, one graph"] == report.gflop["1 stain"]
    assert "openvino fp32, one graph" in report.memory_mib
    row = rows["openvino fp32", "2 stains, one graph", 2]
    assert row.relative_cpu is not None
    default = rows["onnxruntime fp32", "2 stains", 2]
    assert row.relative_cpu.median == pytest.approx(row.ms.cpu / default.ms.cpu)
    assert set(report.whole_work(2)) == {"onnxruntime fp32", "openvino fp32", "openvino fp32, one graph"}


def test_an_engine_that_is_not_there_is_refused(tiny_checkpoint: Path, tiny_graphs: Path) -> None:
    with pytest.raises(UsageError, match="--engine openvino int1: there is onnxruntime fp32"):
        bench_engines(tiny_graphs, tiny_checkpoint, only=["openvino int1"], parts=False)


def test_one_thread_takes_as_much_cpu_as_wall_time() -> None:
    def work() -> None:
        end = time.thread_time() + 0.03
        while time.thread_time() < end:
            pass

    sides = {"work": work, "sleep": lambda: time.sleep(0.02)}
    samples = in_turns(sides, 4)
    assert len(samples["work"]) == 4
    work_timing, sleep_timing = Timing.of(samples["work"], tiles=2), Timing.of(samples["sleep"])
    assert work_timing.cpu >= 10
    assert work_timing.p50 >= 0.99 * work_timing.cpu  # two clocks, read one after the other
    assert sleep_timing.cpu < 5 < sleep_timing.p50


def test_wide_quartiles_are_not_trusted() -> None:
    steady = [Sample(wall=1 + 0.001 * i, cpu=1) for i in range(9)]
    assert Timing.of(steady).trusted
    assert not Timing.of([*steady[:4], *(Sample(wall=2, cpu=1) for _ in range(5))]).trusted


def test_the_order_changes_from_round_to_round() -> None:
    order: list[str] = []
    in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["b", "a", "a", "b", "b", "a"]


def test_a_short_side_is_repeated_until_its_turn_is_over() -> None:
    calls = {"short": 0, "long": 0}

    def side(name: str, seconds: float) -> None:
        calls[name] += 1
        time.sleep(seconds)

    sides = {"short": lambda: side("short", 0.01), "long": lambda: side("long", 0.3)}
    samples = in_turns(sides, 2, least=0.1)
    assert calls["long"] == 3  # one of them in the round that is not counted
    for turn in samples["short"]:
        assert 1 <= len(turn.runs) <= 10
        assert turn.wall == pytest.approx(sum(turn.runs) / len(turn.runs))
    counted = sum(len(turn.runs) for turn in samples["short"])
    assert calls["short"] >= counted + 3  # in every turn, the first run is not counted
    assert Timing.of(samples["short"]).runs == counted


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
