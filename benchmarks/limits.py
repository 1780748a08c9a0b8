"""The physical limit of this machine: one large convolution, and one product of matrices, in its fastest library."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from staindiffuser.export.description import INT8
from staindiffuser.triton_models.engine.engine_onnxruntime import OnnxRuntimeEngine

__all__ = ["PEAK", "peak_sides"]

_CHANNELS, _SIZE, _BATCH, _MATRIX = 256, 64, 4, 1024
PEAK = (
    f"3x3 convolution, {_CHANNELS} to {_CHANNELS} channels, {_SIZE} px, batch {_BATCH}; product of two {_MATRIX} x "
    f"{_MATRIX} matrices; the best of the libraries here"
)


def peak_sides(folder: Path, threads: int) -> tuple[dict[str, Callable[[], object]], dict[str, tuple[str, float]]]:
    """Sides to time (needs torch).

    Args:
        folder: where the graph of the convolution is written.
        threads: of each library.

    Returns:
        Side to what runs; side to operation with precision, such as ``convolution bf16``, and its number of operations.
    """
    import torch

    rng = np.random.default_rng(0)
    shape = (_BATCH, _CHANNELS, _SIZE, _SIZE)
    x = rng.standard_normal(shape, dtype=np.float32)
    weight = rng.standard_normal((_CHANNELS, _CHANNELS, 3, 3), dtype=np.float32)
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])
    graph = helper.make_graph([node], "peak", tensors[:1], tensors[1:], [numpy_helper.from_array(weight, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, folder / "peak.onnx")
    flops = 2.0 * weight.size * _SIZE**2 * _BATCH
    engine = OnnxRuntimeEngine(folder / "peak.onnx", threads=threads)
    sides: dict[str, Callable[[], object]] = {"peak onnxruntime": lambda: engine.run({"x": x}, ["y"])}
    operations = {"peak onnxruntime": ("convolution fp32", flops)}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        image = torch.from_numpy(x).to(dtype).contiguous(memory_format=torch.channels_last)
        kernel = torch.from_numpy(weight).to(dtype).contiguous(memory_format=torch.channels_last)
        matrix = torch.from_numpy(rng.standard_normal((_MATRIX, _MATRIX), dtype=np.float32)).to(dtype)
        side = f"peak torch {precision}"
        sides[side] = lambda i=image, k=kernel: torch.nn.functional.conv2d(i, k, padding=1)  # type: ignore[misc]
        operations[side] = (f"convolution {precision}", flops)
        sides[f"{side} matrix"] = lambda m=matrix: m @ m  # type: ignore[misc]
        operations[f"{side} matrix"] = (f"matrix {precision}", 2.0 * _MATRIX**3)
    eight = _eight_bits(model, x, weight)
    for precision in _openvino_precisions():
        from staindiffuser.triton_models.engine import engine_openvino

        path = folder / f"peak {precision}.onnx"
        marked = eight if precision == INT8 else onnx.load(folder / "peak.onnx")
        marked.metadata_props.add(key=engine_openvino.PRECISION, value=precision)
        onnx.save(marked, path)
        loaded = engine_openvino.load(path, threads=threads)
        sides[f"peak openvino {precision}"] = lambda loaded=loaded: loaded.run({"x": x}, ["y"])  # type: ignore[misc]
        operations[f"peak openvino {precision}"] = (f"convolution {precision}", flops)
    return sides, operations


def _eight_bits(model: onnx.ModelProto, x: npt.NDArray[np.float32], weight: npt.NDArray[np.float32]) -> onnx.ModelProto:
    """The convolution in 8 bits; it reads and writes floats, as one between two layers that stayed in float does."""
    graph = model.graph
    step = np.abs(weight).max(axis=(1, 2, 3)) / 127
    rounded = np.round(weight / step[:, None, None, None]).astype(np.int8)
    constants = {
        "x.step": np.array(np.abs(x).max() / 127, np.float32),
        "zero": np.array(0, np.int8),
        "w.8": rounded,
        "w.step": step.astype(np.float32),
        "w.zero": np.zeros(len(step), np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x.step", "zero"], ["x.8"]),
        helper.make_node("DequantizeLinear", ["x.8", "x.step", "zero"], ["x.float"]),
        helper.make_node("DequantizeLinear", ["w.8", "w.step", "w.zero"], ["w.float"], axis=0),
        helper.make_node("Conv", ["x.float", "w.float"], ["y"], pads=[1, 1, 1, 1]),
    ]
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    return helper.make_model(
        helper.make_graph(nodes, "peak", graph.input, graph.output, tensors),
        opset_imports=model.opset_import,
        ir_version=model.ir_version,
    )


def _openvino_precisions() -> list[str]:
    try:
        importlib.metadata.version("openvino")
    except importlib.metadata.PackageNotFoundError:
        return []
    from staindiffuser.triton_models.engine import engine_openvino

    return [precision for precision in ("fp32", "bf16", INT8) if engine_openvino.computes(precision)]
