"""A TensorRT plan on one GPU: TensorRT's Python runtime, memory from CuPy, DLPack at the border to Triton.

Copied beside ``model.py`` into the model repository; imports nothing of the project. No machine with a GPU has run this
file yet: it is typed against TensorRT's 10.x and 11.x API (``execute_async_v3``, named tensors) and nothing more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cupy
import tensorrt as trt

__all__ = ["TensorRTEngine", "load"]


class TensorRTEngine:
    """One plan, one execution context, one stream."""

    def __init__(self, path: Path, *, device: int) -> None:
        self._device = cupy.cuda.Device(device)
        self._device.use()
        self._logger = trt.Logger(trt.Logger.WARNING)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise RuntimeError(f"{path.name} was not built for this GPU and TensorRT {trt.__version__}: build it again")
        self._context = self._engine.create_execution_context()
        self._stream = cupy.cuda.Stream(non_blocking=True)
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self._dtypes = {name: trt.nptype(self._engine.get_tensor_dtype(name)) for name in names}
        self._inputs = [n for n in names if self._engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self._outputs = [n for n in names if n not in self._inputs]

    def run(self, inputs: dict[str, Any], outputs: list[str]) -> dict[str, Any]:
        """Run one batch of CuPy arrays (NumPy arrays are copied to the GPU); returns CuPy arrays.

        Raises:
            RuntimeError: a shape is outside the plan's profile, or the launch failed.
        """
        self._device.use()
        # The inputs were written on another stream, which Triton has already waited for; ours only needs the order.
        with self._stream:
            held = {n: cupy.ascontiguousarray(cupy.asarray(inputs[n], dtype=self._dtypes[n])) for n in self._inputs}
            for name, array in held.items():
                if not self._context.set_input_shape(name, array.shape):
                    raise RuntimeError(f"{name}: shape {array.shape} is outside the plan's profile")
                self._context.set_tensor_address(name, array.data.ptr)
            results: dict[str, Any] = {}
            for name in self._outputs:
                shape = tuple(self._context.get_tensor_shape(name))
                results[name] = cupy.empty(shape, dtype=self._dtypes[name])
                self._context.set_tensor_address(name, results[name].data.ptr)
            if not self._context.execute_async_v3(self._stream.ptr):
                raise RuntimeError("TensorRT could not enqueue the plan: see the server's log")
        self._stream.synchronize()  # Triton reads the outputs without knowing our stream
        return {name: results[name] for name in outputs}

    def close(self) -> None:
        """Free context, plan and runtime, in that order."""
        self._context = self._engine = self._runtime = None


def load(path: Path, *, threads: int = 0, device: int = 0) -> TensorRTEngine:
    """Load a plan on a GPU; ``threads`` belongs to the runners of CPU engines."""
    del threads
    return TensorRTEngine(path, device=device)
