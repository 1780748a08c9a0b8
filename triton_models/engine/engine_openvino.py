"""Runs an engine with OpenVINO on the CPU: in the embedded server, and directly in parity checks and benchmarks.

The engine file is an ONNX graph. Its metadata name the precision in which it is computed, so that a file always runs as
it was checked: OpenVINO itself would silently widen bfloat16 on a processor that lacks it.

Copied beside ``model.py`` into the model repository; imports nothing of the project.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# On import, OpenVINO reports to its maker's server, without asking. It takes a stand-in where the reporting package is
# not installed.
if "openvino" not in sys.modules:
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
import openvino

if __package__:
    from staindiffuser.triton_models.shared.cpus import available_cpus
else:  # in a model repository, where the file lies beside this one
    from cpus import available_cpus  # type: ignore[no-redef]

__all__ = ["PRECISION", "JoinedEngines", "OpenVINOEngine", "computes", "load", "load_joined"]

PRECISION = "staindiffuser.precision"
"""Key of the graph's metadata: ``fp32``, ``bf16`` or ``int8``, which is bfloat16 where the graph does not quantise."""
_HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "bf16"}
_CAPABILITIES = {"fp32": {"FP32"}, "bf16": {"BF16"}, "int8": {"INT8", "BF16"}}
_MOST_COMPILED = 4
"""Sets of outputs for which joined engines stay compiled: each keeps its memory (ours)."""


class _SignalStack(ctypes.Structure):
    """``stack_t`` of Linux's signal.h."""

    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


_DISABLED = 2  # SS_DISABLE


@contextlib.contextmanager
def _signal_stack_kept() -> Iterator[None]:
    """Give the thread its alternate signal stack back: OpenVINO's CPU plugin sets its own, and frees it when it goes.

    Python's handlers run there; the next Ctrl-C or SIGTERM would end the process with a segmentation fault.
    """
    libc, before = ctypes.CDLL(None), _SignalStack()
    libc.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        if libc.sigaltstack(ctypes.byref(before), None):  # too small for what the plugin has the processor save
            libc.sigaltstack(ctypes.byref(_SignalStack(None, _DISABLED, 0)), None)


@_signal_stack_kept()
def computes(precision: str) -> bool:
    """Whether this processor has instructions for a precision: ``fp32``, ``bf16``, ``int8``."""
    return _CAPABILITIES[precision] <= set(openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


class OpenVINOEngine:
    """One ONNX graph, compiled for this processor."""

    @_signal_stack_kept()
    def __init__(self, path: Path, *, threads: int = 0) -> None:
        core = openvino.Core()
        model, precision = _read(core, path)
        self._request: Any = core.compile_model(model, "CPU", _settings(precision, threads)).create_infer_request()

    def receive(self, tensor: Any) -> np.ndarray[Any, Any]:
        """Return a NumPy array unchanged."""
        return np.asarray(tensor)

    def join(self, arrays: list[Any]) -> np.ndarray[Any, Any]:
        """Concatenate arrays along the batch."""
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    def run(self, inputs: dict[str, Any], outputs: list[str]) -> dict[str, Any]:
        """Run one batch of NumPy arrays, batch dimension first; returns the outputs named. One thread at a time."""
        results = self._request.infer(inputs, share_inputs=True)
        return {name: results[name] for name in outputs}

    def close(self) -> None:
        """Free the compiled graph."""
        self._request = None


class JoinedEngines:
    """Several graphs as one, in which what one gives and another reads never leaves the processor's own layout.

    A request computes only what its outputs need: each set of outputs is compiled when it is first asked for, and the
    :data:`_MOST_COMPILED` used last stay compiled. Tiles run one by one: a batch of four was no faster, and took three
    times the memory.
    """

    def __init__(self, paths: Sequence[Path], *, threads: int = 0) -> None:
        self._core = openvino.Core()
        self._inputs: dict[str, Any] = {}
        self._sources: dict[str, Any] = {}
        precisions = {self._add(path) for path in paths}
        if len(precisions) != 1:
            raise RuntimeError(f"engines of {' and '.join(sorted(precisions))} cannot be one graph")
        self._options = _settings(precisions.pop(), threads)
        self._request = functools.lru_cache(_MOST_COMPILED)(self._compile)

    def run(self, inputs: dict[str, Any], outputs: list[str]) -> dict[str, Any]:
        """Run one batch of NumPy arrays, batch dimension first; returns the outputs named. One thread at a time.

        Args:
            inputs: those that the outputs need, and no others.
            outputs: of any of the graphs.
        """
        request = self._request(frozenset(inputs), frozenset(outputs))
        count = len(next(iter(inputs.values())))
        tiles = [
            request.infer({name: array[i : i + 1] for name, array in inputs.items()}, share_inputs=True)
            for i in range(count)
        ]
        return {name: np.concatenate([tile[name] for tile in tiles]) for name in outputs}

    def close(self) -> None:
        """Free the compiled graphs."""
        self._request.cache_clear()
        self._inputs.clear()
        self._sources.clear()

    def _add(self, path: Path) -> str:
        """Connect a graph with those before it; returns its precision."""
        model, precision = _read(self._core, path)
        for parameter in model.get_parameters():
            name = parameter.output(0).get_any_name()
            if name in self._sources:
                parameter.output(0).replace(self._sources[name])
            elif name in self._inputs:
                parameter.output(0).replace(self._inputs[name].output(0))
            else:
                self._inputs[name] = parameter
        for result in model.get_results():
            self._sources[result.output(0).get_any_name()] = result.input_value(0)
        return precision

    @_signal_stack_kept()
    def _compile(self, inputs: frozenset[str], outputs: frozenset[str]) -> Any:
        results = [openvino.op.Result(self._sources[name]) for name in sorted(outputs)]
        model = openvino.Model(results, [self._inputs[name] for name in sorted(inputs)], "joined")
        return self._core.compile_model(model, "CPU", self._options).create_infer_request()


def _read(core: Any, path: Path) -> tuple[Any, str]:
    """An engine file's graph, and the precision in which it is computed."""
    model = core.read_model(os.fspath(path))
    precision = model.get_rt_info(["framework", PRECISION]).astype(str)
    if not computes(precision):
        raise RuntimeError(f"{path.name} computes in {precision}, which this processor cannot: build it here")
    return model, precision


def _settings(precision: str, threads: int) -> dict[str, Any]:
    return {
        "INFERENCE_PRECISION_HINT": _HINTS[precision],
        "INFERENCE_NUM_THREADS": threads or available_cpus(),
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # several engines share the cores
    }


def load(path: Path, *, threads: int = 0, device: int = 0) -> OpenVINOEngine:
    """Load an engine file; ``device`` belongs to the runners of GPU engines."""
    del device
    return OpenVINOEngine(path, threads=threads)


def load_joined(paths: Sequence[Path], *, threads: int = 0) -> JoinedEngines:
    """Load engine files as one graph, each after those whose outputs it reads."""
    return JoinedEngines(paths, threads=threads)
