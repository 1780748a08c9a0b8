"""Triton's Python model ``noise``: ORIGIN and SEED of each tile in, the noise of its images and cell maps out.

    ORIGIN INT64 [B, 2] (x, y)  ─►  NOISE       FP16 [B, k, 3, H, W]
    SEED   INT64 [B, 1]         ─►  NOISE_CELLS FP16 [B, 1, H, W]
    AFTER  (not read: it makes the ensemble run the encoder first, see export/triton_config.py)

Steps, height and width are read from the output shapes in ``config.pbtxt``. On a GPU instance the noise is made there.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from philox import tile_noise


class TritonPythonModel:
    """The interface Triton's Python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the shapes from the model's config."""
        config = json.loads(args["model_config"])
        shapes = {output["name"]: [int(size) for size in output["dims"]] for output in config["output"]}
        self.steps, _, self.height, self.width = shapes["NOISE"]
        self.device = int(args["model_instance_device_id"]) if args["model_instance_kind"] == "GPU" else None
        self.xp: Any = np
        if self.device is not None:
            import cupy

            self.xp = cupy
            cupy.cuda.Device(self.device).use()

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response a request; a request that is refused does not touch the others."""
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        try:
            origins = pb_utils.get_input_tensor_by_name(request, "ORIGIN").as_numpy()
            seeds = pb_utils.get_input_tensor_by_name(request, "SEED").as_numpy()
            names = request.requested_output_names()
            image, cells = tile_noise(
                seeds,
                origins,
                # A request for cell maps alone needs one step only.
                steps=self.steps if "NOISE" in names else 1,
                height=self.height,
                width=self.width,
                cells="NOISE_CELLS" in names,
                xp=self.xp,
            )
            tensors = {"NOISE": image, "NOISE_CELLS": cells}
            return pb_utils.InferenceResponse([self._tensor(name, tensors[name]) for name in names])
        except ValueError as error:
            return _refusal(str(error), pb_utils.TritonError.INVALID_ARG)
        except Exception as error:  # anything else is this request's error too, never the server's
            return _refusal(f"noise: {type(error).__name__}: {error}", pb_utils.TritonError.INTERNAL)

    def _tensor(self, name: str, array: Any) -> Any:
        if self.device is None:
            return pb_utils.Tensor(name, array)
        self.xp.cuda.get_current_stream().synchronize()  # Triton hands the memory on without waiting for our stream
        return pb_utils.Tensor.from_dlpack(name, array)


def _refusal(message: str, code: int) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
