"""Runs a TensorRT or TensorRT-RTX plan on one GPU, with memory from CuPy and DLPack tensors to and from Triton.

Copied beside ``model.py`` into the model repository; imports nothing of the project. No GPU has run this file yet. It
uses only what TensorRT 10.16, 11.4 and RTX have in common, which the tests check against their bindings.

Each optimisation profile has its own execution context, and a batch runs in the first profile that admits it. All work
goes to the engine's own stream, which first waits for the caller's stream.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import cupy
import numpy as np

__all__ = ["TensorRTEngine", "load"]


def runtime_module(path: Path) -> Any:
    """``tensorrt`` for ``.plan`` files, TensorRT-RTX for ``.rtx`` files; the bindings package alone is enough.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    name = "tensorrt_rtx" if path.suffix == ".rtx" else "tensorrt"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return importlib.import_module(f"{name}_bindings")


class TensorRTEngine:
    """One plan on one stream, with one execution context per optimisation profile."""

    def __init__(self, path: Path, *, device: int) -> None:
        self._trt = trt = runtime_module(path)
        self._device = cupy.cuda.Device(device)
        self._logger = trt.Logger(trt.Logger.WARNING)
        with self._device:
            self._stream = cupy.cuda.Stream(non_blocking=True)
            self._runtime = trt.Runtime(self._logger)
            self._runtime.engine_host_code_allowed = True  # version-compatible plans contain their own runtime
            self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
            if self._engine is None:
                raise RuntimeError(f"{path.name} was not built for this GPU and {trt.__name__} {trt.__version__}")
            weights = path.with_name("weights.onnx")
            if weights.is_file():
                self._refit(path, weights)
            names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
            self._dtypes = {name: trt.nptype(self._engine.get_tensor_dtype(name)) for name in names}
            self._inputs = [n for n in names if self._engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
            self._outputs = [n for n in names if n not in self._inputs]
            self._contexts = [self._new_context(path, i) for i in range(self._engine.num_optimization_profiles)]
            self._stream.synchronize()

    def receive(self, tensor: Any) -> Any:
        """Copy a NumPy array to the GPU, or take a DLPack object without copying; ordered by our stream."""
        with self._device:
            # The caller's stream may still be writing the array.
            self._stream.wait_event(cupy.cuda.get_current_stream().record())
            with self._stream:
                if isinstance(tensor, cupy.ndarray):
                    return tensor
                return cupy.asarray(tensor) if isinstance(tensor, np.ndarray) else cupy.from_dlpack(tensor)

    def join(self, arrays: list[Any]) -> Any:
        """Concatenate received arrays along the batch."""
        if len(arrays) == 1:
            return arrays[0]
        with self._device, self._stream:
            return cupy.concatenate(arrays)

    def run(self, inputs: dict[str, Any], outputs: list[str]) -> dict[str, Any]:
        """Run one batch of CuPy or NumPy arrays; returns CuPy arrays, and the work has finished.

        Raises:
            RuntimeError: a shape is outside the plan's profiles, or the launch failed.
        """
        context = self._context(len(inputs[self._inputs[0]]))
        received = {name: self.receive(inputs[name]) for name in self._inputs}
        with self._device, self._stream:
            # Kept until the plan has run: the pool could hand freed input memory to an output.
            held = {n: cupy.ascontiguousarray(cupy.asarray(a, dtype=self._dtypes[n])) for n, a in received.items()}
            results = self._enqueue(context, held)
            self._stream.synchronize()  # Triton does not know our stream
        return {name: results[name] for name in outputs}

    def close(self) -> None:
        """Release contexts, plan and runtime, in that order."""
        self._contexts = []
        self._engine = self._runtime = None

    def _enqueue(self, context: Any, held: dict[str, Any]) -> dict[str, Any]:
        for name, array in held.items():
            if not context.set_input_shape(name, tuple(array.shape)):
                raise RuntimeError(f"{name}: shape {array.shape} is outside the plan's profile")
        results = {
            name: cupy.empty(tuple(context.get_tensor_shape(name)), dtype=self._dtypes[name]) for name in self._outputs
        }
        for name, array in {**held, **results}.items():
            if not context.set_tensor_address(name, array.data.ptr):
                raise RuntimeError(f"the plan has no tensor {name}")
        if not context.execute_async_v3(self._stream.ptr):
            raise RuntimeError("TensorRT could not enqueue the plan: see the server's log")
        return results

    def _context(self, batch: int) -> Any:
        for smallest, largest, context in self._contexts:
            if smallest <= batch <= largest:
                return context
        raise RuntimeError(f"a batch of {batch} is outside the plan's profiles")

    def _new_context(self, path: Path, profile: int) -> tuple[int, int, Any]:
        """The smallest and largest batch of an optimisation profile, and a context for it."""
        smallest, _, largest = self._engine.get_tensor_profile_shape(self._inputs[0], profile)
        context = self._engine.create_execution_context()
        if context is None or not context.set_optimization_profile_async(profile, self._stream.ptr):
            raise RuntimeError(f"{path.name}: no context for optimisation profile {profile}: out of GPU memory?")
        return smallest[0], largest[0], context

    def _refit(self, path: Path, weights: Path) -> None:
        """Restore the weights of a weight-stripped plan."""
        refitter = self._trt.Refitter(self._engine, self._logger)
        parser = self._trt.OnnxParserRefitter(refitter, self._logger)
        # The parser only sets the weights on the refitter; the second call applies them to the engine.
        if not (parser.refit_from_file(str(weights)) and refitter.refit_cuda_engine()):
            raise RuntimeError(f"{path.name}: the weights in {weights.name} do not fit the plan")


def load(path: Path, *, threads: int = 0, device: int = 0) -> TensorRTEngine:
    """Load a plan on a GPU; ``threads`` is for the runners of CPU engines."""
    del threads
    return TensorRTEngine(path, device=device)
