"""Target ``torch``: the graph run by torch, under a captured CUDA graph on a GPU.

The engine of a GPU without TensorRT, and the yardstick that TensorRT must beat. The engine file is the graph itself;
``triton_models/engine/engine_torch.py`` says how it is run. Where there is no GPU it runs on the CPU, without capture:
slower than ``onnxruntime``, and good for comparing.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from staindiffuser.export.builders.base import BuildOptions, Device, Engine, HostEngine, Profile, refuse_unused
from staindiffuser.export.builders.checks import check_graph
from staindiffuser.export.builders.devices import find_gpu, processor
from staindiffuser.export.builders.missing import missing
from staindiffuser.export.description import EngineGraph

__all__ = ["TorchBuilder"]


class TorchBuilder:
    """See :class:`staindiffuser.export.builders.base.Builder`."""

    target = "torch"
    suffix = ".onnx"
    runner = "engine_torch"
    precisions: Sequence[str] = ("fp32", "fp16", "bf16")

    def version(self) -> str:
        """The installed torch, asked without importing it."""
        try:
            return f"torch {importlib.metadata.version('torch')}"
        except importlib.metadata.PackageNotFoundError:
            raise missing(self.target, "torch is not installed: pip install 'staindiffuser[train]'") from None

    def device(self) -> Device:
        """This machine's GPU if torch can use it, else its processor."""
        gpu = find_gpu()
        if gpu is not None and "+cpu" not in self.version():
            return gpu
        return processor()

    def check(self, options: BuildOptions) -> None:
        """Only threads and batches mean something here."""
        refuse_unused(self.target, options, "threads")

    def profiles(self, options: BuildOptions) -> tuple[Profile, ...]:
        """Any batch runs; each that is met is captured."""
        return options.one_profile

    def settings(self, options: BuildOptions) -> Mapping[str, Any]:
        """Nothing."""
        return {}

    def build(self, graph: Path, description: EngineGraph, output: Path, options: BuildOptions) -> None:
        """Check the graph and copy it.

        Raises:
            GraphsError: the file is not the graph that was described.
        """
        check_graph(graph, description)
        shutil.copyfile(graph, output)

    def load(self, path: Path, *, threads: int) -> Engine:
        """One program on the device, as the server does."""
        self.version()
        engine_torch = importlib.import_module("staindiffuser.triton_models.engine.engine_torch")
        return HostEngine(engine_torch.load(path, threads=threads))
