"""Every engine that this machine can run, on the same weights and noise: how fast, and how near to the physical limit.

The limit is what the machine's fastest library reaches on one large convolution, in float32 and in bfloat16. Everything
runs in turns in one process; noise is made beforehand on every side.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil

from staindiffuser.benchmarks.engine_quality import dab_dice
from staindiffuser.benchmarks.engine_rows import ONE_GRAPH, REFERENCE, TURN, EnginesReport, Row
from staindiffuser.benchmarks.limits import PEAK, peak_sides
from staindiffuser.benchmarks.measuring import Machine, Others, Sample, Spread, Timing, in_turns
from staindiffuser.benchmarks.torch_sides import COMPILED, EAGER, torch_sides
from staindiffuser.errors import DependencyError, UsageError
from staindiffuser.export import builders
from staindiffuser.export.builders import BuildOptions, Engine
from staindiffuser.export.builders.base import Joins
from staindiffuser.export.builders.devices import find_gpu
from staindiffuser.export.description import INT8, QUALITY, EngineGraph, GraphSet
from staindiffuser.export.errors import ExportUsageError, ManifestError
from staindiffuser.export.parity import run_pipeline
from staindiffuser.files import file_sha256
from staindiffuser.triton_models.noise.philox import tile_noise
from staindiffuser.triton_models.shared.cpus import available_cpus

__all__ = ["bench_engines", "count_flops"]

Arrays = dict[str, np.ndarray[Any, Any]]
Progress = Callable[[str], None]
STEPS = (1, 2, 4)
STAINS = (1, 2, 4)
_PRECISIONS = ("", "bf16", INT8)


def bench_engines(
    graphs_dir: Path,
    checkpoint: Path,
    *,
    batches: Sequence[int] = (1, 8),
    rounds: int = 5,
    turn: float = TURN,
    threads: int = 0,
    only: Sequence[str] = (),
    parts: bool = True,
    compiled: bool = False,
    tiles: Path | None = None,
    most_tiles: int = 40,
    progress: Progress = lambda message: None,
) -> EnginesReport:
    """Measure graphs and the checkpoint that they came from (needs torch).

    Args:
        graphs_dir: what ``export graphs`` wrote.
        checkpoint: the checkpoint folder.
        batches: batch sizes.
        rounds: counted rounds, after one that is not.
        turn: seconds that each side runs at least in each of them.
        threads: of every engine; 0 for all that the process may use.
        only: engines to measure, such as ``openvino bf16``; empty for all.
        parts: at the first batch size, also encoder, image of 1, 2 and 4 steps, cell map, and other numbers of stains
            than the model's.
        compiled: also torch.compile, which takes minutes before it runs.
        tiles: paired tiles, on whose test split the engines are scored.
        most_tiles: of them at most.
        progress: called with one line per step.

    Raises:
        ManifestError: the graphs come from another checkpoint.
        UsageError: ``only`` names an engine that is not there.
    """
    import torch

    graphs = GraphSet.load(graphs_dir)
    if file_sha256(checkpoint / "model.safetensors") != graphs.checkpoint_sha256:
        raise ManifestError(f"{graphs_dir} was exported from another checkpoint than {checkpoint}: export it again")
    threads = threads or available_cpus()
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        # What judges tiles paints nothing, and torch has no side of it.
        painting = {name: graph for name, graph in graphs.engines.items() if not name.startswith(QUALITY)}
        sources = {engine: (graphs_dir / graph.file, graph) for engine, graph in painting.items()}
        if parts:
            sources |= _other_steps(checkpoint, graphs, folder, progress)
        work = _work(graphs, parts)
        inputs = {batch: _inputs(graphs, batch, max(STEPS) if parts else graphs.steps) for batch in {1, *batches}}
        copies = {name: graphs_dir / copy.file for name, copy in graphs.int8.items()}
        sets, memory, absent = _engine_sets(sources, copies, folder, batches, threads, only, inputs[1], stack, progress)
        in_torch = torch_sides(checkpoint, graphs, only, compiled)
        encoded = dict(inputs)
        for loaded in list(sets.values())[:1]:  # parts of the work begin with the same features on every engine
            encoded = {batch: _run(loaded, sources, ["he_encoder"], arrays) for batch, arrays in inputs.items()}
        sides: dict[str, Callable[[], object]] = {}
        whole = f"{len(graphs.stains)} stains"
        # More stains than the model has are the same ones again, which one graph would compute once.
        joinable = [what for what, n in work.items() if "he_encoder" in n[:-1] and len(set(n)) == len(n)]
        for batch in batches:
            for what, names in work.items():
                if what != whole and batch != batches[0]:
                    continue
                for engine, loaded in sets.items():
                    if any(name not in loaded for name in names):
                        continue  # 8 bits have only the steps that were exported
                    sides[f"{engine}|{what}|{batch}"] = _side(loaded, sources, names, encoded[batch])
                    if ONE_GRAPH in loaded and what in joinable:
                        sides[f"{engine}|{what}, {ONE_GRAPH}|{batch}"] = _joined_side(
                            loaded[ONE_GRAPH], sources, names, inputs[batch]
                        )
            for engine, run in in_torch.items():
                sides[f"{engine}|{whole}|{batch}"] = lambda run=run, batch=batch: run(inputs[batch])  # type: ignore[misc]
        limits, operations = peak_sides(folder, threads)
        others = Others()
        samples = in_turns({**sides, **limits}, rounds, progress, least=turn)
        share = others.share()
        gflop = {engine: count_flops(path) / 1e9 for engine, (path, _) in sources.items()}
        dice, scored = _dab_dice(sets, graphs, tiles, most_tiles)
    amounts = {what: sum(gflop[name] for name in names) for what, names in work.items()}
    amounts |= {f"{what}, {ONE_GRAPH}": amounts[what] for what in joinable}
    peaks = _peaks(samples, operations)
    return EnginesReport(
        machine=Machine.here(),
        model_name=graphs.name,
        model_version=graphs.model_version,
        tile=graphs.tile,
        mpp=graphs.mpp,
        steps=graphs.steps,
        stains=len(graphs.stains),
        threads=threads,
        rounds=rounds,
        gflop=amounts,
        peak=PEAK,
        peaks={name: wall for name, (wall, _) in peaks.items()},
        rows=tuple(_row(key, samples, graphs, amounts, peaks) for key in sides),
        memory_mib=memory,
        absent=absent,
        dab_dice=dice,
        dice_tiles=scored,
        others=share,
    )


def _dab_dice(
    sets: Mapping[str, Mapping[str, Engine]], graphs: GraphSet, tiles: Path | None, most: int
) -> tuple[dict[str, dict[str, float]], int]:
    if tiles is None:
        return {}, 0
    from staindiffuser.training.tiles.paired_tiles import PairedTiles

    images = {name: engine for name, engine in graphs.engines.items() if not name.startswith(("cells_", QUALITY))}

    def stainer(loaded: Mapping[str, Engine]) -> Callable[[Arrays], Arrays]:
        engines = {name: loaded[name] for name in images}
        return lambda inputs: run_pipeline(engines, images, steps=graphs.steps, tile=graphs.tile, inputs=inputs)[1]

    stainers = {name: stainer(loaded) for name, loaded in sets.items()}
    return dab_dice(stainers, PairedTiles.load(tiles, mpp=graphs.mpp), graphs.tile, most=most)


def count_flops(path: Path) -> float:
    """Floating-point operations of an ONNX graph's convolutions for one tile, multiply and add counted as two."""
    model = onnx.load(path)
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 1
    del model.graph.value_info[:]
    for value in model.graph.output:
        value.type.tensor_type.shape.dim[0].Clear()
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.value_info, *graph.output)}
    shapes.update({tensor.name: list(tensor.dims) for tensor in graph.initializer})
    total = 0.0
    for node in graph.node:
        if node.op_type == "Conv":
            _, height, width = shapes[node.output[0]][1:]
            total += 2.0 * float(np.prod(shapes[node.input[1]])) * height * width
    return total


Sources = Mapping[str, tuple[Path, EngineGraph]]
"""File and description of each graph."""


def _work(graphs: GraphSet, parts: bool) -> dict[str, list[str]]:
    """Parts of the work, and the graphs that each runs; stains that the model lacks are those it has, once more."""

    def stains(count: int) -> list[str]:
        names = [graphs.stains[index % len(graphs.stains)].name for index in range(count)]
        return ["he_encoder", *(f"{kind}_{name}" for name in names for kind in ("stain", "cells"))]

    count = len(graphs.stains)
    if not parts:
        return {f"{count} stains": stains(count)}
    work = {f"{n} stain{'s' if n > 1 else ''}": stains(n) for n in sorted({*STAINS, count})}
    work["encoder"] = ["he_encoder"]
    first = graphs.stains[0].name
    for steps in STEPS:
        name = f"stain_{first}" if steps == graphs.steps else f"{steps} steps"
        work[f"image, {steps} step{'s' if steps > 1 else ''}"] = [name]
    work["cell map"] = [f"cells_{first}"]
    return work


def _other_steps(
    checkpoint: Path, graphs: GraphSet, folder: Path, progress: Progress
) -> dict[str, tuple[Path, EngineGraph]]:
    """Graphs of the first stain's image with the numbers of steps that the exported graphs do not have."""
    import torch

    from staindiffuser.export.graphs import write_engines
    from staindiffuser.training.checkpoint import Checkpoint

    loaded = Checkpoint.load(checkpoint)
    only = f"stain_{graphs.stains[0].name}"
    sources = {}
    for steps in STEPS:
        if steps != graphs.steps:
            progress(f"exporting an image of {steps} steps")
            # Speed does not depend on the noise levels, which a checkpoint of one step lacks for others.
            sigmas = np.geomspace(graphs.sigmas[0], min(0.3, graphs.sigmas[0] / 2), steps).tolist()
            target = folder / f"steps-{steps}"
            target.mkdir()
            written = write_engines(
                loaded.network, target, sigmas=sigmas, tile=graphs.tile, trunk=torch.float32, only=only
            )
            sources[f"{steps} steps"] = (target / written[only].file, written[only])
    return sources


def _engine_sets(
    sources: Sources,
    copies: Mapping[str, Path],
    folder: Path,
    batches: Sequence[int],
    threads: int,
    only: Sequence[str],
    inputs: Arrays,
    stack: contextlib.ExitStack,
    progress: Progress,
) -> tuple[dict[str, dict[str, Engine]], dict[str, float], dict[str, str]]:
    """The engines of every target and precision that works here, what each set takes of memory, and what is absent."""
    sets: dict[str, dict[str, Engine]] = {}
    memory: dict[str, float] = {}
    absent: dict[str, str] = {}
    candidates = list(_candidates(batches, only, absent))
    known = [*(name for name, _, _ in candidates), EAGER, COMPILED]
    for name in only:
        if name not in known:
            raise UsageError(f"--engine {name}: there is {', '.join(known)} here")
    for name, builder, options in candidates:
        if only and name not in only:
            continue
        progress(f"loading {name}")
        before = psutil.Process().memory_info().rss
        loaded: dict[str, Engine] = {}
        eight = options.precision == INT8
        if eight and not copies:
            absent[name] = "the graphs have no copies in 8 bits: export int8"
            continue
        for engine, (path, graph) in sources.items():
            if eight and engine not in copies:
                continue
            target = folder / f"{name} {engine}{builder.suffix}"
            builder.build(copies[engine] if eight else path, graph, target, options)
            loaded[engine] = builder.load(target, threads=threads)
            stack.callback(loaded[engine].close)
        _run(loaded, sources, list(loaded), inputs)
        memory[name] = (psutil.Process().memory_info().rss - before) / 2**20
        if isinstance(builder, Joins):
            painting = [engine for engine in sources if not engine.endswith("steps")]
            files = [folder / f"{name} {engine}{builder.suffix}" for engine in painting]
            before = psutil.Process().memory_info().rss
            loaded[ONE_GRAPH] = builder.load_joined(files, threads=threads)
            stack.callback(loaded[ONE_GRAPH].close)
            _joined_side(loaded[ONE_GRAPH], sources, painting, inputs)()
            memory[f"{name}, {ONE_GRAPH}"] = (psutil.Process().memory_info().rss - before) / 2**20
        sets[name] = loaded
    return sets, memory, absent


def _candidates(
    batches: Sequence[int], only: Sequence[str], absent: dict[str, str]
) -> Iterator[tuple[str, builders.Builder, BuildOptions]]:
    for target in builders.TARGETS:
        if target == "torch" and find_gpu() is None and "torch fp32" not in only:
            continue  # meant for CUDA graphs; on a CPU it is the network as trained, which stands for it
        builder = builders.get(target)
        for precision in _PRECISIONS:
            options = BuildOptions(max_batch=max(batches), precision=precision)
            name = f"{target} {precision or 'fp32'}"
            try:
                builder.version()
                builder.device()
                builder.check(options)
            except DependencyError as error:
                absent[name] = str(error).partition("; targets that work here")[0].removeprefix(f"target {target}: ")
            except ExportUsageError:  # a target without this precision
                absent.pop(name, None)
            else:
                yield name, builder, options


def _run(engines: Mapping[str, Engine], sources: Sources, names: Sequence[str], inputs: Arrays) -> Arrays:
    """Run graphs one after another; a graph finds its tensors among the inputs and the earlier graphs' outputs."""
    tensors = dict(inputs)
    for name in names:
        graph = sources[name][1]
        arguments = {}
        for tensor in graph.inputs:
            array = tensors[tensor.name]
            arguments[tensor.name] = array[:, : tensor.shape[0]] if tensor.name == "NOISE" else array
        tensors.update(engines[name].run(arguments, [tensor.name for tensor in graph.outputs]))
    return tensors


def _side(
    engines: Mapping[str, Engine], sources: Sources, names: Sequence[str], inputs: Arrays
) -> Callable[[], object]:
    return lambda: _run(engines, sources, names, inputs)


def _joined_side(
    engine: Engine, sources: Sources, names: Sequence[str], inputs: Arrays
) -> Callable[[], dict[str, Any]]:
    """What the joined engine does of some graphs: it computes the features for itself."""
    specs = [sources[name][1] for name in names]
    outputs = [tensor.name for spec in specs for tensor in spec.outputs if not tensor.name.startswith("FEATURES")]
    steps = {tensor.name: tensor.shape[0] for spec in specs for tensor in spec.inputs}
    taken = {
        name: array[:, : steps[name]] if name == "NOISE" else array for name, array in inputs.items() if name in steps
    }
    return lambda: engine.run(taken, outputs)


def _inputs(graphs: GraphSet, batch: int, steps: int) -> Arrays:
    rng = np.random.default_rng(batch)
    image, cells = tile_noise(
        np.arange(batch, dtype=np.int64)[:, None],
        np.zeros((batch, 2), np.int64),
        steps=steps,
        height=graphs.tile,
        width=graphs.tile,
    )
    he = rng.integers(0, 256, (batch, graphs.tile, graphs.tile, 3), dtype=np.uint8)
    return {"HE": he, "NOISE": image, "NOISE_CELLS": cells}


def _peaks(
    samples: Mapping[str, Sequence[Sample]], operations: Mapping[str, tuple[str, float]]
) -> dict[str, tuple[float, float]]:
    """The best GFLOP/s of each operation and precision, by wall and by CPU time."""
    peaks: dict[str, tuple[float, float]] = {}
    for side, (name, flops) in operations.items():
        timing = Timing.of(samples[side])
        wall, cpu = peaks.get(name, (0.0, 0.0))
        peaks[name] = (max(wall, flops / (timing.best or timing.p50) / 1e6), max(cpu, flops / timing.cpu / 1e6))
    return peaks


def _row(
    key: str,
    samples: Mapping[str, Sequence[Sample]],
    graphs: GraphSet,
    gflop: Mapping[str, float],
    peaks: Mapping[str, tuple[float, float]],
) -> Row:
    engine, what, batch_text = key.split("|")
    batch = int(batch_text)
    timing = Timing.of(samples[key], batch)
    kept_mm = (graphs.tile - 2 * graphs.margin) * graphs.mpp / 1000
    precision = next((name for name in ("bf16", INT8) if engine.endswith(name)), "fp32")
    wall_peak, cpu_peak = peaks.get(f"convolution {precision}", (None, None))
    work = what.removesuffix(f", {ONE_GRAPH}")
    reference = samples.get(f"{REFERENCE}|{work}|{batch}") if engine != REFERENCE else None

    def relative(of: Callable[[Sample], float]) -> Spread | None:
        if reference is None:
            return None
        return Spread.of([of(ours) / of(theirs) for ours, theirs in zip(samples[key], reference, strict=True)])

    return Row(
        engine=engine,
        what=what,
        batch=batch,
        ms=timing,
        tiles_per_second=1e3 / timing.p50,
        mm2_per_second=kept_mm**2 * 1e3 / timing.p50,
        gflops=gflop[what] * 1e3 / timing.p50,
        share_of_peak=None if wall_peak is None else gflop[what] * 1e3 / timing.p50 / wall_peak,
        share_of_peak_cpu=None if cpu_peak is None else gflop[what] * 1e3 / timing.cpu / cpu_peak,
        relative=relative(lambda sample: sample.wall),
        relative_cpu=relative(lambda sample: sample.cpu),
    )
