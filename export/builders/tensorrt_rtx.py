"""Target ``tensorrt-rtx``: engines for RTX workstations, compiled ahead of time; compiling needs no GPU.

One engine covers several compute capabilities: it contains kernel sources and tactics, and is finished on the GPU that
loads it. One profile over all batches is therefore enough; three doubled the size (demo image branch, k = 1: 9.7
instead of 4.8 MB).

Loading an engine needs a GPU. Without one, engines can be compiled but not checked, so no repository is published;
``staindiffuser export compile`` writes the engines alone.
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

__all__ = ["DEFAULT_CAPABILITIES", "TensorRTRtxBuilder"]

DEFAULT_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0")
"""Ampere, Ada and Blackwell."""
_INSTALL = "pip install tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings"


class TensorRTRtxBuilder:
    """See :class:`staindiffuser.export.builders.base.Builder`."""

    target = "tensorrt-rtx"
    suffix = ".rtx"
    runner = "engine_tensorrt"
    precisions: Sequence[str] = ("fp32", "fp16", "bf16")
    ahead_of_time = True

    def version(self) -> str:
        """The installed TensorRT-RTX."""
        return f"tensorrt-rtx {self._module().__version__}"

    def device(self) -> Device:
        """This machine's GPU."""
        gpu = find_gpu()
        if gpu is None:
            raise missing(
                self.target,
                "no NVIDIA GPU here to check engines on (to compile them all the same: staindiffuser export compile)",
            )
        return gpu

    def require(self, precision: str) -> None:
        """Nothing: TensorRT-RTX refuses a GPU that lacks the precision."""

    def check(self, options: BuildOptions) -> None:
        """Refuse options of other targets, and compute capabilities that TensorRT-RTX does not compile for."""
        refuse_unused(self.target, options, "compute_capabilities", "verbosity", "workspace_mib")
        known = self.capabilities()
        for capability in options.compute_capabilities:
            if capability not in known:
                raise ExportUsageError(
                    f"compute capability {capability}: tensorrt-rtx compiles for {', '.join(known)}; "
                    "for other GPUs take target tensorrt"
                )

    def capabilities(self) -> tuple[str, ...]:
        """Compute capabilities that the installed version compiles for."""
        found = (re.fullmatch(r"SM(\d+)(\d)", name) for name in dir(self._module().ComputeCapability))
        return tuple(sorted((f"{m[1]}.{m[2]}" for m in found if m), key=float))

    def profiles(self, options: BuildOptions) -> tuple[Profile, ...]:
        """One profile over all batches."""
        return options.one_profile

    def settings(self, options: BuildOptions) -> Mapping[str, Any]:
        """The options that change the engine."""
        return {
            "tf32": False,
            "compute_capabilities": list(options.compute_capabilities or DEFAULT_CAPABILITIES),
            "verbosity": options.verbosity,
            "workspace_mib": options.workspace_mib,
        }

    def build(self, graph: Path, description: EngineGraph, output: Path, options: BuildOptions) -> None:
        """Compile for the chosen compute capabilities; needs no GPU.

        Raises:
            GraphsError: the file is not the graph that was described.
            BuildError: TensorRT-RTX refuses it.
        """
        check_graph(graph, description)
        trt = self._module()
        capabilities = options.compute_capabilities or DEFAULT_CAPABILITIES

        def configure(config: Any) -> None:
            config.num_compute_capabilities = len(capabilities)
            for index, capability in enumerate(capabilities):
                name = f"SM{capability.replace('.', '')}"
                config.set_compute_capability(getattr(trt.ComputeCapability, name), index)

        output.write_bytes(serialize(trt, graph, self.profiles(options), options, configure=configure))

    def load(self, path: Path, *, threads: int) -> Engine:
        """Load on this machine's GPU, as the server does."""
        self.device()
        del threads
        engine_tensorrt = importlib.import_module("staindiffuser.triton_models.engine.engine_tensorrt")
        return HostEngine(engine_tensorrt.load(path))

    def _module(self) -> Any:
        module = installed("tensorrt_rtx")
        if module is not None:
            return module
        raise missing(self.target, f"TensorRT-RTX is not installed: {_INSTALL}")
