"""From an ONNX graph to a serialised engine: what TensorRT 10, TensorRT 11 and TensorRT-RTX have in common.

All three have the same Python API, so the module is an argument. Networks are strongly typed: the graph alone sets the
precision (in TensorRT 11 there is no other way). TF32, which is on by default, is turned off, because results are
compared with float32 and the torch target does not use it either.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from staindiffuser.export.builders.base import BuildOptions, Profile
from staindiffuser.export.errors import BuildError

__all__ = ["installed", "serialize"]

_VERBOSITY = {"none": "NONE", "names": "LAYER_NAMES_ONLY", "detailed": "DETAILED"}


def installed(name: str) -> Any:
    """Import ``tensorrt`` or ``tensorrt_rtx``; the bindings package alone is enough where the libraries are installed.

    Returns:
        The module, or None if it is missing or only type stubs are installed, which make an empty package importable.
    """
    for candidate in (name, f"{name}_bindings"):
        try:
            module = importlib.import_module(candidate)
        except (ImportError, OSError):
            continue
        if hasattr(module, "Builder"):
            return module
    return None


def serialize(
    trt: Any,
    graph: Path,
    profiles: Sequence[Profile],
    options: BuildOptions,
    *,
    configure: Callable[[Any], None] = lambda config: None,
) -> bytes:
    """Compile a graph.

    Args:
        trt: the ``tensorrt`` or ``tensorrt_rtx`` module.
        graph: ONNX file; its first dimension is the batch, the others are static.
        profiles: batches to optimise for.
        options: workspace, verbosity and kind of plan.
        configure: what else to do to the builder's configuration.

    Raises:
        BuildError: the graph was refused or could not be compiled; says why.
    """
    log = _logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(graph.read_bytes()):
        raise BuildError(f"{graph}: {trt.__name__} refuses the graph: {_reason(parser, log)}")
    config = builder.create_builder_config()
    config.profiling_verbosity = getattr(trt.ProfilingVerbosity, _VERBOSITY[options.verbosity])
    config.clear_flag(trt.BuilderFlag.TF32)
    if options.workspace_mib:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.weight_stripped:
        # Promising to refit the same weights keeps every fusion.
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
    configure(config)
    for batches in profiles:
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            rest = tuple(tensor.shape)[1:]
            profile.set_shape(tensor.name, *((batch, *rest) for batch in batches))
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildError(f"{graph}: {trt.__name__} cannot compile the graph: {log.reason()}")
    return bytes(plan)


def _logger(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        """Collects errors, of which one line is shown."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

        def reason(self) -> str:
            # Missing GPUs are reported on the way, but are not why a build fails.
            telling = [message for message in self.errors if "cudaError" not in message]
            return (telling or self.errors or ["no reason given"])[0]

    return Log()


def _reason(parser: Any, log: Any) -> str:
    if not parser.num_errors:
        return str(log.reason())
    error = parser.get_error(parser.num_errors - 1)
    return f"node {error.node()} ({error.node_name() or 'unnamed'}): {log.reason() if log.errors else error.desc()}"
