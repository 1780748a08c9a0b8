"""Stands in for Triton's Python backend, to run a repository's models in this process."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Request", "Response", "Tensor", "TritonError", "loaded_model", "stand_in"]


class Tensor:
    """A NumPy array, or a device array that supports DLPack."""

    def __init__(self, name: str, values: Any) -> None:
        self._name, self.values = name, values

    @classmethod
    def from_dlpack(cls, name: str, array: Any) -> Tensor:
        """A tensor that shares the memory of a model's output."""
        if not hasattr(array, "__dlpack__"):
            raise TypeError(f"{name} does not support DLPack: {type(array)}")
        return cls(name, array)

    def name(self) -> str:
        """The name in the model's configuration."""
        return self._name

    def is_cpu(self) -> bool:
        """Whether it is in host memory."""
        return isinstance(self.values, np.ndarray)

    def as_numpy(self) -> np.ndarray[Any, Any]:
        """The array, if it is in host memory."""
        if not isinstance(self.values, np.ndarray):
            raise TypeError(f"{self._name} is on the GPU and cannot become a NumPy array")
        return self.values

    def __dlpack__(self, **options: Any) -> Any:
        return self.values.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.values.__dlpack_device__()


class TritonError(Exception):
    """An error response, with the codes that our models use."""

    INVALID_ARG, INTERNAL, UNAVAILABLE = 1, 2, 3

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        super().__init__(message)
        self.code = code


@dataclass
class Response:
    """Tensors, or an error."""

    output_tensors: list[Tensor] = field(default_factory=list)
    error: TritonError | None = None

    def tensors(self) -> dict[str, Any]:
        """Each output's array, on whichever device.

        Raises:
            TritonError: the model answered with an error.
        """
        if self.error:
            raise self.error
        return {tensor.name(): tensor.values for tensor in self.output_tensors}


@dataclass
class Request:
    """One request of a client or of the ensemble."""

    inputs: Mapping[str, Any]
    outputs: list[str]

    def requested_output_names(self) -> list[str]:
        """Names of the requested outputs."""
        return self.outputs


def stand_in(log: list[str], tensor: type[Tensor] = Tensor) -> types.ModuleType:
    """A module to import as ``triton_python_backend_utils``; warnings are appended to ``log``."""
    module: Any = types.ModuleType("triton_python_backend_utils")
    module.Tensor, module.TritonError, module.InferenceResponse = tensor, TritonError, Response
    module.get_input_tensor_by_name = lambda request, name: tensor(name, request.inputs[name])
    module.Logger = types.SimpleNamespace(log_warn=log.append)
    result: types.ModuleType = module
    return result


@contextmanager
def loaded_model(
    version: Path, config: Mapping[str, Any], *, device: int | None, module: types.ModuleType
) -> Iterator[Any]:
    """Load a model as Triton does: its version folder is first on the path, and its files are top-level modules.

    Args:
        version: the folder that holds ``model.py``.
        config: the model's configuration, as JSON.
        device: the instance's GPU, or None for the CPU.
        module: :func:`stand_in`.
    """
    names = [path.stem for path in version.glob("*.py")]
    before = {name: sys.modules.pop(name, None) for name in (*names, module.__name__)}
    sys.modules[module.__name__] = module
    sys.path.insert(0, str(version))
    try:
        spec = importlib.util.spec_from_file_location("model", version / "model.py")
        if spec is None or spec.loader is None:
            raise ImportError(f"{version / 'model.py'} cannot be imported")
        source = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(source)
        model = source.TritonPythonModel()
        kind = "CPU" if device is None else "GPU"
        arguments = {"model_instance_kind": kind, "model_instance_device_id": str(device or 0)}
        model.initialize({"model_config": json.dumps({"parameters": {}, **config}), **arguments})
        yield model
    finally:
        sys.path.remove(str(version))
        for name, old in before.items():
            sys.modules.pop(name, None)
            if old is not None:
                sys.modules[name] = old
