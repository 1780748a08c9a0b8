"""A repository whose engines do nothing, with the tensors of a real one: what is left is the server's own cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from staindiffuser.export.builders import BuildOptions
from staindiffuser.export.description import QUALITY, EngineGraph, GraphSet
from staindiffuser.export.manifest import EngineRecord, Manifest
from staindiffuser.export.repository import build
from staindiffuser.export.wire import wire_outputs
from staindiffuser.files import file_sha256

__all__ = ["build_idle"]


def build_idle(manifest: Manifest, folder: Path, *, flavour: str, max_batch: int = 1) -> Path:
    """Build a repository of engines that give zeros, by ONNX Runtime; returns its folder.

    Args:
        manifest: of the real repository, whose tensors they read and give; what judges tiles is left out.
        folder: where graphs and repository are written.
        flavour: of the repository.
        max_batch: of the repository.

    Raises:
        StainDiffuserError: see :func:`staindiffuser.export.repository.build`.
    """
    graphs = folder / "graphs"
    graphs.mkdir(parents=True)
    engines = {
        name: _idle(graphs, name, record) for name, record in manifest.engines.items() if not name.startswith(QUALITY)
    }
    described = GraphSet(
        name="idle",
        notice="Engines that do nothing: these images mean nothing.",
        checkpoint_sha256=manifest.checkpoint_sha256,
        tile=manifest.tile,
        margin=manifest.margin,
        mpp=manifest.mpp,
        steps=manifest.steps,
        sigmas=manifest.sigmas,
        precision="fp32",
        stains=manifest.stains,
        engines=engines,
        golden_sha256="",
    )
    golden: dict[str, np.ndarray[Any, Any]] = {
        "HE": np.zeros((1, manifest.tile, manifest.tile, 3), np.uint8),
        "ORIGIN": np.zeros((1, 2), np.int64),
        "SEED": np.zeros((1, 1), np.int64),
        **{spec.name: np.zeros((1, *spec.shape), spec.dtype) for spec in wire_outputs(described)},
    }
    np.savez_compressed(graphs / described.golden, **golden)
    GraphSet(**{**vars(described), "golden_sha256": file_sha256(graphs / described.golden)}).save(graphs)
    options = BuildOptions(max_batch=max_batch, threads=1)
    return build(graphs, folder / "repository", flavour=flavour, options=options).repository


def _idle(folder: Path, name: str, record: EngineRecord) -> EngineGraph:
    """A graph with an engine's tensors, whose outputs are zeros of the batch's length."""
    nodes = [
        helper.make_node("Shape", [record.inputs[0].name], ["batch"], start=0, end=1),
    ]
    constants = []
    for index, spec in enumerate(record.outputs):
        dtype = helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype))
        constants.append(helper.make_tensor(f"rest{index}", TensorProto.INT64, [len(spec.shape)], spec.shape))
        nodes.append(helper.make_node("Concat", ["batch", f"rest{index}"], [f"shape{index}"], axis=0))
        zero = helper.make_tensor("value", dtype, [1], [0])
        nodes.append(helper.make_node("ConstantOfShape", [f"shape{index}"], [spec.name], value=zero))
    inputs, outputs = (
        [
            helper.make_tensor_value_info(t.name, helper.np_dtype_to_tensor_dtype(np.dtype(t.dtype)), ["B", *t.shape])
            for t in tensors
        ]
        for tensors in (record.inputs, record.outputs)
    )
    graph = helper.make_graph(nodes, name, inputs, outputs, constants)
    path = folder / f"{name}.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return EngineGraph(
        file=path.name,
        graph_sha256=file_sha256(path),
        weights_sha256="0" * 64,
        inputs=record.inputs,
        outputs=record.outputs,
    )
