"""Step ``tensorrt``: builds and checks plans of the shipped graphs, and times stages; if TensorRT is installed.

No GPU has run it yet; the tests run it on a simulated one.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from staindiffuser.benchmarks.gpu.options import Check, GpuOptions, StepResult, grey_levels
from staindiffuser.benchmarks.gpu.stages import Bench, Timed, random_network, stage_inputs
from staindiffuser.export.builders.base import BuildOptions
from staindiffuser.export.builders.trt_network import installed, serialize
from staindiffuser.export.modules import BranchEngine, EncoderEngine
from staindiffuser.training.diffusion.samplers import START_SIGMAS
from staindiffuser.training.model.network import DualDiffusion

__all__ = ["TensorRTStage", "run", "tensorrt_modules"]

STAGES = ("encoder", "image k=1", "cells")
"""Timed stages; k = 2 and 4 would only repeat the image branch."""


def run(options: GpuOptions, result: StepResult) -> None:
    """Check plans of the shipped graphs, then time the stages."""
    modules = tensorrt_modules()
    if not modules:
        result.skipped = "neither TensorRT nor TensorRT-RTX is installed"
        return
    result.data["installed"] = {label: str(module.__version__) for label, module in modules.items()}
    if options.device == "cpu":
        result.skipped = "plans run on NVIDIA GPUs only"
        return
    for label in modules:
        for stripped in (False, True) if label == "tensorrt" else (False,):
            what = f"{label}, shipped graphs{', weight-stripped' if stripped else ''}"
            parity = result.attempt(what, _shipped, options, label, stripped=stripped)
            if parity is not None:
                result.data.setdefault("parity", {})[what] = parity
    bench = Bench(options, result)
    network = random_network(options.preset)
    result.data["plans"] = {}
    for label, trt in modules.items():
        for name in STAGES:
            what = f"{label}, {name}"
            stage = result.attempt(f"build {what}", TensorRTStage, trt, network, name, bench.trunk, options=options)
            if stage is None:
                continue
            result.data["plans"][what] = {"bytes": stage.plan_bytes, "scratch_bytes": stage.memory_bytes}
            for batch in options.batches:
                bench.measure(name, batch, label, stage.flops, functools.partial(stage.prepare, batch))


def _shipped(options: GpuOptions, target: str, *, stripped: bool) -> dict[str, Any]:
    """Build, load and check plans as ``export build`` does, without a repository."""
    from staindiffuser.export import builders
    from staindiffuser.export.description import GraphSet
    from staindiffuser.export.parity import Golden, check_parity

    graphs = GraphSet.load(options.graphs)
    golden = Golden.load(options.graphs / graphs.golden)
    builder = builders.get(target)
    chosen = BuildOptions(batches=(1, 8), weight_stripped=stripped) if stripped else BuildOptions(batches=(1, 8))
    with tempfile.TemporaryDirectory() as folder:
        engines = {}
        for name, engine in graphs.engines.items():
            path = Path(folder) / name / f"{name}{builder.suffix}"
            path.parent.mkdir()
            builder.build(options.graphs / engine.file, engine, path, chosen)
            if stripped:
                path.with_name("weights.onnx").write_bytes((options.graphs / engine.file).read_bytes())
            engines[name] = builder.load(path, threads=0)
        try:
            found = check_parity(engines, graphs, golden, chosen.corners(builder.profiles(chosen)))
        finally:
            for loaded in engines.values():
                loaded.close()
    return {
        name: {str(r.batch): {"max_levels": r.max_levels, "share_over_one": r.share_over_one} for r in results}
        for name, results in found.items()
    }


def tensorrt_modules() -> dict[str, Any]:
    """What is installed of TensorRT and TensorRT-RTX."""
    found = {name.replace("_", "-"): installed(name) for name in ("tensorrt", "tensorrt_rtx")}
    return {label: module for label, module in found.items() if module is not None}


class TensorRTStage:
    """One stage as a plan, with memory from torch.

    Args:
        trt: the module.
        network: one stain, on the CPU, created outside ``torch.inference_mode``, since it is traced.
        name: as in :mod:`stages`: ``encoder``, ``image k=2``, ``cells``.
        trunk: what the convolutions compute in.
        options: device, tile, and batches (one optimisation profile each).

    Raises:
        ImportError: ONNX, by which TensorRT is fed, is not installed.
        RuntimeError, BuildError: TensorRT could not build or load the plan.
    """

    def __init__(self, trt: Any, network: DualDiffusion, name: str, trunk: torch.dtype, *, options: GpuOptions) -> None:
        from torch.utils.flop_counter import FlopCounterMode

        from staindiffuser.export.graphs import write_engines

        self._network, self._name, self._tile = network, name, options.tile
        self._device = torch.device(options.device)
        steps = int(name.rpartition("=")[2]) if "=" in name else 1
        only = {"encoder": "he_encoder", "cells": "cells_cd3"}.get(name, "stain_cd3")
        chosen = BuildOptions(batches=options.batches)
        with tempfile.TemporaryDirectory() as folder:
            graphs = write_engines(
                network, Path(folder), sigmas=START_SIGMAS[steps], tile=options.tile, trunk=trunk, only=only
            )
            self._graph = graphs[only]
            profiles = chosen.one_profile if "rtx" in trt.__name__ else chosen.profiles
            plan = serialize(trt, Path(folder) / self._graph.file, profiles, chosen)
        self.plan_bytes = len(plan)
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise RuntimeError(f"{trt.__name__} cannot load the plan that it built")
        self.memory_bytes = int(self._engine.device_memory_size_v2)
        self._contexts = []
        for index, (smallest, _, largest) in enumerate(profiles):
            context = self._engine.create_execution_context()
            context.set_optimization_profile_async(index, _stream(self._device))
            self._contexts.append((smallest, largest, context))
        _synchronize(self._device)
        (stain,) = network.config.stains
        if name == "encoder":
            module: torch.nn.Module = EncoderEngine(network, trunk)
        else:
            sigmas = [network.config.sigma_max] if name == "cells" else START_SIGMAS[steps]
            module = BranchEngine(network, "cells" if name == "cells" else "images", stain, sigmas, trunk)
        self._module = module.eval().to(self._device)
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            self._module(*self._inputs(1, 0))
        self.flops = float(counter.get_total_flops())

    def prepare(self, batch: int) -> Timed:
        """A run of one batch on torch's stream, and a comparison with the same stage in torch on new inputs."""
        run, _ = self._bind(self._inputs(batch, 0))

        def check() -> Check:
            inputs = self._inputs(batch, 1)
            again, outputs = self._bind(inputs)
            again()
            _synchronize(self._device)
            with torch.inference_mode():
                expected = self._module(*inputs)
            wanted = expected if isinstance(expected, tuple) else (expected,)
            checks = [grey_levels(f, w) for f, w in zip(outputs, wanted, strict=True)]
            return max(checks, key=lambda c: (c.max_levels, c.share_over_one))

        return Timed(run, check)

    def _inputs(self, batch: int, seed: int) -> list[Tensor]:
        return [x.to(self._device) for x in stage_inputs(self._network, self._name, batch, self._tile, seed)]

    def _bind(self, inputs: list[Tensor]) -> tuple[Callable[[], object], list[Tensor]]:
        batch = len(inputs[0])
        context = next(c for smallest, largest, c in self._contexts if smallest <= batch <= largest)
        for spec, tensor in zip(self._graph.inputs, inputs, strict=True):
            context.set_input_shape(spec.name, tuple(tensor.shape))
        outputs = [
            torch.empty((batch, *spec.shape), dtype=getattr(torch, spec.dtype), device=self._device)
            for spec in self._graph.outputs
        ]

        def run() -> object:
            # Bound for each run, since the comparison binds other memory.
            for spec, tensor in zip((*self._graph.inputs, *self._graph.outputs), (*inputs, *outputs), strict=True):
                context.set_tensor_address(spec.name, tensor.data_ptr())
            if not context.execute_async_v3(_stream(self._device)):
                raise RuntimeError("TensorRT could not enqueue the plan")
            return inputs, outputs  # held while the plan may run

        return run, outputs


def _stream(device: torch.device) -> int:
    """Handle of torch's current stream."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
