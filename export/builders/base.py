"""What every target's builder offers; one file per target implements it.

A builder turns one ONNX graph into one engine file and knows how that engine is run: here, for parity and benchmarks,
and in Triton, by naming the runner that the Python backend loads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from staindiffuser.export.description import EngineGraph
from staindiffuser.export.errors import ExportUsageError

__all__ = ["BuildOptions", "Builder", "Device", "Engine", "engine_key"]


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What may be chosen when engines are built. A field a target has no use for is refused by that target."""

    max_batch: int = 8
    """Largest batch of tiles that the engines and Triton accept."""
    threads: int = 0
    """A CPU engine's threads; 0 for as many as the serving process may use."""

    def __post_init__(self) -> None:
        if not 1 <= self.max_batch <= 1024:
            raise ExportUsageError(f"max batch {self.max_batch}: must be between 1 and 1024")
        if self.threads < 0:
            raise ExportUsageError(f"threads {self.threads}: must be 0 (all) or more")

    @property
    def profile(self) -> tuple[int, int, int]:
        """Smallest, preferred and largest batch."""
        return (1, self.max_batch, self.max_batch)

    @property
    def corners(self) -> tuple[int, ...]:
        """Batch sizes at which parity is checked: one, the largest, and an odd one between."""
        odd = self.max_batch // 2 if (self.max_batch // 2) % 2 else self.max_batch // 2 + 1
        return tuple(sorted({1, min(odd, self.max_batch), self.max_batch}))


@dataclass(frozen=True, kw_only=True)
class Device:
    """What an engine was built for, and checked on."""

    kind: str
    """``cpu`` or ``cuda``."""
    name: str
    """The processor's or the GPU's name."""
    compute_capability: str = ""
    """Of a GPU, such as ``8.9``; empty for a CPU."""


class Engine(Protocol):
    """A loaded engine: see ``triton_models/engine``."""

    def run(self, inputs: dict[str, Any], outputs: list[str]) -> dict[str, Any]:
        """Run one batch of NumPy arrays, batch dimension first; returns the outputs named."""

    def close(self) -> None:
        """Free what the engine holds."""


class Builder(Protocol):
    """One target. ``staindiffuser.export.builders.get`` finds it by name."""

    target: str
    """As on the command line: ``onnxruntime``, ``tensorrt``, …"""
    suffix: str
    """Of an engine's file, such as ``.onnx``."""
    runner: str
    """The module in ``triton_models/engine`` that loads the engine in Triton's Python backend."""
    precisions: Sequence[str]
    """Graph precisions this target accepts."""

    def version(self) -> str:
        """The installed builder, such as ``onnxruntime 1.22.0``, without importing it if that is slow.

        Raises:
            BuilderMissingError: it is not installed; says how to install it and which targets work now.
        """

    def device(self) -> Device:
        """The device of this machine that engines are built for.

        Raises:
            BuilderMissingError: this machine has none.
        """

    def build(self, graph: Path, description: EngineGraph, output: Path, options: BuildOptions) -> None:
        """Write one engine file."""

    def load(self, path: Path, *, threads: int) -> Engine:
        """Load an engine as the server does, to run it in this process."""


def engine_key(builder: Builder, graph: EngineGraph, precision: str, options: BuildOptions) -> str:
    """What decides an engine's bytes, hashed: the same key needs no second build."""
    device = builder.device()
    built_for = asdict(device) if device.kind == "cuda" else {"kind": device.kind}
    parts: Mapping[str, Any] = {
        "graph": graph.graph_sha256,
        "target": builder.target,
        "builder": builder.version(),
        "device": built_for,
        "precision": precision,
        "profile": options.profile,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
