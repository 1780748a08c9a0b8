"""Step ``engines``: runs the shipped graphs with the torch engine and with the models that Triton loads.

- Parity with the golden samples at each batch size and in both memory layouts, as the server runs them.
- Replays of CUDA graphs against the same program without capture, bit for bit, on inputs that were not captured.
- The model classes that Triton loads, each given the device tensors that the previous one returned.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from staindiffuser.benchmarks.gpu.options import GpuOptions, StepResult, grey_levels
from staindiffuser.benchmarks.gpu.python_backend import Request, loaded_model, stand_in
from staindiffuser.export.builders.base import HostEngine
from staindiffuser.export.description import QUALITY, GraphSet, TensorSpec
from staindiffuser.export.parity import MAX_LEVELS, Golden, check_parity, run_pipeline
from staindiffuser.triton_models import engine_files, noise_files
from staindiffuser.triton_models.engine import engine_torch

__all__ = ["run"]

BATCHES = (1, 3, 8)


def run(options: GpuOptions, result: StepResult) -> None:
    """Check every engine of the graphs folder; see the module."""
    graphs = GraphSet.load(options.graphs)
    golden = Golden.load(options.graphs / graphs.golden)
    result.data.update(graphs=str(options.graphs), model_version=graphs.model_version, precision=graphs.precision)
    result.data["capture"] = options.device == "cuda"
    batches = BATCHES if options.device == "cuda" else BATCHES[:2]
    for layout, channels_last in (("contiguous", False), ("channels last", True)):
        engines = {
            name: engine_torch.TorchEngine(options.graphs / engine.file, channels_last=channels_last)
            for name, engine in graphs.engines.items()
        }
        try:
            for batch in batches:
                what = f"parity, {layout}, batch {batch}"
                parity = result.attempt(what, check_parity, _hosted(engines), graphs, golden, [batch])
                if parity is not None:
                    result.data.setdefault("parity", {})[f"{layout}, batch {batch}"] = {
                        name: {"max_levels": found[0].max_levels, "share_over_one": found[0].share_over_one}
                        for name, found in parity.items()
                    }
            apart = result.attempt(
                f"replay, {layout}", _check_replays, options, graphs, golden, engines, channels_last=channels_last
            )
            if apart is not None:
                result.data.setdefault("replay", {})[layout] = apart
                result.errors += [f"replay, {layout}: {name} differs from eager" for name, d in apart.items() if d]
        finally:
            for engine in engines.values():
                engine.close()
    result.attempt("Triton's models", _check_models, options, graphs, golden, result)


def _hosted(engines: Mapping[str, Any]) -> dict[str, HostEngine]:
    return {name: HostEngine(engine) for name, engine in engines.items()}


def _check_replays(
    options: GpuOptions, graphs: GraphSet, golden: Golden, engines: Mapping[str, Any], *, channels_last: bool
) -> dict[str, float]:
    """Largest difference per tensor between replays and a program without capture, for rows that were not captured."""
    eager = {
        name: engine_torch.TorchEngine(options.graphs / engine.file, channels_last=channels_last, capture=False)
        for name, engine in graphs.engines.items()
    }
    apart: dict[str, float] = {}
    try:
        for row in range(min(3, golden.samples)):
            inputs = {name: array[row : row + 1] for name, array in golden.inputs.items()}
            found, wanted = (
                run_pipeline(_hosted(those), graphs.engines, steps=graphs.steps, tile=graphs.tile, inputs=inputs)
                for those in (engines, eager)
            )
            replayed = {**found[0], **found[1]}
            for name, array in {**wanted[0], **wanted[1]}.items():
                difference = np.abs(replayed[name].astype(np.float32) - array.astype(np.float32))
                apart[name] = max(apart.get(name, 0.0), float(difference.max()))
    finally:
        for engine in eager.values():
            engine.close()
    return apart


def _check_models(options: GpuOptions, graphs: GraphSet, golden: Golden, result: StepResult) -> None:
    """Run ``model.py`` of the encoder, the noise model and each branch on the device that Triton would choose."""
    device = 0 if options.device == "cuda" else None
    batch = min(2, golden.samples)
    tensors: dict[str, Any] = {name: array[:batch] for name, array in golden.inputs.items()}
    log: list[str] = []
    module = stand_in(log)
    checks: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("he_encoder", "noise", *(n for n in graphs.engines if n != "he_encoder")):
            version = Path(folder) / name / "1"
            version.mkdir(parents=True)
            config = _noise(graphs, version) if name == "noise" else _engine(options, graphs, name, version)
            inputs = {tensor["name"]: tensors[tensor["name"]] for tensor in config["input"]}
            with loaded_model(version, config, device=device, module=module) as model:
                (response,) = model.execute([Request(inputs, [tensor["name"] for tensor in config["output"]])])
                found = response.tensors()
                tensors.update(found)
                for tensor, array in found.items():
                    if device is not None and isinstance(array, np.ndarray):
                        raise TypeError(f"{name} left {tensor} in host memory")
                    if tensor in golden.outputs and not tensor.startswith(QUALITY.upper()):
                        checks[tensor] = grey_levels(_on_host(array), golden.outputs[tensor][:batch]).as_dict()
                if hasattr(model, "finalize"):
                    model.finalize()
    result.data["triton_models"] = checks
    result.data["warnings"] = log
    far = [name for name, check in checks.items() if check["max_levels"] > MAX_LEVELS]
    if far or len(checks) != 2 * len(graphs.stains):
        raise ValueError(f"Triton's models are too far from the golden samples: {far or sorted(checks)}")


def _on_host(array: Any) -> np.ndarray[Any, Any]:
    return np.asarray(array.get() if hasattr(array, "get") else array.cpu() if hasattr(array, "cpu") else array)


def _noise(graphs: GraphSet, version: Path) -> dict[str, Any]:
    for source in noise_files():
        shutil.copyfile(source, version / source.name)
    shape = [graphs.steps, 3, graphs.tile, graphs.tile]
    outputs = {"NOISE": shape, "NOISE_CELLS": [1, *shape[2:]]}
    return {
        "name": "noise",
        "input": [{"name": name} for name in ("ORIGIN", "SEED")],
        "output": [{"name": name, "dims": [str(size) for size in dims]} for name, dims in outputs.items()],
    }


def _engine(options: GpuOptions, graphs: GraphSet, name: str, version: Path) -> dict[str, Any]:
    engine = graphs.engines[name]
    for source in engine_files("engine_torch"):
        shutil.copyfile(source, version / source.name)
    shutil.copyfile(options.graphs / engine.file, version / "engine.onnx")
    parameters = {"runner": "engine_torch", "engine": "engine.onnx"}
    return {
        "name": name,
        "input": _tensors(engine.inputs),
        "output": _tensors(engine.outputs),
        "parameters": {key: {"string_value": value} for key, value in parameters.items()},
    }


def _tensors(specs: tuple[TensorSpec, ...]) -> list[dict[str, Any]]:
    return [{"name": spec.name, "dims": [str(size) for size in spec.shape]} for spec in specs]
