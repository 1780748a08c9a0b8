"""The GPU check, rehearsed on the CPU with a small model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from staindiffuser.benchmarks import verify_gpu
from staindiffuser.benchmarks.gpu import stages, tensorrt_stage
from staindiffuser.benchmarks.gpu.options import GpuOptions, StepResult
from tests.simulated_gpu import cupy as simulated_cupy
from tests.simulated_gpu import tensorrt as simulated_tensorrt
from tests.simulated_gpu.cupy import Stream

SMALL = ["--device", "cpu", "--preset", "debug", "--tile", "64", "--batch", "1,2", "--seconds-each", "0.01"]


def verify(output: Path, *more: str) -> tuple[int, dict[str, Any]]:
    code = verify_gpu.main(["--output", str(output), *SMALL, *more])
    return code, json.loads((output / "report.json").read_text(encoding="utf-8"))["steps"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_of_it_is_rehearsed(tiny_graphs: Path, tmp_path: Path) -> None:
    arguments = ["--graphs", str(tiny_graphs), "--train-preset", "debug", "--limit", "4800"]
    code, steps = verify(tmp_path, *arguments)
    assert code == 0, steps
    assert list(steps) == [step.name for step in verify_gpu.STEPS]
    assert {name: step["status"] for name, step in steps.items()} == {
        **dict.fromkeys(steps, "passed"),
        "tensorrt": "skipped",
    }
    assert all(step["left_out"] == [] for step in steps.values())
    hows = {m["how"].partition(",")[0] for m in steps["stages"]["measurements"]}
    assert hows == {"graph", "eager", "compiled"}
    assert steps["server"]["executions"]["staindiffuser"] > 0
    assert steps["training"]["files"]
    for step in verify_gpu.STEPS:
        assert (tmp_path / f"{step.name}.log").is_file()


def test_checks_that_need_no_server(tiny_graphs: Path, tmp_path: Path) -> None:
    arguments = [
        "--graphs",
        str(tiny_graphs),
        "--no-compile",
        "--only",
        "environment,noise,engines,stages",
        "--limit",
        "4800",
    ]
    code, steps = verify(tmp_path, *arguments)
    assert code == 0, steps
    assert set(steps["environment"]["imports"].values()) == {"ok"}
    assert len(steps["noise"]["bit_for_bit"]) == 9
    assert all(steps["noise"]["bit_for_bit"].values())
    engines = steps["engines"]
    assert set(engines["parity"]) == {f"{way}, batch {b}" for way in ("contiguous", "channels last") for b in (1, 3)}
    assert all(apart == 0 for layout in engines["replay"].values() for apart in layout.values())
    assert set(engines["triton_models"]) == {"STAIN_CD3", "CELLS_CD3", "STAIN_CK818", "CELLS_CK818"}
    timed = steps["stages"]
    names = {"encoder", "image k=1", "image k=2", "image k=4", "cells"}
    assert set(timed["gflop_per_tile"]) == names
    assert timed["gflop_per_tile"]["image k=4"] > 3 * timed["gflop_per_tile"]["image k=1"]
    # Five stages, two batches, two layouts, two ways.
    assert len(timed["measurements"]) == 5 * 2 * 2 * 2
    for measurement in timed["measurements"]:
        assert measurement["milliseconds"] > 0
        assert measurement["share_of_peak"] > 0
        if measurement["how"].startswith("graph"):
            assert measurement["apart"] == {"max_levels": 0.0, "share_over_one": 0.0}
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| noise | passed |" in report


def test_a_step_that_fails_is_named_and_the_others_are_done(tmp_path: Path) -> None:
    arguments = ["--graphs", str(tmp_path / "absent"), "--only", "noise,engines,environment"]
    code, steps = verify(tmp_path, *arguments, "--limit", "120")
    assert code == verify_gpu.FAILED
    assert [name for name, step in steps.items() if step["status"] == "failed"] == ["engines"]
    assert "absent" in steps["engines"]["errors"][0]
    assert steps["noise"]["status"] == steps["environment"]["status"] == "passed"
    assert "## engines" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_a_step_whose_process_dies_keeps_what_it_had_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = verify_gpu.STEPS[1]

    def dies(_: object, given: object, output: Path, limit: float) -> int:
        result = StepResult(path=output / f"{step.name}.json", limit=limit)
        result.data["half"] = 1
        result.write()
        return -11

    monkeypatch.setattr(verify_gpu, "_start", dies)
    code, steps = verify(tmp_path, "--only", "noise")
    assert code == verify_gpu.FAILED
    assert steps["noise"]["half"] == 1
    assert steps["noise"]["errors"] == ["the step was killed (signal 11): see noise.log"]
    assert json.loads((tmp_path / "noise.json").read_text(encoding="utf-8"))["status"] == "failed"


def test_a_hanging_step_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_gpu, "_GRACE", 0.2)
    code, steps = verify(tmp_path, "--only", "environment", "--limit", "0.1")
    assert code == verify_gpu.FAILED
    assert steps["environment"]["errors"] == ["the step was killed (signal 9): see environment.log"]


def options(tmp_path: Path, **changes: Any) -> GpuOptions:
    chosen: dict[str, Any] = {
        "output": tmp_path, "device": "cpu", "graphs": tmp_path, "preset": "debug", "tile": 64, "batches": (1, 2),
        "seconds_each": 0.01, "compiled": False, "train_preset": "debug", "tiles": None, "limit": 100.0,
    }  # fmt: skip
    return GpuOptions(**{**chosen, **changes})


def test_what_the_time_limit_leaves_out_is_listed(tmp_path: Path) -> None:
    result = StepResult(path=tmp_path / "stages.json", limit=0.0)
    stages.run(options(tmp_path), result)
    assert len(result.left_out) == 2 + 5 * 2 * 2 * 2
    assert all("the time limit" in line for line in result.left_out)
    assert result.errors == []


def test_a_result_that_differs_from_eager_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay that reads memory which is no longer its inputs' gives the first answer again."""

    class Stale(stages.Captured):
        def __call__(self, inputs: list[torch.Tensor]) -> Any:
            return self._module(*self._inputs)

    monkeypatch.setattr(stages, "Captured", Stale)
    result = StepResult(path=tmp_path / "stages.json", limit=100.0)
    stages.run(options(tmp_path, batches=(1,)), result)
    assert len(result.errors) == 2 * 5
    assert all("graph" in line and "differs from eager" in line for line in result.errors)
    assert len(result.data["measurements"]) == 2 * 5 * 2


@pytest.mark.parametrize("name", tensorrt_stage.STAGES)
def test_a_tensorrt_stage_on_a_simulated_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    simulated_cupy.install(monkeypatch)
    trt = simulated_tensorrt.install(monkeypatch)
    monkeypatch.setattr(tensorrt_stage, "_synchronize", lambda device: Stream.current.synchronize())
    chosen = options(tmp_path)
    network = stages.random_network("debug")
    stage = tensorrt_stage.TensorRTStage(trt, network, name, torch.float32, options=chosen)
    assert stage.flops > 0
    assert stage.plan_bytes > 0
    for batch in (1, 2):
        timed = stage.prepare(batch)
        timed.run()
        assert timed.check is not None
        check = timed.check()
        assert check.max_levels <= 1
        assert check.share_over_one == 0


def test_tensorrt_is_skipped_where_it_cannot_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = StepResult(path=tmp_path / "tensorrt.json", limit=100.0)
    monkeypatch.setattr(tensorrt_stage, "tensorrt_modules", dict)
    tensorrt_stage.run(options(tmp_path), result)
    assert result.skipped == "neither TensorRT nor TensorRT-RTX is installed"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_one_line_and_exit_6(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['onnx', 'onnxruntime', 'safetensors', 'scipy', "
        "'skimage', 'typer', 'tritonclient']));"
        "from staindiffuser.benchmarks.verify_gpu import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "--output", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 6, result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: no NVIDIA GPU that torch can use")
    assert (tmp_path / "environment.json").is_file()
