"""What the engines reach on this machine's CPU: against torch eager, against the convolution peak, and per stain.

Everything is interleaved in one run, so that a slow moment of the machine meets all sides; results are medians over the
rounds, ratios are taken round by round. Noise is made beforehand on every side.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from staindiffuser.export.description import GraphSet
from staindiffuser.export.errors import ManifestError
from staindiffuser.files import file_sha256
from staindiffuser.triton_models.engine.engine_onnxruntime import OnnxRuntimeEngine
from staindiffuser.triton_models.noise.philox import tile_noise
from staindiffuser.triton_models.shared.cpus import available_cpus

__all__ = ["BatchReport", "EnginesReport", "bench_engines", "count_flops"]

Arrays = dict[str, np.ndarray[Any, Any]]
PEAK_CHANNELS, PEAK_SIZE, PEAK_BATCH = 256, 64, 4
"""The convolution whose speed is called the machine's peak: 3 x 3, 256 to 256 channels, 64 x 64 pixels, batch 4."""
STAINS_IN_CLAIM = 4


@dataclass(frozen=True, kw_only=True)
class BatchReport:
    """The whole multiplex at one batch size."""

    batch: int
    onnxruntime_ms_per_tile: float
    eager_ms_per_tile: float
    """The network as it was trained, torch eager, float32."""
    folded_ms_per_tile: float
    """The folded modules that the graphs were traced from, torch eager, float32."""
    speed_up: float
    """Eager's time over ONNX Runtime's."""
    speed_up_over_folded: float
    gflops: float
    """Reached by ONNX Runtime, 10⁹ floating-point operations a second (convolutions only)."""
    share_of_peak: float


@dataclass(frozen=True, kw_only=True)
class EnginesReport:
    """What was measured."""

    model_name: str
    model_version: str
    precision: str
    tile: int
    steps: int
    stains: int
    threads: int
    rounds: int
    gflop_per_tile: float
    """Multiply and add counted as two, convolutions only, from the ONNX graphs."""
    peak_gflops: float
    """The better of ONNX Runtime and torch at the convolution named in ``peak``."""
    peak: str
    batches: tuple[BatchReport, ...]
    engine_ms: Mapping[str, float]
    """Each engine alone, batch 1."""
    four_stains_ms: float
    four_stains_sum_ms: float
    """t_encoder + 4 t_image + 4 t_cells."""
    four_stains_ratio: float


def bench_engines(
    graphs_dir: Path,
    checkpoint: Path,
    *,
    batches: Sequence[int] = (1, 8),
    rounds: int = 5,
    threads: int = 0,
    progress: Callable[[str], None] = lambda message: None,
) -> EnginesReport:
    """Measure graphs against the checkpoint that they came from.

    Args:
        graphs_dir: what ``export graphs`` wrote.
        checkpoint: the checkpoint folder.
        batches: sizes at which the multiplex is compared.
        rounds: counted rounds, after one that is not.
        threads: of either side; 0 for all that the process may use.
        progress: told after each round.

    Raises:
        ManifestError: the graphs come from another checkpoint.
    """
    import torch

    graphs = GraphSet.load(graphs_dir)
    if file_sha256(checkpoint / "model.safetensors") != graphs.checkpoint_sha256:
        raise ManifestError(f"{graphs_dir} was exported from another checkpoint than {checkpoint}: export it again")
    threads = threads or available_cpus()
    torch.set_num_threads(threads)
    engines = {name: OnnxRuntimeEngine(graphs_dir / e.file, threads=threads) for name, e in graphs.engines.items()}
    four = _four_stains(graphs, graphs_dir, threads)
    inputs = {batch: _inputs(graphs, batch) for batch in batches}
    features = _encode(engines, graphs, inputs[batches[0]] if batches[0] == 1 else _inputs(graphs, 1))
    one: Arrays = {**features, **(inputs[1] if 1 in inputs else _inputs(graphs, 1))}
    eager, folded = _torch_sides(checkpoint, graphs)
    sides: dict[str, Callable[[], object]] = {}
    for batch in batches:
        sides[f"onnxruntime {batch}"] = lambda b=batch: _multiplex(engines, graphs, inputs[b])  # type: ignore[misc]
        sides[f"eager {batch}"] = lambda b=batch: eager(inputs[b])  # type: ignore[misc]
        sides[f"folded {batch}"] = lambda b=batch: folded(inputs[b])  # type: ignore[misc]
    for name in engines:
        sides[f"engine {name}"] = lambda n=name: _run(engines[n], graphs, n, one)  # type: ignore[misc]
    for name, (engine, like) in four.items():
        sides[f"four {name}"] = lambda e=engine, n=like: _run(e, graphs, n, one)  # type: ignore[misc]
    sides["four stains"] = lambda: [_run(engine, graphs, like, one) for engine, like in four.values()]
    with tempfile.TemporaryDirectory() as folder:
        peaks, peak_flops = _peaks(Path(folder), threads)
        sides.update(peaks)
        seconds = _measure(sides, rounds, progress)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    peak = peak_flops / min(median[name] for name in peaks) / 1e9
    flops = sum(count_flops(graphs_dir / engine.file) for engine in graphs.engines.values())
    alone = [seconds[f"four {name}"] for name in four]
    ratios = [whole / sum(parts) for whole, *parts in zip(seconds["four stains"], *alone, strict=True)]
    return EnginesReport(
        model_name=graphs.name,
        model_version=graphs.model_version,
        precision=graphs.precision,
        tile=graphs.tile,
        steps=graphs.steps,
        stains=len(graphs.stains),
        threads=threads,
        rounds=rounds,
        gflop_per_tile=flops / 1e9,
        peak_gflops=peak,
        peak=f"3x3 convolution, {PEAK_CHANNELS} to {PEAK_CHANNELS} channels, {PEAK_SIZE} px, batch {PEAK_BATCH}, fp32",
        batches=tuple(_batch_report(batch, seconds, flops, peak) for batch in batches),
        engine_ms={name: median[f"engine {name}"] * 1e3 for name in engines},
        four_stains_ms=median["four stains"] * 1e3,
        four_stains_sum_ms=sum(median[f"four {name}"] for name in four) * 1e3,
        four_stains_ratio=statistics.median(ratios),
    )


def count_flops(path: Path) -> float:
    """Floating-point operations of an ONNX graph's convolutions for one tile, multiply and add counted as two."""
    model = onnx.load(path)
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 1
    del model.graph.value_info[:]
    for value in model.graph.output:
        value.type.tensor_type.shape.dim[0].Clear()
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.value_info, *graph.output)}
    shapes.update({tensor.name: list(tensor.dims) for tensor in graph.initializer})
    total = 0.0
    for node in graph.node:
        if node.op_type == "Conv":
            _, height, width = shapes[node.output[0]][1:]
            total += 2.0 * float(np.prod(shapes[node.input[1]])) * height * width
    return total


def _measure(
    sides: Mapping[str, Callable[[], object]], rounds: int, progress: Callable[[str], None]
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    for index in range(rounds + 1):
        for name in order if index % 2 else reversed(order):
            start = time.perf_counter()
            sides[name]()
            if index:
                seconds[name].append(time.perf_counter() - start)
        progress(f"round {index} of {rounds}" + ("" if index else " (not counted)"))
    return seconds


def _batch_report(batch: int, seconds: Mapping[str, Sequence[float]], flops: float, peak: float) -> BatchReport:
    ours, eager, folded = (seconds[f"{side} {batch}"] for side in ("onnxruntime", "eager", "folded"))
    gflops = flops * batch / statistics.median(ours) / 1e9
    return BatchReport(
        batch=batch,
        onnxruntime_ms_per_tile=statistics.median(ours) * 1e3 / batch,
        eager_ms_per_tile=statistics.median(eager) * 1e3 / batch,
        folded_ms_per_tile=statistics.median(folded) * 1e3 / batch,
        speed_up=statistics.median(b / a for a, b in zip(ours, eager, strict=True)),
        speed_up_over_folded=statistics.median(b / a for a, b in zip(ours, folded, strict=True)),
        gflops=gflops,
        share_of_peak=gflops / peak,
    )


def _inputs(graphs: GraphSet, batch: int) -> Arrays:
    rng = np.random.default_rng(batch)
    image, cells = tile_noise(
        np.arange(batch, dtype=np.int64)[:, None],
        np.zeros((batch, 2), np.int64),
        steps=graphs.steps,
        height=graphs.tile,
        width=graphs.tile,
    )
    he = rng.integers(0, 256, (batch, graphs.tile, graphs.tile, 3), dtype=np.uint8)
    return {"HE": he, "NOISE": image, "NOISE_CELLS": cells}


def _run(engine: OnnxRuntimeEngine, graphs: GraphSet, name: str, tensors: Arrays) -> Arrays:
    graph = graphs.engines[name]
    return engine.run({t.name: tensors[t.name] for t in graph.inputs}, [t.name for t in graph.outputs])


def _encode(engines: Mapping[str, OnnxRuntimeEngine], graphs: GraphSet, inputs: Arrays) -> Arrays:
    return _run(engines["he_encoder"], graphs, "he_encoder", inputs)


def _multiplex(engines: Mapping[str, OnnxRuntimeEngine], graphs: GraphSet, inputs: Arrays) -> None:
    tensors = {**inputs, **_encode(engines, graphs, inputs)}
    for name, engine in engines.items():
        if name != "he_encoder":
            _run(engine, graphs, name, tensors)


def _four_stains(graphs: GraphSet, folder: Path, threads: int) -> dict[str, tuple[OnnxRuntimeEngine, str]]:
    """The encoder and four pairs of branches, each in a session of its own; the stains there are take turns."""
    engines = {"he_encoder": "he_encoder"}
    for index in range(STAINS_IN_CLAIM):
        stain = graphs.stains[index % len(graphs.stains)].name
        for kind in ("stain", "cells"):
            engines[f"{kind} {index}"] = f"{kind}_{stain}"
    return {
        name: (OnnxRuntimeEngine(folder / graphs.engines[like].file, threads=threads), like)
        for name, like in engines.items()
    }


def _torch_sides(checkpoint: Path, graphs: GraphSet) -> tuple[Callable[[Arrays], object], Callable[[Arrays], object]]:
    """The multiplex in torch eager: the network as trained, and the folded modules."""
    import torch

    from staindiffuser.export.modules import BranchEngine, EncoderEngine
    from staindiffuser.training.checkpoint import Checkpoint
    from staindiffuser.training.diffusion.samplers import few_step
    from staindiffuser.training.model.network import he_to_network, unstandardize

    network = Checkpoint.load(checkpoint).network
    config = network.config

    @torch.inference_mode()
    def eager(inputs: Arrays) -> None:
        features = network.encoder(he_to_network(torch.from_numpy(inputs["HE"])))
        noise = torch.from_numpy(inputs["NOISE"]).float().unbind(1)
        for stain in config.stains:
            y = few_step(network.denoiser("images", stain.name, features), list(noise), graphs.sigmas)
            unstandardize(y, stain, "images", config.sigma_data).clamp(0, 1).mul(255).round().to(torch.uint8)
            cell_noise = [torch.from_numpy(inputs["NOISE_CELLS"]).float()]
            y = few_step(network.denoiser("cells", stain.name, features), cell_noise, [config.sigma_max])
            unstandardize(y, stain, "cells", config.sigma_data).clamp(0, 1).mul(255).round().to(torch.uint8)

    encoder = EncoderEngine(network).eval()
    branches = []
    for stain in config.stains:
        branches.append((BranchEngine(network, "images", stain, graphs.sigmas).eval(), "NOISE"))
        branches.append((BranchEngine(network, "cells", stain, [config.sigma_max]).eval(), "NOISE_CELLS"))

    @torch.inference_mode()
    def folded(inputs: Arrays) -> None:
        features = encoder(torch.from_numpy(inputs["HE"]))
        for branch, noise in branches:
            branch(*features, torch.from_numpy(inputs[noise]))

    return eager, folded


def _peaks(folder: Path, threads: int) -> tuple[dict[str, Callable[[], object]], float]:
    """One large convolution in ONNX Runtime and in torch, and its floating-point operations."""
    import torch

    shape = (PEAK_BATCH, PEAK_CHANNELS, PEAK_SIZE, PEAK_SIZE)
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape, dtype=np.float32)
    weight = rng.standard_normal((PEAK_CHANNELS, PEAK_CHANNELS, 3, 3), dtype=np.float32)
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])
    graph = helper.make_graph([node], "peak", tensors[:1], tensors[1:], [numpy_helper.from_array(weight, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, folder / "peak.onnx")
    engine = OnnxRuntimeEngine(folder / "peak.onnx", threads=threads)
    torch_x, torch_weight = torch.from_numpy(x), torch.from_numpy(weight)

    @torch.inference_mode()
    def in_torch() -> object:
        return torch.nn.functional.conv2d(torch_x, torch_weight, padding=1)

    flops = 2.0 * weight.size * PEAK_SIZE**2 * PEAK_BATCH
    return {"peak onnxruntime": lambda: engine.run({"x": x}, ["y"]), "peak torch": in_torch}, flops
