"""Target ``tensorrt``: plans for one kind of GPU, built by TensorRT 10.16 or 11 with the same code.

A plan runs on the kind of GPU that built it. TensorRT times its tactics there; the timings are cached per TensorRT
version and GPU in the user's cache folder, outside the repository, so that building again is quick.

No GPU has run this file. The tests run its network building through TensorRT-RTX, which has the same API, and all of it
through a simulation with the names and signatures of the bindings of 10.16 and 11.4.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from staindiffuser.export.builders.base import BuildOptions, Device, Engine, HostEngine, Profile, refuse_unused
from staindiffuser.export.builders.checks import check_graph
from staindiffuser.export.builders.devices import find_gpu
from staindiffuser.export.builders.missing import missing
from staindiffuser.export.builders.trt_network import installed, serialize
from staindiffuser.export.description import EngineGraph
from staindiffuser.export.errors import ExportUsageError
from staindiffuser.files import cache_folder, replacing

__all__ = ["TensorRTBuilder"]

_OLDEST = (10, 16)


class TensorRTBuilder:
    """See :class:`staindiffuser.export.builders.base.Builder`."""

    target = "tensorrt"
    suffix = ".plan"
    runner = "engine_tensorrt"
    precisions: Sequence[str] = ("fp32", "fp16", "bf16")

    def version(self) -> str:
        """The installed TensorRT."""
        return f"tensorrt {self._module().__version__}"

    def device(self) -> Device:
        """This machine's GPU."""
        gpu = find_gpu()
        if gpu is None:
            raise missing(self.target, "no NVIDIA GPU here, and a plan is built on the GPU that runs it")
        return gpu

    def require(self, precision: str) -> None:
        """Nothing: which precisions a GPU has shows when the plan is built."""

    def check(self, options: BuildOptions) -> None:
        """Refuse compute capabilities, since plans are built for this machine's GPU, and options of other targets."""
        if options.compute_capabilities:
            raise ExportUsageError(
                "target tensorrt builds for the GPU of this machine: leave out --compute-capability, and build into "
                "the same repository on each kind of GPU"
            )
        refuse_unused(self.target, options, "workspace_mib", "verbosity", "version_compatible", "weight_stripped")

    def profiles(self, options: BuildOptions) -> tuple[Profile, ...]:
        """One per preferred batch, each with the tactics that are fastest for it."""
        return options.profiles

    def settings(self, options: BuildOptions) -> Mapping[str, Any]:
        """The options that change the plan."""
        names = ("workspace_mib", "verbosity", "version_compatible", "weight_stripped")
        return {"tf32": False, **{name: getattr(options, name) for name in names}}

    def build(self, graph: Path, description: EngineGraph, output: Path, options: BuildOptions) -> None:
        """Build a plan on this machine's GPU.

        Raises:
            GraphsError: the file is not the graph that was described.
            BuildError: TensorRT refuses it.
        """
        check_graph(graph, description)
        trt = self._module()
        cache = _timing_cache(self.version(), self.device())
        timings: list[Any] = []

        def configure(config: Any) -> None:
            known = cache.read_bytes() if cache.is_file() else b""
            timings.append(config.create_timing_cache(known))
            # With a cache from another version or GPU, TensorRT ignores it and times again.
            config.set_timing_cache(timings[0], ignore_mismatch=False)

        output.write_bytes(serialize(trt, graph, self.profiles(options), options, configure=configure))
        with replacing(cache) as draft:
            draft.write_bytes(timings[0].serialize())

    def load(self, path: Path, *, threads: int) -> Engine:
        """Load on this machine's GPU, as the server does."""
        self.device()
        del threads
        engine_tensorrt = importlib.import_module("staindiffuser.triton_models.engine.engine_tensorrt")
        return HostEngine(engine_tensorrt.load(path))

    def _module(self) -> Any:
        install = (
            "pip install 'staindiffuser[gpu-cuda13]', or gpu-cuda12 (it downloads from NVIDIA's own index), "
            "or use the container nvcr.io/nvidia/tritonserver"
        )
        module = installed("tensorrt")
        if module is None:
            raise missing(self.target, f"TensorRT is not installed: {install}")
        if tuple(int(part) for part in module.__version__.split(".")[:2]) < _OLDEST:
            raise missing(self.target, f"TensorRT {module.__version__} is too old: {install}")
        return module


def _timing_cache(version: str, device: Device) -> Path:
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{version}-{device.name}-{device.compute_capability}")
    return cache_folder() / "timings" / f"{name}.cache"
