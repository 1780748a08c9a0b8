"""A stage built and run by TensorRT or TensorRT-RTX, memory from torch. For ``verify_gpu``; no GPU has run it yet."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from staindiffuser.export.builders.base import BuildOptions
from staindiffuser.training.diffusion.samplers import START_SIGMAS
from staindiffuser.training.model.network import DualDiffusion

__all__ = ["TensorRTStage", "tensorrt_modules"]


def tensorrt_modules() -> dict[str, Any]:
    """What is installed of TensorRT and TensorRT-RTX."""
    found: dict[str, Any] = {}
    for label, names in (("tensorrt", ("tensorrt",)), ("tensorrt-rtx", ("tensorrt_rtx", "tensorrt_rtx_bindings"))):
        for name in names:
            try:
                module = importlib.import_module(name)
            except (ImportError, OSError):
                continue
            if label not in found and hasattr(module, "Builder"):
                found[label] = module
    return found


class TensorRTStage:
    """One stage as a plan on the current GPU.

    Args:
        trt: the module.
        network: one stain.
        name: as in ``verify_gpu``: ``encoder``, ``image k=2``, ``cells``.
        trunk: what the convolutions compute in.
        tile: pixels.
        batches: one optimisation profile each.

    Raises:
        ImportError: ONNX, by which TensorRT is fed, is not installed.
        RuntimeError, BuildError: TensorRT could not build or load the plan.
    """

    def __init__(
        self, trt: Any, network: DualDiffusion, name: str, trunk: torch.dtype, *, tile: int, batches: tuple[int, ...]
    ) -> None:
        from staindiffuser.export.builders.trt_network import serialize
        from staindiffuser.export.graphs import write_engines

        steps = int(name.rpartition("=")[2]) if "=" in name else 1
        only = {"encoder": "he_encoder", "cells": "cells_cd3"}.get(name, "stain_cd3")
        options = BuildOptions(batches=batches)
        device = next(network.parameters()).device
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode(mode=False):
            network.cpu()
            try:
                graphs = write_engines(
                    network, Path(folder), sigmas=START_SIGMAS[steps], tile=tile, trunk=trunk, only=only
                )
            finally:
                network.to(device)
            graph = graphs[only]
            profiles = options.profiles if trt.__name__ == "tensorrt" else options.one_profile
            plan = serialize(trt, Path(folder) / graph.file, profiles, options)
        self.plan_bytes = len(plan)
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise RuntimeError(f"{trt.__name__} cannot load the plan that it built")
        self.memory_bytes = int(self._engine.device_memory_size_v2)
        self._contexts = []
        stream = torch.cuda.current_stream().cuda_stream
        for index, (smallest, _, largest) in enumerate(profiles):
            context = self._engine.create_execution_context()
            context.set_optimization_profile_async(index, stream)
            self._contexts.append((smallest, largest, context))
        self._graph = graph

    def prepare(self, inputs: list[Tensor]) -> Callable[[], object]:
        """A run of one batch, enqueued on torch's stream."""
        outputs, run = self._bind(inputs)
        del outputs
        return run

    def difference(self, module: nn.Module, inputs: list[Tensor]) -> dict[str, float]:
        """Against the same stage in torch, same precision: grey levels, or for features their largest difference
        beyond a hundredth of their largest value."""
        outputs, run = self._bind(inputs)
        run()
        torch.cuda.current_stream().synchronize()
        expected = module(*inputs)
        expected = expected if isinstance(expected, tuple) else (expected,)
        worst, share = 0.0, 0.0
        for found, wanted in zip(outputs, expected, strict=True):
            if wanted.dtype == torch.uint8:
                levels = (found.to(torch.int16) - wanted.to(torch.int16)).abs()
            else:
                levels = (found.float() - wanted.float()).abs() / (wanted.float().abs().max() * 0.01)
            worst = max(worst, float(levels.max()))
            share = max(share, float((levels > 1).float().mean()))
        return {"max_levels": worst, "share_over_one": share}

    def _bind(self, inputs: list[Tensor]) -> tuple[list[Tensor], Callable[[], object]]:
        batch = len(inputs[0])
        context = next(c for smallest, largest, c in self._contexts if smallest <= batch <= largest)
        for spec, tensor in zip(self._graph.inputs, inputs, strict=True):
            context.set_input_shape(spec.name, tuple(tensor.shape))
            context.set_tensor_address(spec.name, tensor.data_ptr())
        outputs = []
        for spec in self._graph.outputs:
            tensor = torch.empty((batch, *spec.shape), dtype=getattr(torch, spec.dtype), device=inputs[0].device)
            context.set_tensor_address(spec.name, tensor.data_ptr())
            outputs.append(tensor)

        def run() -> object:
            if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
                raise RuntimeError("TensorRT could not enqueue the plan")
            return inputs, outputs  # held while the plan may run

        return outputs, run
