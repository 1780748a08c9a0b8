"""Graphs of any size with random weights: the tensors of the real ones, without a checkpoint and without torch.

They measure what the server adds to engines of a given cost, and let tests build and serve a repository in a second.
Their images mean nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from staindiffuser.export.description import EngineGraph, ExportedStain, GraphSet, TensorSpec
from staindiffuser.export.parity import run_pipeline
from staindiffuser.files import file_sha256
from staindiffuser.triton_models.engine.engine_onnxruntime import OnnxRuntimeEngine

__all__ = ["write_graphs"]

Weights = np.ndarray[Any, Any]
DEFAULT_STAINS = (ExportedStain(name="cd3", label="CD3"), ExportedStain(name="ck818", label="CK8/18"))


def write_graphs(
    folder: Path,
    *,
    tile: int = 64,
    channels: Sequence[int] = (8, 12, 16, 24),
    depth: int = 1,
    steps: int = 2,
    stains: Sequence[ExportedStain] = DEFAULT_STAINS,
    samples: int = 3,
    seed: int = 0,
    noisy: Sequence[str] = ("stain", "cells"),
) -> GraphSet:
    """Write a graphs folder.

    Args:
        folder: created if it does not exist.
        tile: height and width, pixels, a multiple of 16.
        channels: of the four feature levels.
        depth: 3 x 3 convolutions at half resolution in every branch and step, which set its cost.
        steps: k.
        stains: what is painted.
        samples: golden samples, whose outputs are ONNX Runtime's own at batch 1.
        seed: of weights and golden samples. A stain's weights depend on its name too, not on the other stains.
        noisy: kinds of branches that read noise; the others take one step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    features = tuple(
        TensorSpec(name=f"FEATURES_{level}", dtype="float16", shape=(c, tile >> (level + 1), tile >> (level + 1)))
        for level, c in enumerate(channels)
    )
    engines = {"he_encoder": _encoder(folder, tile, features, seed)}
    for stain in stains:
        for kind, planes, drawn in (
            ("stain", 3, TensorSpec(name="NOISE", dtype="float16", shape=(steps, 3, tile, tile))),
            ("cells", 1, TensorSpec(name="NOISE_CELLS", dtype="float16", shape=(1, tile, tile))),
        ):
            output = TensorSpec(name=f"{kind}_{stain.name}".upper(), dtype="uint8", shape=(tile, tile, planes))
            name = f"{kind}_{stain.name}"
            engines[name] = _branch(folder, name, features, drawn if kind in noisy else None, output, depth, seed)
    graphs = GraphSet(
        name="synthetic",
        notice="Random weights: these images mean nothing.",
        checkpoint_sha256=hashlib.sha256(str(seed).encode()).hexdigest(),
        tile=tile,
        margin=tile // 8,
        mpp=0.5,
        steps=steps,
        sigmas=(80.0, 1.5, 0.7, 0.3)[:steps],
        precision="fp32",
        stains=tuple(stains),
        engines=engines,
        golden_sha256=_golden(folder, tile, steps, stains, engines, samples, seed),
    )
    graphs.save(folder)
    return graphs


@dataclass
class _Graph:
    """Nodes and weights of a graph that is being written."""

    generator: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def constant(self, array: Weights) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def conv(self, x: str, inputs: int, outputs: int, size: int = 3, stride: int = 1, gain: float = 1.4) -> str:
        scale = gain / np.sqrt(inputs * size * size)
        weights = (self.generator.standard_normal((outputs, inputs, size, size)) * scale).astype(np.float32)
        pad = size // 2
        return self.add("Conv", x, self.constant(weights), pads=[pad] * 4, strides=[stride] * 2)

    def relu_conv(self, x: str, inputs: int, outputs: int, **options: Any) -> str:
        return self.add("Relu", self.conv(x, inputs, outputs, **options))

    def scaled(self, x: str, scale: float) -> str:
        return self.add("Mul", x, self.constant(np.array(scale, dtype=np.float32)))


def _encoder(folder: Path, tile: int, features: Sequence[TensorSpec], seed: int) -> EngineGraph:
    graph = _new_graph("he_encoder", seed)
    he = TensorSpec(name="HE", dtype="uint8", shape=(tile, tile, 3))
    x = graph.add("Transpose", graph.add("Cast", "HE", to=TensorProto.FLOAT), perm=[0, 3, 1, 2])
    x = graph.scaled(x, 1 / 255)
    before = 3
    for spec in features:
        x = graph.relu_conv(x, before, spec.shape[0], stride=2)
        before = spec.shape[0]
        graph.nodes.append(helper.make_node("Cast", [x], [spec.name], to=TensorProto.FLOAT16))
    return _save(folder, "he_encoder", graph, (he,), features)


def _branch(
    folder: Path,
    name: str,
    features: Sequence[TensorSpec],
    noise: TensorSpec | None,
    output: TensorSpec,
    depth: int,
    seed: int,
) -> EngineGraph:
    graph = _new_graph(name, seed)
    width, planes = features[0].shape[0], output.shape[2]
    total = ""
    for level, spec in enumerate(features):
        part = graph.conv(graph.add("Cast", spec.name, to=TensorProto.FLOAT), spec.shape[0], width, size=1)
        if level:
            scales = graph.constant(np.array([1, 1, 1 << level, 1 << level], dtype=np.float32))
            part = graph.add("Resize", part, "", scales, mode="nearest")
        total = graph.add("Add", total, part) if total else part
    drawn = graph.add("Cast", noise.name, to=TensorProto.FLOAT) if noise is not None else ""
    image = ""
    for step in range(noise.shape[0] if noise is not None and len(noise.shape) == 4 else 1):
        x = total
        if noise is not None:
            z = drawn
            if len(noise.shape) == 4:
                z = graph.add("Gather", drawn, graph.constant(np.array(step, dtype=np.int64)), axis=1)
            x = graph.add("Add", z, image) if image else z
            x = graph.conv(graph.add("SpaceToDepth", x, blocksize=2), planes * 4, width)
            x = graph.add("Add", total, graph.scaled(x, 0.2))
        for _ in range(depth):
            x = graph.relu_conv(x, width, width)
        image = graph.add("DepthToSpace", graph.conv(x, width, planes * 4), blocksize=2)
    x = graph.add("Round", graph.scaled(graph.add("Sigmoid", image), 255))
    x = graph.add("Transpose", x, perm=[0, 2, 3, 1])
    graph.nodes.append(helper.make_node("Cast", [x], [output.name], to=TensorProto.UINT8))
    return _save(folder, name, graph, (*features, *([noise] if noise is not None else [])), (output,))


def _new_graph(name: str, seed: int) -> _Graph:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return _Graph(np.random.default_rng(int.from_bytes(digest[:8], "little")))


def _save(
    folder: Path, name: str, graph: _Graph, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> EngineGraph:
    def info(spec: TensorSpec) -> onnx.ValueInfoProto:
        dtype = helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype))
        return helper.make_tensor_value_info(spec.name, dtype, ["B", *spec.shape])

    proto = helper.make_graph(graph.nodes, name, [info(s) for s in inputs], [info(s) for s in outputs], graph.weights)
    model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path = folder / f"{name}.onnx"
    onnx.save(model, path)
    weights = hashlib.sha256()
    for tensor in graph.weights:
        weights.update(tensor.raw_data)
    return EngineGraph(
        file=path.name,
        graph_sha256=file_sha256(path),
        weights_sha256=weights.hexdigest(),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
    )


def _golden(
    folder: Path,
    tile: int,
    steps: int,
    stains: Sequence[ExportedStain],
    engines: dict[str, EngineGraph],
    samples: int,
    seed: int,
) -> str:
    generator = np.random.default_rng(seed)
    inputs: dict[str, Weights] = {
        "HE": generator.integers(0, 255, (samples, tile, tile, 3), dtype=np.uint8),
        "ORIGIN": generator.integers(-8, 8, (samples, 2)) * 16,
        "SEED": generator.integers(0, 2**40, (samples, 1)),
    }
    loaded = {name: OnnxRuntimeEngine(folder / engine.file, threads=1) for name, engine in engines.items()}
    outputs: dict[str, list[Weights]] = {}
    for index in range(samples):
        one = {name: array[index : index + 1] for name, array in inputs.items()}
        for name, array in run_pipeline(loaded, engines, steps=steps, tile=tile, inputs=one)[1].items():
            outputs.setdefault(name, []).append(array)
    path = folder / "golden.npz"
    np.savez(path, **inputs, **{name: np.concatenate(parts) for name, parts in outputs.items()})
    return file_sha256(path)
