"""Triton's Python model that runs one engine: the encoder, a stain's image branch, or its cell branch.

``config.pbtxt`` configures it: tensor names and shapes, and these ``parameters``:

- ``runner``: the file beside this one that loads the engine (``engine_onnxruntime``, ``engine_tensorrt``, …);
- ``engine``: the engine's file name in this folder;
- ``gate``: ``true`` for the ensemble's first model, which refuses requests while the server stops (``gate.py``);
- ``checks_origins``: ``true`` for the first model of an ensemble without noise, which refuses origins off the grid;
- ``copies``: JSON, outputs that are others under a second name (``export/triton_config.py`` says why);
- ``model_version``, ``quality``: as in the ensemble's, for the counters (``meters.py``);
- ``threads``: threads of a CPU engine, 0 for all available; ``STAINDIFFUSER_THREADS`` overrides it.

On a GPU, requests that arrive together are concatenated along the batch, run once and split again. If that fails, each
request is run alone, so that only the faulty one is answered with an error. On a CPU each is run alone anyway: a batch
gains nothing there, and the same request always gets the same bytes.
"""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import triton_python_backend_utils as pb_utils
from gate import Gate
from meters import Meters

_DLPACK = np.lib.NumpyVersion(np.__version__) >= "2.0.0"
"""Whether host tensors are exchanged by DLPack. A Python backend built before numpy 2, such as the wheel's, otherwise
gets numpy 2's arrays wrong; numpy 1's DLPack makes it crash."""
PLACE = ("ORIGIN", "SEED")
"""Inputs that no engine reads."""


class Engine(Protocol):
    """A runner's engine. Its arrays are NumPy arrays on the CPU, and CuPy arrays or torch tensors on a GPU."""

    def receive(self, tensor: Any) -> Any:
        """Convert a request's NumPy array or DLPack tensor to an array on the engine's device."""

    def join(self, arrays: list[Any]) -> Any:
        """Concatenate received arrays along the batch."""

    def run(self, inputs: dict[str, Any], outputs: list[str]) -> dict[str, Any]:
        """Run one batch, batch dimension first; returns the requested outputs, after the work has finished."""

    def close(self) -> None:
        """Release the engine's resources."""


class TritonPythonModel:
    """The interface Triton's Python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the engine that ``config.pbtxt`` names; an error here stops the server from becoming ready."""
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        self.name = config["name"]
        self.inputs = [tensor["name"] for tensor in config["input"] if tensor["name"] not in PLACE]
        self.outputs = [tensor["name"] for tensor in config["output"]]
        self.copies: dict[str, str] = json.loads(parameters.get("copies", "{}"))
        self.gpu = args["model_instance_kind"] == "GPU"
        self.gate = Gate()
        self.meters = Meters(
            pb_utils, version=parameters.get("model_version", ""), quality=parameters.get("quality", "")
        )
        self.guards_gate = parameters.get("gate") == "true"
        self.checks_origins = parameters.get("checks_origins") == "true"
        runner = importlib.import_module(parameters["runner"])
        self.engine: Engine = runner.load(
            Path(__file__).with_name(parameters["engine"]),
            threads=int(os.environ.get("STAINDIFFUSER_THREADS") or parameters.get("threads", "0")),
            device=int(args["model_instance_device_id"]),
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        """Run the requests as one batch; if that fails, one by one. A closed gate refuses them."""
        if self.guards_gate and self.gate.closed:
            self.meters.refused(len(requests))
            stopping = pb_utils.TritonError(
                "the server is stopping: send the request again", pb_utils.TritonError.UNAVAILABLE
            )
            return [pb_utils.InferenceResponse(error=stopping) for _ in requests]
        with self.gate.busy():
            return self._execute(requests)

    def finalize(self) -> None:
        """Free the engine and the counters."""
        self.engine.close()
        self.meters.close()

    def _execute(self, requests: list[Any]) -> list[Any]:
        if self.gpu and len(requests) > 1:
            try:
                return self._run(requests)
            except Exception as error:  # which request is at fault shows when each is run alone
                pb_utils.Logger.log_warn(f"{self.name}: a batch of {len(requests)} requests failed: {error}")
        responses: list[Any] = []
        for request in requests:
            try:
                responses += self._run([request])
            except OffGridError as error:
                refusal = pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
                responses.append(pb_utils.InferenceResponse(error=refusal))
            except Exception as error:  # reported to the client that sent it
                message = f"{self.name}: {type(error).__name__}: {error}"
                responses.append(pb_utils.InferenceResponse(error=pb_utils.TritonError(message)))
        return responses

    def _run(self, requests: list[Any]) -> list[Any]:
        for request in requests if self.checks_origins else ():
            _check_origins(request)
        parts = [{name: self.engine.receive(_tensor(request, name)) for name in self.inputs} for request in requests]
        batch = {name: self.engine.join([part[name] for part in parts]) for name in self.inputs}
        asked = [list(request.requested_output_names()) for request in requests]
        wanted = {self.copies.get(name, name) for names in asked for name in names}
        results = self.engine.run(batch, [name for name in self.outputs if name in wanted])
        for name, array in results.items():
            self.meters.tiles(name, array)
        responses = []
        first = 0
        for part, names in zip(parts, asked, strict=True):
            last = first + len(part[self.inputs[0]])
            tensors = [self._response(name, results[self.copies.get(name, name)][first:last]) for name in names]
            responses.append(pb_utils.InferenceResponse(tensors))
            first = last
        return responses

    def _response(self, name: str, array: Any) -> Any:
        return pb_utils.Tensor.from_dlpack(name, array) if self.gpu or _DLPACK else pb_utils.Tensor(name, array)


class OffGridError(ValueError):
    """An origin that is no multiple of 16."""


def _check_origins(request: Any) -> None:
    from philox import check_origins

    try:
        check_origins(_tensor(request, "ORIGIN"))
    except ValueError as error:
        raise OffGridError(str(error)) from error


def _tensor(request: Any, name: str) -> Any:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    # A model on a GPU also gets host tensors: those of clients, and those that did not fit into the CUDA pool.
    if not tensor.is_cpu():
        return tensor
    return np.from_dlpack(tensor) if _DLPACK else tensor.as_numpy()
