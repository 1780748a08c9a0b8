"""TensorRT-RTX compiles every graph on a machine without a GPU: the check that the graphs are ones TensorRT takes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

from staindiffuser.export.builders import BuildOptions
from staindiffuser.export.builders.tensorrt import TensorRTBuilder
from staindiffuser.export.builders.tensorrt_rtx import DEFAULT_CAPABILITIES, TensorRTRtxBuilder
from staindiffuser.export.compiling import compile_engines
from staindiffuser.export.description import EngineGraph, GraphSet
from staindiffuser.export.errors import BuilderMissingError, BuildError, ExportUsageError

STEPS = (1, 2, 4)
PRECISIONS = ("fp32", "fp16")
MOST_GROWTH = 1.15
"""Size of the image's engine of four steps over that of one."""
OPTIONS = BuildOptions(batches=(1, 8, 32))


def write_graphs(preset: str, folder: Path, *, tile: int) -> dict[tuple[str, int, str], tuple[Path, EngineGraph]]:
    """The graphs of one stain of a preset with random weights, by precision, steps and engine."""
    from staindiffuser.export import graphs
    from staindiffuser.training.config import PRESETS, StainConfig
    from staindiffuser.training.diffusion.samplers import START_SIGMAS
    from staindiffuser.training.model.network import DualDiffusion

    stain = StainConfig(name="cd3", label="CD3")
    network = DualDiffusion(dataclasses.replace(PRESETS[preset].model, stains=(stain,)))
    written = {}
    for precision in PRECISIONS:
        trunk = graphs.PRECISIONS[precision]
        for steps in STEPS:
            target = folder / f"{precision}-{steps}"
            target.mkdir()
            # Encoder and cell branch do not depend on the steps, except that the first export writes them.
            engines = graphs.write_engines(
                network,
                target,
                sigmas=START_SIGMAS[steps],
                tile=tile,
                trunk=trunk,
                only=None if steps == 1 else "stain_cd3",
            )
            for name, engine in engines.items():
                written[precision, steps, name] = (target / engine.file, engine)
    return written


def compile_all(written: dict[tuple[str, int, str], tuple[Path, EngineGraph]], folder: Path) -> dict[Any, int]:
    builder = TensorRTRtxBuilder()
    sizes = {}
    for (precision, steps, name), (path, engine) in written.items():
        target = folder / f"{precision}-{steps}-{name}.rtx"
        builder.build(path, engine, target, OPTIONS)
        sizes[precision, steps, name] = target.stat().st_size
        target.unlink()
    return sizes


def check_sizes(sizes: dict[Any, int]) -> None:
    assert len(sizes) == len(PRECISIONS) * (len(STEPS) + 2)
    for precision in PRECISIONS:
        one, four = sizes[precision, 1, "stain_cd3"], sizes[precision, 4, "stain_cd3"]
        print(f"{precision}: k = 1 {one / 1e6:.2f} MB, k = 4 {four / 1e6:.2f} MB, ratio {four / one:.3f}")
        assert four <= MOST_GROWTH * one, precision


def test_default_capabilities_are_those_that_are_promised() -> None:
    assert DEFAULT_CAPABILITIES == ("8.0", "8.6", "8.9", "12.0")
    assert set(DEFAULT_CAPABILITIES) <= set(TensorRTRtxBuilder().capabilities())


@pytest.mark.slow  # graphs are exported six times, for the base preset with 50 M parameters
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("preset", ["demo", "base"])
def test_presets_compile_and_unrolling_shares_the_weights(preset: str, tmp_path: Path) -> None:
    """Every engine of a preset, k = 1, 2, 4, in both precisions, for all default GPUs at once."""
    written = write_graphs(preset, tmp_path, tile=256)
    check_sizes(compile_all(written, tmp_path))


def test_engines_of_a_graphs_folder(tiny_graphs: Path, tmp_path: Path) -> None:
    program = "import sys; sys.modules['torch'] = None; from staindiffuser.cli import main; main()"
    command = [sys.executable, "-c", program, "export", "compile", str(tiny_graphs)]
    output = tmp_path / "engines"
    result = subprocess.run(
        [*command, "--output", str(output), "--compute-capability", "8.9", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert set(json.loads(result.stdout)["engines"]) == set(GraphSet.load(tiny_graphs).engines)
    assert len(list(output.iterdir())) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["engines"]


def test_unknown_capabilities_are_refused(tiny_graphs: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportUsageError, match=r"compute capability 9\.0: tensorrt-rtx compiles for .*8\.9"):
        compile_engines(tiny_graphs, tmp_path / "engines", BuildOptions(compute_capabilities=("9.0",)))
    assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_is_left_alone(tiny_graphs: Path, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("keep")
    with pytest.raises(ExportUsageError, match="contains files other than engines"):
        compile_engines(tiny_graphs, tmp_path, BuildOptions())
    assert (tmp_path / "precious.txt").read_text() == "keep"


def test_a_graph_that_is_refused_is_named(tiny_graphs: Path, tmp_path: Path) -> None:
    """Permuting bytes before they are cast is what TensorRT does not do."""
    graphs = GraphSet.load(tiny_graphs)
    model = onnx.load(tiny_graphs / "he_encoder.onnx")
    cast = next(node for node in model.graph.node if node.op_type == "Cast" and node.input[0] == "HE")
    permute = next(node for node in model.graph.node if node.op_type == "Transpose" and node.input[0] == cast.output[0])
    permute.input[0], cast.input[0] = "HE", permute.output[0]
    after = [node for node in model.graph.node if permute.output[0] in node.input and node is not cast]
    for node in after:
        node.input[list(node.input).index(permute.output[0])] = cast.output[0]
    nodes = [node for node in model.graph.node if node not in (cast, permute)]
    del model.graph.node[:]
    model.graph.node.extend([permute, cast, *nodes])
    del model.graph.value_info[:]
    onnx.save(model, tmp_path / "wrong.onnx")
    with pytest.raises(BuildError, match=r"refuses the graph: node 0 .*UInt8"):
        TensorRTRtxBuilder().build(
            tmp_path / "wrong.onnx", graphs.engines["he_encoder"], tmp_path / "out.rtx", BuildOptions()
        )
    assert not (tmp_path / "out.rtx").exists()


def test_nothing_is_published_where_it_cannot_be_checked(tiny_graphs: Path, tmp_path: Path) -> None:
    from staindiffuser.export.builders.devices import find_gpu
    from staindiffuser.export.repository import build

    if find_gpu() is not None:
        pytest.skip("this machine has a GPU")
    with pytest.raises(
        BuilderMissingError, match=r"no NVIDIA GPU .* targets that work here: onnxruntime, openvino, torch"
    ):
        build(tiny_graphs, tmp_path / "repository", target="tensorrt-rtx")
    assert not list(tmp_path.iterdir())


class _Timings:
    def __init__(self, seen: list[bytes], known: bytes) -> None:
        seen.append(known)

    def serialize(self) -> bytes:
        return b"timings"


class _OnRtx:
    """The ``tensorrt`` module played by TensorRT-RTX, which has its API."""

    def __init__(self, trt: Any) -> None:
        self._trt = trt
        self.__name__, self.__version__ = "tensorrt", "10.16.0"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trt, name)


def test_the_tensorrt_builder_runs_on_the_same_api(
    tiny_graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from staindiffuser.export.builders import Device
    from staindiffuser.export.builders import tensorrt as module

    builder = TensorRTBuilder()
    rtx = TensorRTRtxBuilder()._module()
    fake = _OnRtx(rtx)
    create_config = rtx.Builder.create_builder_config

    def for_a_gpu_that_is_not_here(builder: Any) -> Any:
        config = create_config(builder)
        config.num_compute_capabilities = 1
        config.set_compute_capability(rtx.ComputeCapability.SM89, 0)
        return config

    monkeypatch.setattr(rtx.Builder, "create_builder_config", for_a_gpu_that_is_not_here)
    seen: list[bytes] = []
    # TensorRT-RTX times nothing and crashes on the calls; everything else is the real thing.
    monkeypatch.setattr(rtx.IBuilderConfig, "create_timing_cache", lambda config, known: _Timings(seen, known))
    monkeypatch.setattr(rtx.IBuilderConfig, "set_timing_cache", lambda config, cache, ignore_mismatch: True)
    monkeypatch.setattr(builder, "_module", lambda: fake)
    gpu = Device(kind="cuda", name="NVIDIA L4", compute_capability="8.9")
    monkeypatch.setattr(module, "find_gpu", lambda: gpu)
    monkeypatch.setenv("STAINDIFFUSER_CACHE", str(tmp_path / "cache"))
    graphs = GraphSet.load(tiny_graphs)
    options = BuildOptions(batches=(1, 8), workspace_mib=512, verbosity="detailed")
    builder.check(options)
    for _ in range(2):  # the second build reads the timings of the first
        builder.build(tiny_graphs / "cells_cd3.onnx", graphs.engines["cells_cd3"], tmp_path / "cells.plan", options)
    assert seen == [b"", b"timings"]
    assert (tmp_path / "cells.plan").stat().st_size > 100_000
    assert [path.name for path in (tmp_path / "cache" / "timings").iterdir()] == [
        "tensorrt-10.16.0-NVIDIA-L4-8.9.cache"
    ]
