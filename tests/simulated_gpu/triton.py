"""Loading a repository's models as Triton's Python backend does, on the simulated GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import json_format

from staindiffuser.benchmarks.gpu import python_backend
from staindiffuser.benchmarks.gpu.python_backend import Request, Response, TritonError
from staindiffuser.export import triton_config
from tests.simulated_gpu.cupy import Array

__all__ = ["Request", "Tensor", "TritonError", "loaded", "seen"]


class Tensor(python_backend.Tensor):
    """Remembers what was in memory when the model made it: Triton reads it without waiting for the model's streams."""

    def __init__(self, name: str, values: Any) -> None:
        super().__init__(name, values)
        self.then = np.array(values.values if isinstance(values, Array) else values)


def seen(response: Response) -> dict[str, np.ndarray]:
    """What Triton reads as soon as the model has answered."""
    response.tensors()  # an error is raised
    return {tensor.name(): tensor.then for tensor in response.output_tensors if isinstance(tensor, Tensor)}


@contextmanager
def loaded(folder: Path, *, device: int, log: list[str]) -> Iterator[Any]:
    """A model of a repository, on a GPU.

    Args:
        folder: the model's, with ``config.pbtxt``.
        device: the instance's GPU.
        log: receives the model's warnings.
    """
    message = triton_config.parse((folder / "config.pbtxt").read_text(encoding="utf-8"))
    config = json_format.MessageToDict(message, preserving_proto_field_name=True)
    for parameter in config.get("parameters", {}).values():
        parameter.setdefault("string_value", "")
    module = python_backend.stand_in(log, Tensor)
    with python_backend.loaded_model(folder / "1", config, device=device, module=module) as model:
        yield model
