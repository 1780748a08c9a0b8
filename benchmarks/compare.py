"""Two commits of this checkout, in turns: how much faster or slower is the new one?

Each commit runs in a process of its own, from its own files, and both processes take turns tile by tile. What is timed
is the whole work of a tile on the embedded default: noise, encoder, image and cell map of every stain.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from staindiffuser.benchmarks.measuring import Machine, Sample, Spread, Timing
from staindiffuser.errors import InputError, UsageError

__all__ = ["Comparison", "compare"]

WORKER = """
import json, sys, time
from pathlib import Path
import numpy as np
from staindiffuser.export import builders
from staindiffuser.export.description import GraphSet
from staindiffuser.export.parity import Golden, run_pipeline
folder, batch, threads = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
graphs = GraphSet.load(folder)
golden = Golden.load(folder / graphs.golden)
rows = np.arange(batch) % golden.samples
inputs = {name: array[rows] for name, array in golden.inputs.items()}
builder = builders.get("onnxruntime")
engines = {name: builder.load(folder / graph.file, threads=threads) for name, graph in graphs.engines.items()}
print("ready", flush=True)
for line in sys.stdin:
    wall, cpu = time.perf_counter(), time.process_time()
    run_pipeline(engines, graphs.engines, steps=graphs.steps, tile=graphs.tile, inputs=inputs)
    print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu]), flush=True)
"""
"""What runs from either commit's files: it uses only what both have."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What was measured."""

    machine: Machine
    base: str
    """The commit that this checkout was compared with."""
    batch: int
    rounds: int
    base_ms: Timing
    ms: Timing
    wall_ratio: Spread
    """This checkout's time over the base's, round by round."""
    cpu_ratio: Spread


def compare(
    base: str,
    *,
    graphs: Path | None = None,
    batch: int = 1,
    rounds: int = 11,
    threads: int = 0,
    root: Path | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> Comparison:
    """Compare this checkout, as it is on disk, with a commit of it.

    Args:
        base: commit, branch or tag.
        graphs: what both run; by default each the demonstration's graphs of its own commit.
        batch: tiles at a time.
        rounds: counted turns of either side, after one that is not.
        threads: of each engine; 0 for all.
        root: the checkout; by default the one that this file lies in.
        progress: called with one line per step.

    Raises:
        UsageError: there is no such checkout or commit.
        InputError: one of the two cannot run the graphs.
    """
    root = root or Path(__file__).resolve().parents[1]
    try:
        command = ["git", "-C", os.fspath(root), "rev-parse", "--verify", "--quiet", f"{base}^{{commit}}"]
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise UsageError(f"{base}: no such commit in {root}: name one of `git log`") from error
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        tree = Path(name) / "base"
        tree.mkdir()
        archive = subprocess.run(["git", "-C", os.fspath(root), "archive", commit], capture_output=True, check=True)
        subprocess.run(["tar", "-x", "-C", os.fspath(tree)], input=archive.stdout, check=True)
        sides = {}
        for side, folder in (("base", tree), ("here", root)):
            progress(f"loading {side}")
            chosen = graphs or folder / "checkpoints" / "demo" / "graphs"
            sides[side] = stack.enter_context(_worker(folder, chosen, batch, threads))
        samples: dict[str, list[Sample]] = {side: [] for side in sides}
        for index in range(rounds + 1):
            for side in list(sides) if index % 2 else reversed(list(sides)):
                sample = _turn(sides[side])
                if index:
                    samples[side].append(sample)
            progress(f"round {index} of {rounds}" + ("" if index else " (not counted)"))
    pairs = list(zip(samples["here"], samples["base"], strict=True))
    return Comparison(
        machine=Machine.here(),
        base=commit[:12],
        batch=batch,
        rounds=rounds,
        base_ms=Timing.of(samples["base"], batch),
        ms=Timing.of(samples["here"], batch),
        wall_ratio=Spread.of([here.wall / there.wall for here, there in pairs]),
        cpu_ratio=Spread.of([here.cpu / there.cpu for here, there in pairs]),
    )


@contextlib.contextmanager
def _worker(folder: Path, graphs: Path, batch: int, threads: int) -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {"PYTHONPATH": os.fspath(folder / "src"), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", WORKER, os.fspath(graphs), str(batch), str(threads)]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                process.wait()
                errors.seek(0)
                last = (errors.read().strip().splitlines() or ["it ended without a word"])[-1]
                raise InputError(f"{folder} cannot run {graphs}: {last}")
            yield process
        finally:
            process.kill()
            process.communicate()


def _turn(process: subprocess.Popen[str]) -> Sample:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise InputError("one of the two commits ended while it was measured: out of memory?")
    wall, cpu = json.loads(answer)
    return Sample(wall=wall, cpu=cpu)
