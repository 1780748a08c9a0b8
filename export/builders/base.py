"""The interface of a target's builder; each target implements it in its own file.

A builder turns one ONNX graph into one engine file, and knows how to run it: in this process, for parity and
benchmarks, and in Triton, by naming the runner that the Python backend loads.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from pydantic.dataclasses import dataclass

from staindiffuser.export.description import EngineGraph
from staindiffuser.export.errors import ExportUsageError
from staindiffuser.records import STRICT

__all__ = [
    "BuildOptions",
    "Builder",
    "Device",
    "Engine",
    "HostEngine",
    "Joins",
    "Profile",
    "engine_key",
    "refuse_unused",
]

Profile = tuple[int, int, int]
"""Smallest, optimal and largest batch of an optimisation profile."""


VERBOSITIES = ("none", "names", "detailed")
_OF_EVERY_TARGET = ("max_batch", "batches", "queue_length", "queue_seconds")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Options for building engines. A target refuses options that it does not use."""

    max_batch: int = 8
    """Largest batch of tiles that the engines and Triton accept."""
    threads: int = 0
    """Threads of each CPU engine; 0 for all cores that the serving process may use."""
    precision: str = ""
    """Compute float32 graphs in less than float32: ``bf16``, ``int8``. Empty: in the graphs' own precision."""
    batches: tuple[int, ...] = ()
    """Batch sizes to optimise for, such as (1, 8, 32); the largest is ``max_batch``. Empty: 1 and ``max_batch``."""
    compute_capabilities: tuple[str, ...] = ()
    """GPUs to compile for ahead of time, such as ``("8.9", "12.0")``; empty for the target's default."""
    workspace_mib: int = 0
    """Scratch memory that TensorRT may use while building, MiB; 0 for all of the GPU's memory."""
    verbosity: str = "names"
    """Layer information stored in TensorRT plans: ``none``, ``names`` or ``detailed``."""
    version_compatible: bool = False
    """Plans that later TensorRT releases of the same major version can run (somewhat slower)."""
    weight_stripped: bool = False
    """Plans without weights, refitted on loading from the graph that is stored beside the plan."""

    queue_length: int | None = None
    """Requests of one priority that may wait for a model; the next one is refused. None: 64 (ours)."""
    queue_seconds: float | None = None
    """Longest wait in a model's queue; then the request is refused. None: 30 (ours)."""

    def __post_init__(self) -> None:
        if self.queue_length is not None and self.queue_length < 1:
            raise ExportUsageError(f"queue length {self.queue_length}: must be at least 1")
        if self.queue_seconds is not None and not 0.001 <= self.queue_seconds <= 3600:
            raise ExportUsageError(f"queue seconds {self.queue_seconds:g}: must be from 1 ms to an hour")
        if self.batches:
            if min(self.batches) < 1 or len(set(self.batches)) != len(self.batches):
                raise ExportUsageError(f"batches {list(self.batches)}: must be distinct and at least 1")
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
        """One profile per preferred batch size, optimal at its largest: (1, 8, 32) gives 1..1, 2..8 and 9..32."""
        return tuple((low + 1, high, high) for low, high in pairwise((0, *self.preferred)))

    def corners(self, profiles: Sequence[Profile]) -> tuple[int, ...]:
        """Batch sizes at which parity is checked: the ends of every profile, the preferred sizes, and an odd one."""
        odd = self.max_batch // 2 if (self.max_batch // 2) % 2 else self.max_batch // 2 + 1
        ends = {batch for smallest, preferred, largest in profiles for batch in (smallest, preferred, largest)}
        return tuple(sorted({1, min(odd, self.max_batch), *self.preferred, *ends}))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Device:
    """The device that an engine was built for and checked on."""

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
        """Release the engine's resources."""


class DeviceEngine(Engine, Protocol):
    """An engine with device arrays; see ``triton_models/engine/model.py``."""

    def receive(self, tensor: Any) -> Any:
        """Convert a NumPy array or DLPack tensor to an array on the engine's device."""

    def join(self, arrays: list[Any]) -> Any:
        """Concatenate received arrays along the batch."""


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

    def require(self, precision: str) -> None:
        """Refuse to run engines of a precision that this machine cannot compute in.

        Raises:
            BuilderMissingError: the processor lacks the instructions.
        """

    def check(self, options: BuildOptions) -> None:
        """Refuse options that this target does not use.

        Raises:
            ExportUsageError: names the option.
        """

    def profiles(self, options: BuildOptions) -> tuple[Profile, ...]:
        """Optimisation profiles of the engines."""

    def settings(self, options: BuildOptions) -> Mapping[str, Any]:
        """Options, apart from the profiles, that determine an engine's bytes."""

    def build(self, graph: Path, description: EngineGraph, output: Path, options: BuildOptions) -> None:
        """Write one engine file."""

    def load(self, path: Path, *, threads: int) -> Engine:
        """Load an engine as the server does, to run it in this process with NumPy inputs and outputs.

        Raises:
            BuilderMissingError: this machine cannot run it.
        """


@runtime_checkable
class Joins(Protocol):
    """A builder of a target in which graphs that are joined into one run faster."""

    def load_joined(self, paths: Sequence[Path], *, threads: int) -> Engine:
        """Load engine files as one graph with the outputs of all, each file after those whose outputs it reads."""


class HostEngine:
    """A GPU engine with NumPy inputs and outputs, for parity and benchmarks.

    As in the server, each tile is received from host memory and joined with the others, as if it were a request of its
    own.
    """

    def __init__(self, engine: DeviceEngine) -> None:
        self._engine = engine

    def run(self, inputs: dict[str, Any], outputs: list[str]) -> dict[str, Any]:
        """Run one batch and copy the outputs to the host."""
        receive = self._engine.receive
        rows = {n: [receive(array[i : i + 1]) for i in range(len(array))] for n, array in inputs.items()}
        results = self._engine.run({n: self._engine.join(parts) for n, parts in rows.items()}, outputs)
        # CuPy arrays need an explicit copy to NumPy; torch tensors have to be moved to the host first.
        copies = {n: a.get() if hasattr(a, "get") else a.cpu() if hasattr(a, "cpu") else a for n, a in results.items()}
        return {name: np.asarray(array) for name, array in copies.items()}

    def close(self) -> None:
        """Release the engine's resources."""
        self._engine.close()


def refuse_unused(target: str, options: BuildOptions, *used: str) -> None:
    """Refuse every option that was chosen but that the target does not use.

    Args:
        target: as on the command line.
        options: what was chosen.
        used: fields that this target uses, besides batches and queues.

    Raises:
        ExportUsageError: names the option.
    """
    for field in dataclasses.fields(options):
        if (
            field.name not in ("max_batch", "batches", "queue_length", "queue_seconds", *used)
            and getattr(options, field.name) != field.default
        ):
            raise ExportUsageError(f"target {target} does not use --{field.name.replace('_', '-')}: leave it out")


def engine_key(builder: Builder, graph: EngineGraph, precision: str, options: BuildOptions) -> str:
    """Hash of everything that determines an engine's bytes; an engine with the same key is reused."""
    device = builder.device()
    built_for = dataclasses.asdict(device) if device.kind == "cuda" else {"kind": device.kind}
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
