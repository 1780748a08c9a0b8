"""Runs an ONNX graph with torch. On a GPU each batch size is captured once as a CUDA graph and then replayed.

Copied beside ``model.py`` into the model repository; imports nothing of the project. The engine file is the ONNX graph
itself, and torch executes its operators one by one: what runs is exactly what was hashed, and no pickle is loaded. On a
CPU (tests, comparisons) the same program runs without capture. No GPU has run this file yet.

TF32 is off, as in the TensorRT plans, because results are compared with float32. On a GPU, half-precision convolutions
use channels-last weights, the layout that NVIDIA and PyTorch recommend for tensor cores; ``make verify-gpu`` measures
both layouts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor
from torch.nn import functional as F

__all__ = ["GraphProgram", "TorchEngine", "load"]

_WARM_UPS = 3
_MOST_CAPTURED = 8
"""Number of batch sizes that are captured, since each captured graph keeps its memory; others run uncaptured."""
_DTYPES = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
    onnx.TensorProto.UINT8: torch.uint8,
    onnx.TensorProto.INT64: torch.int64,
}


def _shuffle(x: Tensor, size: int, mode: bytes) -> Tensor:
    if mode == b"CRD":
        return F.pixel_shuffle(x, size)
    b, c, h, w = x.shape
    x = x.view(b, size, size, c // size**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(b, c // size**2, h * size, w * size)


def _unshuffle(x: Tensor, size: int) -> Tensor:
    b, c, h, w = x.shape
    x = x.view(b, c, h // size, size, w // size, size).permute(0, 3, 5, 1, 2, 4)
    return x.reshape(b, c * size**2, h // size, w // size)


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, **attributes: Any) -> Tensor:
    top, left, bottom, right = attributes.get("pads", (0, 0, 0, 0))
    if attributes.get("auto_pad", b"NOTSET") != b"NOTSET":
        raise ValueError("only explicit padding is known")
    if (top, left) != (bottom, right):  # as the backbone pads; conv2d pads both sides alike
        x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
    return F.conv2d(
        x,
        weight,
        bias,
        stride=attributes.get("strides", (1, 1)),
        padding=(top, left),
        dilation=attributes.get("dilations", (1, 1)),
        groups=attributes.get("group", 1),
    )


def _resize(x: Tensor, roi: Any, scales: list[float], **attributes: Any) -> Tensor:
    if attributes.get("mode") != b"nearest":
        raise ValueError("only nearest-neighbour resizing is known")
    return F.interpolate(x, scale_factor=tuple(scales[2:]), mode="nearest")


def _split(x: Tensor, sizes: list[int] | None = None, *, axis: int = 0, num_outputs: int = 0) -> tuple[Tensor, ...]:
    return torch.split(x, sizes if sizes is not None else -(-x.shape[axis] // num_outputs), axis)


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "Add": torch.add,
    "AveragePool": lambda x, **a: F.avg_pool2d(x, a["kernel_shape"], a["strides"]),
    "Cast": lambda x, to: x.to(_DTYPES[to]),
    "Clip": lambda x, low, high: x.clamp(low, high),
    "Concat": lambda *x, axis: torch.cat(x, axis),
    "Conv": _conv,
    "DepthToSpace": lambda x, blocksize, mode=b"DCR": _shuffle(x, blocksize, mode),
    "Div": torch.div,
    "Gather": lambda x, index, axis=0: x.select(axis, index),
    "GreaterOrEqual": torch.ge,
    "Identity": lambda x: x,
    "Log": torch.log,
    "MatMul": torch.matmul,
    "Max": torch.maximum,
    "Mul": torch.mul,
    "ReduceMax": lambda x, axes, keepdims=1: x.amax(axes, bool(keepdims)),
    "ReduceMin": lambda x, axes, keepdims=1: x.amin(axes, bool(keepdims)),
    "ReduceSum": lambda x, axes, keepdims=1: x.sum(axes, bool(keepdims)),
    "Relu": torch.relu,
    "Reshape": lambda x, shape: x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(shape)]),
    "Resize": _resize,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Split": _split,
    "SpaceToDepth": lambda x, blocksize: _unshuffle(x, blocksize),
    "Pow": torch.pow,
    "Sqrt": torch.sqrt,
    "Sub": torch.sub,
    "Transpose": lambda x, perm: x.permute(perm),
}
_CONSTANT_INPUTS = {
    "Split": (1,), "Reshape": (1,), "Resize": (2,), "Gather": (1,), "Clip": (1, 2),
    "ReduceMax": (1,), "ReduceMin": (1,), "ReduceSum": (1,),
}  # fmt: skip
"""Inputs that torch needs as Python numbers; they must be constants of the graph."""


class GraphProgram(torch.nn.Module):
    """An ONNX graph as a torch module; inputs in the graph's order.

    Raises:
        ValueError: the graph has an unsupported operator.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._layout = torch.contiguous_format
        graph = onnx.load(path).graph
        self.inputs = [value.name for value in graph.input]
        self.outputs = [value.name for value in graph.output]
        weights: dict[str, Tensor] = {}
        for tensor in graph.initializer:
            array = numpy_helper.to_array(tensor)
            if array.dtype.name == "bfloat16":  # NumPy knows the bits, not the type
                weights[tensor.name] = torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
            else:
                weights[tensor.name] = torch.from_numpy(array.copy())
        self._steps: list[tuple[Callable[..., Any], list[Any], dict[str, Any], list[str]]] = []
        for node in graph.node:
            operation = _OPERATIONS.get(node.op_type)
            if operation is None:
                raise ValueError(f"{path.name}: operator {node.op_type} is not supported")
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            if node.op_type == "Cast" and node.input[0] in weights:
                weights[node.output[0]] = operation(weights[node.input[0]], **attributes)
                continue
            constant = _CONSTANT_INPUTS.get(node.op_type, ())
            arguments = [(weights[n].tolist() if i in constant else n) if n else None for i, n in enumerate(node.input)]
            self._steps.append((operation, arguments, attributes, list(node.output)))
        used = {argument for _, arguments, _, _ in self._steps for argument in arguments if isinstance(argument, str)}
        # Parameter names may not hold dots.
        self._weights = {name: f"weight_{index}" for index, name in enumerate(sorted(used & set(weights)))}
        for name, attribute in self._weights.items():
            self.register_buffer(attribute, weights[name])
        last = {name: i for i, step in enumerate(self._steps) for name in step[1] if isinstance(name, str)}
        self._free = [[n for n in last if last[n] == i and n not in self.outputs] for i in range(len(self._steps))]

    @property
    def half_precision(self) -> bool:
        """Whether every convolution computes in half precision."""
        return {buffer.dtype for buffer in self.buffers() if buffer.ndim == 4} <= {torch.float16, torch.bfloat16}

    def channels_last(self) -> None:
        """Use channels-last memory for convolution weights and activations; the values stay the same."""
        self._layout = torch.channels_last
        for name, buffer in list(self.named_buffers()):
            setattr(self, name, self._laid_out(buffer))

    def _laid_out(self, tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=self._layout) if tensor.ndim == 4 else tensor

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the graph."""
        # A uint8 tile [B, H, W, 3] is channels-last already.
        arranged = (x if x.dtype == torch.uint8 else self._laid_out(x) for x in inputs)
        values = dict(zip(self.inputs, arranged, strict=True))
        values.update({name: getattr(self, attribute) for name, attribute in self._weights.items()})
        for (operation, arguments, attributes, outputs), free in zip(self._steps, self._free, strict=True):
            result = operation(*(values[a] if isinstance(a, str) else a for a in arguments), **attributes)
            values.update(zip(outputs, result if isinstance(result, tuple) else (result,), strict=True))
            for name in free:
                values.pop(name, None)
        return tuple(values[name].contiguous() for name in self.outputs)


class _Captured:
    """The CUDA graph of one batch size, with its static input and output tensors."""

    def __init__(self, program: GraphProgram, inputs: list[Tensor]) -> None:
        self.inputs = [tensor.clone() for tensor in inputs]
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # cuDNN chooses its algorithms before the capture
            for _ in range(_WARM_UPS):
                program(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = program(*self.inputs)

    def run(self, inputs: list[Tensor]) -> list[Tensor]:
        for held, tensor in zip(self.inputs, inputs, strict=True):
            held.copy_(tensor)
        self.graph.replay()
        return [tensor.clone() for tensor in self.outputs]


class TorchEngine:
    """One graph on one device.

    Args:
        path: the ONNX file.
        threads: torch's CPU threads; 0 keeps torch's default.
        device: GPU index; ignored without a GPU.
        channels_last: memory layout; by default channels-last for half precision on a GPU.
        capture: on a GPU, capture and replay a CUDA graph for each batch size.
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int = 0,
        device: int = 0,
        channels_last: bool | None = None,
        capture: bool = True,
    ) -> None:
        self._cuda = torch.cuda.is_available()
        self._device = torch.device("cuda", device) if self._cuda else torch.device("cpu")
        if not self._cuda and threads:
            torch.set_num_threads(threads)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        self._program = GraphProgram(path).to(self._device).eval()
        if channels_last or (channels_last is None and self._cuda and self._program.half_precision):
            self._program.channels_last()
        self._most_captured = _MOST_CAPTURED if self._cuda and capture else 0
        self._captured: dict[int, _Captured] = {}

    def receive(self, tensor: Any) -> Tensor:
        """Convert a NumPy array, a torch tensor or a DLPack object to a tensor on the engine's device."""
        with self._current():
            if isinstance(tensor, Tensor):
                return tensor.to(self._device)
            if isinstance(tensor, np.ndarray):
                # Triton's arrays may be read-only; torch never writes to its inputs.
                return torch.from_numpy(tensor if tensor.flags.writeable else tensor.copy()).to(self._device)
            shared: Tensor = torch.utils.dlpack.from_dlpack(tensor)
            return shared.to(self._device)

    def join(self, arrays: list[Any]) -> Tensor:
        """Concatenate received tensors along the batch."""
        with self._current():
            return arrays[0] if len(arrays) == 1 else torch.cat(arrays)

    @torch.inference_mode()
    def run(self, inputs: dict[str, Any], outputs: list[str]) -> dict[str, Any]:
        """Run one batch of tensors or arrays, batch dimension first.

        Returns:
            NumPy arrays, or on a GPU torch tensors; the work has finished.
        """
        with self._current():
            tensors = [self.receive(inputs[name]) for name in self._program.inputs]
            batch = len(tensors[0])
            if batch not in self._captured and len(self._captured) < self._most_captured:
                self._captured[batch] = _Captured(self._program, tensors)
            captured = self._captured.get(batch)
            results = captured.run(tensors) if captured else list(self._program(*tensors))
            if self._cuda:
                torch.cuda.current_stream().synchronize()  # Triton does not know our stream
        named = dict(zip(self._program.outputs, results, strict=True))
        return {name: named[name] if self._cuda else named[name].numpy() for name in outputs}

    def close(self) -> None:
        """Release captured graphs and weights."""
        self._captured.clear()
        del self._program
        if self._cuda:
            torch.cuda.empty_cache()

    def _current(self) -> contextlib.AbstractContextManager[Any]:
        """Make the engine's GPU current: streams, graphs and memory are created on the current GPU."""
        return torch.cuda.device(self._device) if self._cuda else contextlib.nullcontext()


def load(path: Path, *, threads: int = 0, device: int = 0) -> TorchEngine:
    """Load a graph on a GPU, or on the CPU if there is none."""
    return TorchEngine(path, threads=threads, device=device)
