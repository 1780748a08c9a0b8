"""Target ``openvino``: a CPU, in float32, bfloat16 or 8 bits.

The engine is the graph, marked with the precision that it is computed in. In bfloat16 convolutions read bfloat16 and
sum in float32, and what follows the last convolution stays in float32. Only processors with such instructions take it
(AVX-512 BF16, AMX): elsewhere OpenVINO would silently compute in float32. For 8 bits the graphs bring copies
(:mod:`staindiffuser.export.int8`), whose other layers are computed in bfloat16.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from staindiffuser.export.builders.base import BuildOptions, Device, Engine, refuse_unused
from staindiffuser.export.builders.devices import processor
from staindiffuser.export.builders.graph_engine import GraphEngineBuilder
from staindiffuser.export.builders.missing import missing
from staindiffuser.export.description import QUALITY, EngineGraph
from staindiffuser.export.errors import BuildError, ExportUsageError

if TYPE_CHECKING:
    import onnx

__all__ = ["PRECISIONS", "OpenVINOBuilder", "mark"]

PRECISIONS = ("fp32", "bf16", "int8")
"""In which it computes float32 graphs."""


def mark(model: onnx.ModelProto, precision: str) -> None:
    """Write the precision that a graph is computed in into its metadata."""
    from staindiffuser.triton_models.engine.engine_openvino import PRECISION

    model.metadata_props.add(key=PRECISION, value=precision)


class OpenVINOBuilder(GraphEngineBuilder):
    """See :class:`staindiffuser.export.builders.base.Builder`."""

    target = "openvino"
    runner = "engine_openvino"
    precisions: Sequence[str] = ("fp32",)

    def version(self) -> str:
        """The installed OpenVINO, without importing it."""
        try:
            return f"openvino {importlib.metadata.version('openvino')}"
        except importlib.metadata.PackageNotFoundError:
            raise missing(self.target, "OpenVINO is not installed: pip install 'staindiffuser[openvino]'") from None

    def device(self) -> Device:
        """This machine's processor."""
        return processor()

    def check(self, options: BuildOptions) -> None:
        """Only threads, batch sizes and a precision that this processor has are taken."""
        refuse_unused(self.target, options, "threads", "precision")
        if options.precision not in ("", *PRECISIONS):
            raise ExportUsageError(f"--precision {options.precision}: target openvino has {', '.join(PRECISIONS)}")
        self.require(options.precision or "fp32")

    def require(self, precision: str) -> None:
        """Ask OpenVINO what the processor can do."""
        self.version()
        from staindiffuser.triton_models.engine import engine_openvino

        if not engine_openvino.computes(precision):
            raise missing(
                self.target,
                f"{processor().name} has no instructions for {precision} (AVX-512 BF16, AMX): choose --precision fp32",
            )

    def settings(self, options: BuildOptions) -> Mapping[str, Any]:
        """The precision."""
        return {"precision": options.precision or "fp32"}

    def build(self, graph: Path, description: EngineGraph, output: Path, options: BuildOptions) -> None:
        """Check the graph, copy it, and write the precision into the copy.

        Raises:
            GraphsError: the file is not a valid ONNX model, or its tensors do not match the description.
            BuildError: OpenVINO cannot run it.
        """
        import onnx

        from staindiffuser.triton_models.engine import engine_openvino

        super().build(graph, description, output, options)
        model = onnx.load(output)
        # Distances and thresholds that judge a tile need all digits, and take no time.
        judges = description.outputs[0].name.startswith(QUALITY.upper())
        precision = "fp32" if judges else options.precision or "fp32"
        mark(model, precision)
        onnx.save(model, output)
        try:
            engine_openvino.load(output, threads=1).close()
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise BuildError(f"OpenVINO cannot run {graph}: {reason[:300]}") from error

    def load(self, path: Path, *, threads: int) -> Engine:
        """Compile the graph as the server does."""
        from staindiffuser.triton_models.engine import engine_openvino

        return engine_openvino.load(path, threads=threads)

    def load_joined(self, paths: Sequence[Path], *, threads: int) -> Engine:
        """Compile the graphs as one, as the server's flavour ``single`` does."""
        from staindiffuser.triton_models.engine import engine_openvino

        return engine_openvino.load_joined(paths, threads=threads)
