"""Triton's Python model ``noise``: makes the noise of each tile's images and cell maps from its ORIGIN and SEED.

    ORIGIN INT64 [B, 2] (x, y)  ─►  NOISE       FP16 [B, k, 3, H, W]
    SEED   INT64 [B, 1]         ─►  NOISE_CELLS FP16 [B, 1, H, W]
    AFTER  (not read: it makes the ensemble run the encoder first, see export/triton_config.py)

An output that no engine reads is left out. Steps, height and width come from the output shapes in ``config.pbtxt``. A
GPU instance makes the noise on its GPU with CuPy. NVIDIA's Triton container has no CuPy; there the noise is made on the
host, with the same bits but about 5 ms slower per 256-pixel tile, and the log says what to install.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from gate import Gate
from philox import tile_noise
from philox_gpu import GpuNoise

_DLPACK = np.lib.NumpyVersion(np.__version__) >= "2.0.0"
"""Whether host tensors are exchanged by DLPack. A Python backend built before numpy 2, such as the wheel's, otherwise
gets numpy 2's arrays wrong; numpy 1's DLPack makes it crash."""


class TritonPythonModel:
    """The interface Triton's Python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the shapes from the model's config."""
        config = json.loads(args["model_config"])
        shapes = {output["name"]: [int(size) for size in output["dims"]] for output in config["output"]}
        self.height, self.width = next(iter(shapes.values()))[-2:]
        self.steps = shapes["NOISE"][0] if "NOISE" in shapes else 1
        self.gate = Gate()
        self.gpu: GpuNoise | None = None
        if args["model_instance_kind"] == "GPU":
            try:
                self.gpu = GpuNoise(int(args["model_instance_device_id"]))
            except ModuleNotFoundError:
                pb_utils.Logger.log_warn(
                    "noise: CuPy is not installed, so noise is made on the host (slower, same bits): "
                    "pip install cupy-cuda13x (cupy-cuda12x for CUDA 12) in the server's image"
                )

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response per request; refusing one does not affect the others."""
        with self.gate.busy():
            return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        try:
            origins, seeds = _array(request, "ORIGIN"), _array(request, "SEED")
            names = request.requested_output_names()
            make = self.gpu.tile_noise if self.gpu else tile_noise
            image, cells = make(
                seeds,
                origins,
                # A request for cell maps alone needs one step only.
                steps=self.steps if "NOISE" in names else 1,
                height=self.height,
                width=self.width,
                cells="NOISE_CELLS" in names,
            )
            tensors = {"NOISE": image, "NOISE_CELLS": cells}
            return pb_utils.InferenceResponse([self._tensor(name, tensors[name]) for name in names])
        except ValueError as error:
            return _refusal(str(error), pb_utils.TritonError.INVALID_ARG)
        except Exception as error:  # any other failure also belongs to this request alone
            return _refusal(f"noise: {type(error).__name__}: {error}", pb_utils.TritonError.INTERNAL)

    def _tensor(self, name: str, array: Any) -> Any:
        return pb_utils.Tensor.from_dlpack(name, array) if self.gpu or _DLPACK else pb_utils.Tensor(name, array)


def _array(request: Any, name: str) -> np.ndarray[Any, Any]:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    array: np.ndarray[Any, Any] = np.from_dlpack(tensor) if _DLPACK else tensor.as_numpy()
    return array


def _refusal(message: str, code: int) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
