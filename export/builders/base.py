"""What every target's builder offers; one file per target implements it.

A builder turns one ONNX graph into one engine file and knows how that engine is run: here, for parity and benchmarks,
and in Triton, by naming the runner that the Python backend loads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from staindiffuser.export.description import EngineGraph
from staindiffuser.export.errors import ExportUsageError

__all__ = ["BuildOptions", "Builder", "Device", "Engine", "HostEngine", "Profile", "engine_key", "refuse_unused"]

Profile = tuple[int, int, int]
"""Smallest, preferred and largest batch of an optimisation profile."""


VERBOSITIES = ("none", "names", "detailed")


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What may be chosen when engines are built. A field a target has no use for is refused by that target."""

    max_batch: int = 8
    """Largest batch of tiles that the engines and Triton accept."""
    threads: int = 0
    """A CPU engine's threads; 0 for as many as the serving process may use."""
    batches: tuple[int, ...] = ()
    """Batches that clients prefer, such as (1, 8, 32); the largest is ``max_batch``. Empty: 1 and ``max_batch``."""
    compute_capabilities: tuple[str, ...] = ()
    """GPUs to compile for ahead of time, such as ``("8.9", "12.0")``; empty for the target's default."""
    workspace_mib: int = 0
    """Most scratch memory that TensorRT may plan with, MiB; 0 for all of the GPU's."""
    verbosity: str = "names"
    """What a TensorRT plan tells the inspector about itself: ``none``, ``names`` (of layers) or ``detailed``."""
    version_compatible: bool = False
    """Plans that later TensorRT versions of the same major run too (somewhat slower)."""
    weight_stripped: bool = False
    """Plans without weights: these are put back from the graph, which lies beside the plan, when it is loaded."""

    def __post_init__(self) -> None:
        if self.batches:
            if min(self.batches) < 1 or len(set(self.batches)) != len(self.batches):
                raise ExportUsageError(f"batches {list(self.batches)}: must be different numbers from 1")
            object.__setattr__(self, "batches", tuple(sorted(self.batches)))
            object.__setattr__(self, "max_batch", self.batches[-1])
        if not 1 <= self.max_batch <= 1024:
            raise ExportUsageError(f"max batch {self.max_batch}: must be between 1 and 1024")
        if self.threads < 0:
            raise ExportUsageError(f"threads {self.threads}: must be 0 (all) or more")
        if self.workspace_mib < 0:
            raise ExportUsageError(f"workspace {self.workspace_mib} MiB: must be 0 (no limit) or more")
        if self.verbosity not in VERBOSITIES:
            raise ExportUsageError(f"verbosity {self.verbosity!r}: choose {', '.join(VERBOSITIES)}")

    @property
    def preferred(self) -> tuple[int, ...]:
        """Preferred batch sizes, smallest first."""
        return self.batches or tuple(sorted({1, self.max_batch}))

    @property
    def one_profile(self) -> tuple[Profile, ...]:
        """A single profile over all batches."""
        return ((1, self.max_batch, self.max_batch),)

    @property
    def profiles(self) -> tuple[Profile, ...]:
        """A profile per preferred batch, best at its largest: (1, 8, 32) gives 1..1, 2..8 and 9..32."""
        return tuple((low + 1, high, high) for low, high in pairwise((0, *self.preferred)))

    def corners(self, profiles: Sequence[Profile]) -> tuple[int, ...]:
        """Batch sizes at which parity is checked: both ends of every profile, what is preferred, and an odd one."""
        odd = self.max_batch // 2 if (self.max_batch // 2) % 2 else self.max_batch // 2 + 1
        ends = {batch for smallest, preferred, largest in profiles for batch in (smallest, preferred, largest)}
        return tuple(sorted({1, min(odd, self.max_batch), *self.preferred, *ends}))


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

    def check(self, options: BuildOptions) -> None:
        """Refuse options that this target has no use for.

        Raises:
            ExportUsageError: names the option.
        """

    def profiles(self, options: BuildOptions) -> tuple[Profile, ...]:
        """Optimisation profiles that an engine gets."""

    def settings(self, options: BuildOptions) -> Mapping[str, Any]:
        """What else of the options decides an engine's bytes."""

    def build(self, graph: Path, description: EngineGraph, output: Path, options: BuildOptions) -> None:
        """Write one engine file."""

    def load(self, path: Path, *, threads: int) -> Engine:
        """Load an engine as the server does, to run it in this process; NumPy arrays in and out.

        Raises:
            BuilderMissingError: this machine cannot run it.
        """


class HostEngine:
    """An engine of a GPU, with NumPy arrays in and out: what parity and benchmarks call."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def run(self, inputs: dict[str, Any], outputs: list[str]) -> dict[str, Any]:
        """Run one batch and copy the outputs to the host."""
        results = self._engine.run(inputs, outputs)
        # CuPy arrays refuse to become NumPy's unasked; torch tensors have to be moved first.
        copies = {n: a.get() if hasattr(a, "get") else a.cpu() if hasattr(a, "cpu") else a for n, a in results.items()}
        return {name: np.asarray(array) for name, array in copies.items()}

    def close(self) -> None:
        """Free what the engine holds."""
        self._engine.close()


def refuse_unused(target: str, options: BuildOptions, *used: str) -> None:
    """Refuse every option that was chosen and that the target has no use for.

    Args:
        target: as on the command line.
        options: what was chosen.
        used: fields that this target uses, besides the batches.

    Raises:
        ExportUsageError: names the option.
    """
    for field in fields(options):
        if field.name not in ("max_batch", "batches", *used) and getattr(options, field.name) != field.default:
            raise ExportUsageError(f"target {target} has no use for --{field.name.replace('_', '-')}: leave it out")


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
        "profiles": builder.profiles(options),
        "settings": dict(builder.settings(options)),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
