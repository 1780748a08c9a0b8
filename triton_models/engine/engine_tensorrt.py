"""A TensorRT or TensorRT-RTX plan on one GPU: the Python runtime, memory from CuPy, DLPack at the border to Triton.

Copied beside ``model.py`` into the model repository; imports nothing of the project. No machine with a GPU has run this
file yet: it uses what TensorRT 10, 11 and RTX have in common (``execute_async_v3``, named tensors) and nothing more.

A plan with several optimisation profiles has one execution context each; a batch runs in the first that takes it.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import cupy

__all__ = ["TensorRTEngine", "load"]


def runtime_module(path: Path) -> Any:
    """``tensorrt`` for ``.plan`` files, TensorRT-RTX for ``.rtx`` files."""
    if path.suffix != ".rtx":
        return importlib.import_module("tensorrt")
    try:
        return importlib.import_module("tensorrt_rtx")
    except ModuleNotFoundError:
        return importlib.import_module("tensorrt_rtx_bindings")


class TensorRTEngine:
    """One plan, one stream, one execution context a profile."""

    def __init__(self, path: Path, *, device: int) -> None:
        trt = runtime_module(path)
        self._device = cupy.cuda.Device(device)
        self._device.use()
        self._logger = trt.Logger(trt.Logger.WARNING)
        self._runtime = trt.Runtime(self._logger)
        if hasattr(self._runtime, "engine_host_code_allowed"):
            self._runtime.engine_host_code_allowed = True  # version-compatible plans bring their own runtime
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise RuntimeError(f"{path.name} was not built for this GPU and {trt.__name__} {trt.__version__}")
        weights = path.with_name("weights.onnx")
        if weights.is_file():  # a weight-stripped plan
            refitter = trt.OnnxParserRefitter(trt.Refitter(self._engine, self._logger), self._logger)
            if not refitter.refit_from_file(str(weights)):
                raise RuntimeError(f"{path.name}: the weights in {weights.name} do not fit the plan")
        self._stream = cupy.cuda.Stream(non_blocking=True)
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self._dtypes = {name: trt.nptype(self._engine.get_tensor_dtype(name)) for name in names}
        self._inputs = [n for n in names if self._engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self._outputs = [n for n in names if n not in self._inputs]
        self._contexts: list[tuple[int, int, Any]] = []
        for index in range(self._engine.num_optimization_profiles):
            smallest, _, largest = self._engine.get_tensor_profile_shape(self._inputs[0], index)
            context = self._engine.create_execution_context()
            context.set_optimization_profile_async(index, self._stream.ptr)
            self._contexts.append((smallest[0], largest[0], context))
        self._stream.synchronize()

    def run(self, inputs: dict[str, Any], outputs: list[str]) -> dict[str, Any]:
        """Run one batch of CuPy arrays (NumPy arrays are copied to the GPU); returns CuPy arrays.

        Raises:
            RuntimeError: a shape is outside the plan's profiles, or the launch failed.
        """
        self._device.use()
        context = self._context(len(inputs[self._inputs[0]]))
        # The inputs were written on another stream, which Triton has already waited for; ours only needs the order.
        with self._stream:
            held = {n: cupy.ascontiguousarray(cupy.asarray(inputs[n], dtype=self._dtypes[n])) for n in self._inputs}
            for name, array in held.items():
                if not context.set_input_shape(name, array.shape):
                    raise RuntimeError(f"{name}: shape {array.shape} is outside the plan's profile")
                context.set_tensor_address(name, array.data.ptr)
            results: dict[str, Any] = {}
            for name in self._outputs:
                shape = tuple(context.get_tensor_shape(name))
                results[name] = cupy.empty(shape, dtype=self._dtypes[name])
                context.set_tensor_address(name, results[name].data.ptr)
            if not context.execute_async_v3(self._stream.ptr):
                raise RuntimeError("TensorRT could not enqueue the plan: see the server's log")
        self._stream.synchronize()  # Triton reads the outputs without knowing our stream
        return {name: results[name] for name in outputs}

    def close(self) -> None:
        """Free contexts, plan and runtime, in that order."""
        self._contexts = []
        self._engine = self._runtime = None

    def _context(self, batch: int) -> Any:
        for smallest, largest, context in self._contexts:
            if smallest <= batch <= largest:
                return context
        raise RuntimeError(f"a batch of {batch} is outside the plan's profiles")


def load(path: Path, *, threads: int = 0, device: int = 0) -> TensorRTEngine:
    """Load a plan on a GPU; ``threads`` belongs to the runners of CPU engines."""
    del threads
    return TensorRTEngine(path, device=device)
