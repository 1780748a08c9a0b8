"""Target ``auto``: the engines that are fastest on this machine, by measurement when a repository is built.

The choice is made once. It is recorded in the manifest, and as long as processor, packages, graphs and options stay the
same, the same engines are taken again without measuring, so that the same tile gets the same bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from pydantic.dataclasses import dataclass

from staindiffuser.errors import DependencyError
from staindiffuser.export import builders
from staindiffuser.export.builders import BuildOptions, Engine
from staindiffuser.export.builders.devices import processor
from staindiffuser.export.description import INT8, GraphSet
from staindiffuser.export.errors import BuilderMissingError
from staindiffuser.export.loading import load_engines
from staindiffuser.export.parity import Golden, run_pipeline
from staindiffuser.records import STRICT
from staindiffuser.triton_models.shared.cpus import available_cpus

__all__ = ["AUTO", "CANDIDATES", "Choice", "available", "choice_key", "fastest", "load_candidate", "measure"]

AUTO = "auto"
CANDIDATES = (("onnxruntime", "fp32"), ("openvino", "fp32"), ("openvino", "bf16"), ("openvino", "int8"))
"""Target and precision, from the most conservative on."""
WORTHWHILE = 0.95
"""A candidate is taken instead of a more conservative one if it needs at most this share of its time (ours)."""
_BATCH = 2
_ROUNDS = 3


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Choice:
    """What was measured, for the manifest."""

    key: str
    """See :func:`choice_key`."""
    processor: str
    batch: int
    rounds: int
    ms_per_tile: Mapping[str, float]
    """Median time of all stains and cell maps with their noise, by candidate: ``openvino bf16``, …"""
    absent: Mapping[str, str]
    """Candidates that cannot run here, and why."""


def available(graphs: GraphSet, options: BuildOptions) -> tuple[dict[str, BuildOptions], dict[str, str]]:
    """The candidates that can run here, with their options, and why the others cannot.

    Raises:
        BuilderMissingError: none can.
    """
    found: dict[str, BuildOptions] = {}
    absent: dict[str, str] = {}
    for target, precision in CANDIDATES:
        name = f"{target} {precision}"
        chosen = dataclasses.replace(options, precision="" if precision == graphs.precision else precision)
        builder = builders.get(target)
        try:
            builder.version()
            builder.check(chosen)
        except DependencyError as error:
            absent[name] = str(error).partition("; targets that work here")[0].removeprefix(f"target {target}: ")
            continue
        if graphs.precision not in builder.precisions:
            absent[name] = f"does not take {graphs.precision} graphs"
            continue
        if precision == INT8 and not graphs.int8:
            absent[name] = "the graphs have no copies in 8 bits (export int8)"
            continue
        found[name] = chosen
    if not found:
        raise BuilderMissingError(f"target auto: nothing can run {graphs.precision} graphs here: {absent}")
    return found, absent


def choice_key(graphs: GraphSet, options: BuildOptions, flavour: str) -> str:
    """Hash of what a choice depends on: processor, cores, candidates with their versions, graphs, flavour, options."""
    found, _ = available(graphs, options)
    parts = {
        "processor": dataclasses.asdict(processor()),
        "cpus": available_cpus(),
        "candidates": {name: builders.get(name.split()[0]).version() for name in found},
        "graphs": dataclasses.asdict(graphs),
        "flavour": flavour,
        "options": dataclasses.asdict(options),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def measure(graphs_dir: Path, options: BuildOptions, flavour: str, progress: Callable[[str], None]) -> Choice:
    """Time every candidate on golden samples, in turns, so that a slow moment of the machine meets all."""
    graphs = GraphSet.load(graphs_dir)
    found, absent = available(graphs, options)
    for name, why in absent.items():
        progress(f"{name}: not here: {why}")
    golden = Golden.load(graphs_dir / graphs.golden)
    batch = min(_BATCH, options.max_batch)
    rows = np.arange(batch) % golden.samples
    inputs = {name: array[rows] for name, array in golden.inputs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in found}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        engines = {
            name: load_candidate(graphs_dir, name, chosen, flavour, Path(folder) / name, stack)
            for name, chosen in found.items()
        }
        for index in range(_ROUNDS + 1 if len(found) > 1 else 0):
            for name in found:
                start = time.perf_counter()
                run_pipeline(engines[name], graphs.engines, steps=graphs.steps, tile=graphs.tile, inputs=inputs)
                if index:  # the first round warms up
                    seconds[name].append(time.perf_counter() - start)
    times = {name: statistics.median(values) * 1e3 / batch for name, values in seconds.items() if values}
    for name, milliseconds in times.items():
        progress(f"{name}: {milliseconds:.0f} ms a tile")
    return Choice(
        key=choice_key(graphs, options, flavour),
        processor=processor().name,
        batch=batch,
        rounds=_ROUNDS,
        ms_per_tile=times or dict.fromkeys(found, 0.0),
        absent=absent,
    )


def fastest(ms_per_tile: Mapping[str, float]) -> str:
    """The candidate to take: the fastest, but none that is hardly faster than a more conservative one."""
    names = [f"{target} {precision}" for target, precision in CANDIDATES]
    best, *others = [name for name in names if name in ms_per_tile]
    for name in others:
        if ms_per_tile[name] < WORTHWHILE * ms_per_tile[best]:
            best = name
    return best


def load_candidate(
    graphs_dir: Path, name: str, options: BuildOptions, flavour: str, folder: Path, stack: contextlib.ExitStack
) -> dict[str, Engine]:
    """Build and load the engines of a candidate as a server of a flavour does.

    Args:
        graphs_dir: what ``export graphs`` wrote.
        name: of :func:`available`.
        options: that it came with.
        flavour: of the server.
        folder: where the engines are written; must not exist.
        stack: closes them.

    Returns:
        Engines by name; those that are one graph are one engine, under each of their names.
    """
    builder = builders.get(name.split()[0])
    graphs = GraphSet.load(graphs_dir).at(options.precision)
    folder.mkdir()
    files = {engine: folder / f"{engine}{builder.suffix}" for engine in graphs.engines}
    for engine, graph in graphs.engines.items():
        builder.build(graphs_dir / graph.file, graph, files[engine], options)
    engines = load_engines(builder, files, threads=options.threads, flavour=flavour)
    for loaded in set(engines.values()):
        stack.callback(loaded.close)
    return engines
