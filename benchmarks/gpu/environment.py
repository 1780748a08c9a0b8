"""Step ``environment``: versions, imports and shared memory. It comes first, and ends the run if there is no GPU."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from staindiffuser.benchmarks.gpu.options import GpuOptions, StepResult
from staindiffuser.errors import DependencyError

__all__ = ["run"]

PACKAGES = (
    "cupy-cuda13x", "cupy-cuda12x", "lightning", "numpy", "nvidia-ml-py", "nvidia-pytriton", "onnx", "onnxruntime",
    "onnxscript", "pydantic", "safetensors", "scikit-image", "scipy", "tensorrt", "tensorrt-rtx-cu13-bindings",
    "tifffile", "torch", "tritonclient", "typer",
)  # fmt: skip
MODULES = (
    "staindiffuser.export.parity",
    "staindiffuser.export.repository",
    "staindiffuser.export.graphs",
    "staindiffuser.serving.server",
    "staindiffuser.training.cli",
    "staindiffuser.training.loop",
    "staindiffuser.training.simulate.cli",
    "staindiffuser.triton_models.engine.engine_torch",
    "staindiffuser.triton_models.noise.philox_gpu",
)
"""Modules that later steps import. A failure is recorded here; it is an error of the step that needs the module."""


def run(options: GpuOptions, result: StepResult) -> None:
    """Collect everything; see the module.

    Raises:
        DependencyError: torch sees no GPU.
    """
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        raise DependencyError("no NVIDIA GPU that torch can use: run it on a machine with one (torch with CUDA)")
    result.data["python"] = platform.python_version()
    result.data["packages"] = {name: version for name in PACKAGES if (version := _version(name))}
    result.data["cpu"] = {"cores": len(os.sched_getaffinity(0)), "processor": _processor()}
    result.data["shared_memory_mib"] = shutil.disk_usage("/dev/shm").total >> 20
    result.data["torch"] = {"version": torch.__version__, "cuda": torch.version.cuda, "cudnn": _cudnn(torch)}
    if options.device == "cuda":
        result.data["gpus"] = [_gpu(torch, index) for index in range(torch.cuda.device_count())]
        result.data["driver"] = _driver()
    result.write()
    result.data["imports"] = {name: result.over or _import(name) for name in MODULES}
    result.data["device"] = result.data["gpus"][0]["name"] if options.device == "cuda" else _processor()


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _import(name: str) -> str:
    try:
        importlib.import_module(name)
    except Exception as error:  # a broken library may raise anything
        return f"{type(error).__name__}: {error}"
    return "ok"


def _gpu(torch: Any, index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_mib": properties.total_memory >> 20,
        "multiprocessors": properties.multi_processor_count,
    }


def _cudnn(torch: Any) -> int | None:
    version: int | None = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    return version


def _driver() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi: {error}"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
