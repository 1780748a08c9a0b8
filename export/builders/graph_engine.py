"""Base of targets whose engine file is the graph itself, which the runtime optimises when it loads it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from staindiffuser.export.builders.base import BuildOptions, Profile, refuse_unused
from staindiffuser.export.builders.checks import check_graph
from staindiffuser.export.description import EngineGraph

__all__ = ["GraphEngineBuilder"]


class GraphEngineBuilder:
    """Most of a :class:`~staindiffuser.export.builders.base.Builder`; a target adds its version, device and loading."""

    target: str
    suffix = ".onnx"

    def require(self, precision: str) -> None:
        """Nothing: a runtime that has no instructions for a precision takes others that give the same."""

    def check(self, options: BuildOptions) -> None:
        """Only threads and batch sizes are used."""
        refuse_unused(self.target, options, "threads")

    def profiles(self, options: BuildOptions) -> tuple[Profile, ...]:
        """Any batch runs."""
        return options.one_profile

    def settings(self, options: BuildOptions) -> Mapping[str, Any]:
        """Nothing: threads are the session's."""
        return {}

    def build(self, graph: Path, description: EngineGraph, output: Path, options: BuildOptions) -> None:
        """Check the graph and copy it.

        Raises:
            GraphsError: the file is not a valid ONNX model, or its tensors do not match the description.
        """
        check_graph(graph, description)
        shutil.copyfile(graph, output)
