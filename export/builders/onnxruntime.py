"""Target ``onnxruntime``: any CPU. The embedded server's default, and what tests and the demonstration run.

The engine is the graph itself. Optimising it offline was measured on an image branch (k = 2, 256 px, one thread): a
graph serialised at the level "extended" or "all" gives the same bytes, runs no faster (157 and 163 against 160 ms a
tile, within the noise), loads 30 ms sooner, and is twice as large; the one at "all" also holds the memory layout of the
machine that wrote it. So the portable bytes are kept, and ONNX Runtime optimises them when it loads them.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path

from staindiffuser.export.builders.base import Device, Engine
from staindiffuser.export.builders.devices import processor
from staindiffuser.export.builders.graph_engine import GraphEngineBuilder
from staindiffuser.export.errors import BuilderMissingError

__all__ = ["OnnxRuntimeBuilder"]


class OnnxRuntimeBuilder(GraphEngineBuilder):
    """See :class:`staindiffuser.export.builders.base.Builder`."""

    target = "onnxruntime"
    runner = "engine_onnxruntime"
    precisions: Sequence[str] = ("fp32", "fp16")

    def version(self) -> str:
        """The installed ONNX Runtime."""
        try:
            return f"onnxruntime {importlib.metadata.version('onnxruntime')}"
        except importlib.metadata.PackageNotFoundError:
            raise BuilderMissingError("ONNX Runtime is not installed: pip install 'staindiffuser[export]'") from None

    def device(self) -> Device:
        """This machine's processor."""
        return processor()

    def load(self, path: Path, *, threads: int) -> Engine:
        """One session, with the options the server uses."""
        from staindiffuser.triton_models.engine import engine_onnxruntime

        return engine_onnxruntime.load(path, threads=threads)
