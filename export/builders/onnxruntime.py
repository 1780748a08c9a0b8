"""Target ``onnxruntime``: any CPU. The embedded server's default, and what tests and the demonstration run.

The engine is the graph itself. Optimising it offline was measured on a picture branch (k = 2, 256 px, one thread): a
graph serialised at the level "extended" or "all" gives the same bytes, runs no faster (157 and 163 against 160 ms a
tile, within the noise), loads 30 ms sooner, and is twice as large; the one at "all" also holds the memory layout of the
machine that wrote it. So the portable bytes are kept, and ONNX Runtime optimises them when it loads them.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from staindiffuser.export.builders.base import BuildOptions, Device, Engine, Profile, refuse_unused
from staindiffuser.export.builders.checks import check_graph
from staindiffuser.export.builders.devices import processor
from staindiffuser.export.description import EngineGraph
from staindiffuser.export.errors import BuilderMissingError

__all__ = ["OnnxRuntimeBuilder"]


class OnnxRuntimeBuilder:
    """See :class:`staindiffuser.export.builders.base.Builder`."""

    target = "onnxruntime"
    suffix = ".onnx"
    runner = "engine_onnxruntime"
    precisions: Sequence[str] = ("fp32", "fp16")

    def version(self) -> str:
        """The installed ONNX Runtime."""
        try:
            return f"onnxruntime {importlib.metadata.version('onnxruntime')}"
        except importlib.metadata.PackageNotFoundError:
            raise BuilderMissingError("ONNX Runtime is not installed: pip install 'staindiffuser[serve]'") from None

    def device(self) -> Device:
        """This machine's processor."""
        return processor()

    def check(self, options: BuildOptions) -> None:
        """Only threads and batches mean something here."""
        refuse_unused(self.target, options, "threads")

    def profiles(self, options: BuildOptions) -> tuple[Profile, ...]:
        """ONNX Runtime takes any batch."""
        return options.one_profile

    def settings(self, options: BuildOptions) -> Mapping[str, Any]:
        """Nothing: threads are the session's."""
        return {}

    def build(self, graph: Path, description: EngineGraph, output: Path, options: BuildOptions) -> None:
        """Check the graph and copy it.

        Raises:
            GraphsError: the file is not a valid ONNX model, or its tensors are not those described.
        """
        check_graph(graph, description)
        shutil.copyfile(graph, output)

    def load(self, path: Path, *, threads: int) -> Engine:
        """One session, with the options the server uses."""
        from staindiffuser.triton_models.engine import engine_onnxruntime

        return engine_onnxruntime.load(path, threads=threads)
