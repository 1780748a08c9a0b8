"""What Triton's Python backend gives a model: ``triton_python_backend_utils``, and loading a model as it does."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import json_format

from staindiffuser.export import triton_config
from tests.simulated_gpu.cupy import Array, Stream

__all__ = ["Request", "Tensor", "install", "load_model"]


class Tensor:
    """A tensor in host memory, or one on the GPU that speaks DLPack."""

    def __init__(self, name: str, values: Any) -> None:
        self._name, self._values = name, values
        # Triton hands memory on without waiting for the stream it was written on: what is there now is what is read.
        self.then = np.array(values.values if isinstance(values, Array) else values)

    @staticmethod
    def from_dlpack(name: str, array: Any) -> Tensor:
        assert hasattr(array, "__dlpack__")
        return Tensor(name, array)

    def name(self) -> str:
        return self._name

    def is_cpu(self) -> bool:
        return isinstance(self._values, np.ndarray)

    def as_numpy(self) -> np.ndarray:
        assert self.is_cpu(), "Tensor is stored in GPU and cannot be converted to NumPy."
        array: np.ndarray = self._values
        return array

    def __dlpack__(self, stream: int | None = None) -> Any:
        return self._values.__dlpack__(stream=stream)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0) if self.is_cpu() else (2, self._values.device)


class TritonError(Exception):
    """With the codes that the models use."""

    INVALID_ARG, INTERNAL = 1, 2

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        super().__init__(message)
        self.code = code


@dataclass
class Response:
    """Tensors, or an error."""

    output_tensors: list[Tensor] = field(default_factory=list)
    error: TritonError | None = None

    def arrays(self) -> dict[str, np.ndarray]:
        """What Triton reads, as soon as the model returned."""
        if self.error:
            raise self.error
        return {tensor.name(): tensor.then for tensor in self.output_tensors}


@dataclass
class Request:
    """One request of a client, or of the ensemble."""

    inputs: dict[str, Any]
    outputs: list[str]

    def requested_output_names(self) -> list[str]:
        return self.outputs


def install(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Put the module where models import it; returns what they log."""
    log: list[str] = []
    module: Any = types.ModuleType("triton_python_backend_utils")
    module.Tensor, module.TritonError, module.InferenceResponse = Tensor, TritonError, Response
    module.get_input_tensor_by_name = lambda request, name: Tensor(name, request.inputs[name])
    module.Logger = types.SimpleNamespace(log_warn=log.append)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module)
    return log


def load_model(monkeypatch: pytest.MonkeyPatch, folder: Path, *, device: int | None = None) -> Any:
    """Load a model of a repository: its own folder first on the path, nothing of ours imported by name.

    Args:
        folder: the model's, with ``config.pbtxt``.
        device: the instance's GPU, or None for the CPU.
    """
    version = folder / "1"
    monkeypatch.syspath_prepend(str(version))
    for source in version.glob("*.py"):
        monkeypatch.delitem(sys.modules, source.stem, raising=False)
    spec = importlib.util.spec_from_file_location(f"model_{folder.name}", version / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    message = triton_config.parse((folder / "config.pbtxt").read_text(encoding="utf-8"))
    config = json_format.MessageToDict(message, preserving_proto_field_name=True)
    for parameter in config.get("parameters", {}).values():
        parameter.setdefault("string_value", "")
    model = module.TritonPythonModel()
    model.initialize(
        {
            "model_config": json.dumps({"parameters": {}, **config}),
            "model_instance_kind": "CPU" if device is None else "GPU",
            "model_instance_device_id": str(device or 0),
        }
    )
    for source in version.glob("*.py"):
        sys.modules.pop(source.stem, None)
    assert Stream.current.ptr == 0
    return model
