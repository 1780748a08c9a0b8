"""Target ``torch``: torch runs the graph, on a GPU as a captured CUDA graph.

It serves GPUs without TensorRT and is the baseline that TensorRT must beat. The engine file is the graph itself;
``triton_models/engine/engine_torch.py`` runs it. Without a GPU it runs on the CPU, uncaptured: slower than
``onnxruntime``, for comparison.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from staindiffuser.export.builders.base import BuildOptions, Device, Engine, HostEngine
from staindiffuser.export.builders.devices import find_gpu, processor
from staindiffuser.export.builders.graph_engine import GraphEngineBuilder
from staindiffuser.export.builders.missing import missing

__all__ = ["TorchBuilder"]


class TorchBuilder(GraphEngineBuilder):
    """See :class:`staindiffuser.export.builders.base.Builder`."""

    target = "torch"
    runner = "engine_torch"
    precisions: Sequence[str] = ("fp32", "fp16", "bf16")

    def version(self) -> str:
        """The installed torch, without importing it."""
        try:
            return f"torch {importlib.metadata.version('torch')}"
        except importlib.metadata.PackageNotFoundError:
            raise missing(self.target, "torch is not installed: pip install 'staindiffuser[train]'") from None

    def device(self) -> Device:
        """This machine's GPU if torch can use it, otherwise its CPU."""
        gpu = find_gpu()
        if gpu is not None and "+cpu" not in self.version():
            return gpu
        return processor()

    def settings(self, options: BuildOptions) -> Mapping[str, Any]:
        """No options; ``engine_torch.py`` never uses TF32."""
        return {"tf32": False}

    def load(self, path: Path, *, threads: int) -> Engine:
        """Load the graph on the device, as the server does."""
        self.version()
        engine_torch = importlib.import_module("staindiffuser.triton_models.engine.engine_torch")
        return HostEngine(engine_torch.load(path, threads=threads))
