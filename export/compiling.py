"""Ahead-of-time compilation on a machine without a GPU, which shows only that the graphs compile.

The engines can be copied to a machine with a GPU, but a repository is published only there, after the parity gate.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from staindiffuser.export.builders import BuildOptions
from staindiffuser.export.builders.tensorrt_rtx import TensorRTRtxBuilder
from staindiffuser.export.description import GraphSet
from staindiffuser.export.errors import ExportUsageError
from staindiffuser.export.publishing import locked, staging_folder

__all__ = ["compile_engines"]


def compile_engines(
    graphs_dir: Path,
    output: Path,
    options: BuildOptions,
    *,
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Path]:
    """Compile every graph for the chosen compute capabilities.

    Args:
        graphs_dir: what ``export graphs`` wrote.
        output: folder of engines; replaced as a whole if it contains only engines.
        options: batches and compute capabilities.
        progress: called with one line per engine.

    Returns:
        The engines' files by name.

    Raises:
        GraphsError, ManifestError: the graphs are missing or damaged.
        BuildError: a graph does not compile.
        BuilderMissingError: TensorRT-RTX is not installed.
        ExportUsageError: an unknown compute capability, or an output that cannot be written.
    """
    builder = TensorRTRtxBuilder()
    builder.check(options)
    graphs = GraphSet.load(graphs_dir)
    output = output.resolve()
    if output.exists() and (not output.is_dir() or any(p.suffix != builder.suffix for p in output.iterdir())):
        raise ExportUsageError(f"{output} contains files other than engines: choose another folder")
    try:
        with locked(output), staging_folder(output) as folder:
            for name, engine in graphs.engines.items():
                progress(f"compiling {name}")
                target = folder / f"{name}{builder.suffix}"
                builder.build(graphs_dir / engine.file, engine, target, options)
    except OSError as error:
        raise ExportUsageError(
            f"{output} cannot be written: {error.strerror or error}: nothing was published"
        ) from error
    return {name: output / f"{name}{builder.suffix}" for name in graphs.engines}
