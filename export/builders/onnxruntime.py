"""Target ``onnxruntime``: any CPU. The embedded server's default, and what tests and the demonstration run.

The engine is the graph itself. Optimising it offline was measured on a picture branch (k = 2, 256 px, one thread): a
graph serialised at the level "extended" or "all" gives the same bytes, runs no faster (157 and 163 against 160 ms a
tile, within the noise), loads 30 ms sooner, and is twice as large; the one at "all" also holds the memory layout of the
machine that wrote it. So the portable bytes are kept, and ONNX Runtime optimises them when it loads them.
"""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path

from staindiffuser.export.builders.base import BuildOptions, Device, Engine
from staindiffuser.export.description import EngineGraph
from staindiffuser.export.errors import BuilderMissingError, GraphsError

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
        return Device(kind="cpu", name=_processor())

    def build(self, graph: Path, description: EngineGraph, output: Path, options: BuildOptions) -> None:
        """Check the graph and copy it.

        Raises:
            GraphsError: the file is not a valid ONNX model, or its tensors are not those described.
        """
        import onnx

        try:
            model = onnx.load(graph, load_external_data=False)
            onnx.checker.check_model(model)
        except Exception as error:  # protobuf's and the checker's errors share no base
            raise GraphsError(f"{graph} is not a valid ONNX model: {str(error).splitlines()[0]}") from error
        for side, tensors, described in (
            ("input", model.graph.input, description.inputs),
            ("output", model.graph.output, description.outputs),
        ):
            found = {}
            for tensor in tensors:
                dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.type.tensor_type.elem_type).name
                found[tensor.name] = (dtype, tuple(d.dim_value for d in tensor.type.tensor_type.shape.dim[1:]))
            for spec in described:
                if found.get(spec.name) != (spec.dtype, spec.shape):
                    raise GraphsError(
                        f"{graph}: {side} {spec.name} is {found.get(spec.name)} in the graph, "
                        f"{(spec.dtype, spec.shape)} in the description: export the graphs again"
                    )
        shutil.copyfile(graph, output)

    def load(self, path: Path, *, threads: int) -> Engine:
        """One session, with the options the server uses."""
        from staindiffuser.triton_models.engine import engine_onnxruntime

        return engine_onnxruntime.load(path, threads=threads)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
