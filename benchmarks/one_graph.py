"""Encoder and branches in a single graph: what do the boundaries between them cost?

The product keeps them apart, because an ensemble then runs only what a request asks for. This is the comparison.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
from onnx import helper

from staindiffuser.export.description import EngineGraph
from staindiffuser.files import file_sha256

__all__ = ["join"]


def join(sources: Mapping[str, tuple[Path, EngineGraph]], names: Sequence[str], path: Path) -> EngineGraph:
    """Write one graph that computes what several compute one after another.

    Args:
        sources: file and description of each graph.
        names: which, the encoder first. Its features stay inside.
        path: the file to write.
    """
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []
    inputs: dict[str, onnx.ValueInfoProto] = {}
    outputs: dict[str, onnx.ValueInfoProto] = {}
    models = [_prefixed(onnx.load(sources[name][0]), f"{name}/") for name in names]
    for model in models:
        nodes += model.graph.node
        weights += model.graph.initializer
        inputs |= {tensor.name: tensor for tensor in model.graph.input}
        outputs |= {tensor.name: tensor for tensor in model.graph.output}
    inside = inputs.keys() & outputs.keys()
    taken, given = ([t for name, t in side.items() if name not in inside] for side in (inputs, outputs))
    graph = helper.make_graph(nodes, "one_graph", taken, given, weights)
    model = helper.make_model(graph, opset_imports=models[0].opset_import, ir_version=models[0].ir_version)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    described = [sources[name][1] for name in names]
    specs = {spec.name: spec for graph in described for spec in (*graph.inputs, *graph.outputs)}
    return EngineGraph(
        file=path.name,
        graph_sha256=file_sha256(path),
        weights_sha256="",
        inputs=tuple(specs[tensor.name] for tensor in taken),
        outputs=tuple(specs[tensor.name] for tensor in given),
    )


def _prefixed(model: onnx.ModelProto, prefix: str) -> onnx.ModelProto:
    """The model with other names for everything but its inputs and outputs, changed in place."""
    public = {tensor.name for tensor in (*model.graph.input, *model.graph.output)}

    def renamed(name: str) -> str:
        return name if not name or name in public else prefix + name

    for weight in model.graph.initializer:
        weight.name = renamed(weight.name)
    for node in model.graph.node:
        node.name = ""  # names of nodes must differ, and none are needed
        for tensors in (node.input, node.output):
            changed = [renamed(name) for name in tensors]
            del tensors[:]
            tensors.extend(changed)
    return model
