"""How this package measures: everything in turns, in one process, and with what tells whether a number can be trusted.

Wall time is what a user waits for, but on a machine that others use it measures them too. So the process's CPU time
stands beside it: all its threads together, whether or not another program interrupts them. Ratios are taken round by
round, so that a slow moment of the machine meets both sides.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from staindiffuser.export.builders.devices import find_gpu, processor
from staindiffuser.triton_models.shared.cpus import available_cpus

__all__ = ["QUIET", "Machine", "Others", "Sample", "Spread", "Timing", "in_turns"]

WIDEST = 0.15
"""Spread above which a timing is not to be trusted (ours)."""
WIDEST_INTERVAL = 0.1
"""Width of a ratio's interval, as a share of the ratio, above which it is not to be quoted (ours)."""
QUIET = 0.1
"""Share of the cores up to which other programs hardly disturb (ours)."""
_PACKAGES = ("numpy", "onnx", "onnxruntime", "openvino", "tensorrt", "torch", "nvidia-pytriton", "staindiffuser")
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a measurement was made on, and of."""

    processor: str
    cores: int
    """That the process may use."""
    instructions: tuple[str, ...]
    gpu: str
    """Empty where there is none."""
    memory_gib: float
    load: float
    """Runnable processes in the minute before: above the number of cores, others compete."""
    python: str
    packages: Mapping[str, str]
    commit: str
    """Empty outside of a checkout; ends in ``+`` where files differ from it."""
    date: str

    @property
    def kind(self) -> str:
        """A file's name for machines of this kind: ``amd-epyc-avx512-bf16``; of one with a GPU that GPU's."""
        name = self.gpu or " ".join([self.processor, *self.instructions[-1:]])
        return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")

    @classmethod
    def here(cls) -> Machine:
        """This one, now."""
        gpu = find_gpu()
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        try:
            flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
        except OSError:
            flags = []
        return cls(
            processor=processor().name,
            cores=available_cpus(),
            instructions=tuple(flag for flag in _FLAGS if flag in flags),
            gpu=gpu.name if gpu else "",
            memory_gib=round(memory / 2**30, 1),
            load=round(os.getloadavg()[0], 1),
            python=platform.python_version(),
            packages={name: version for name in _PACKAGES if (version := _version(name))},
            commit=_commit(),
            date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        )


class Others:
    """How much of the machine's processor time other programs take, from now on."""

    def __init__(self) -> None:
        self._before = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds: of the clock, of all processors together that they were busy, and of this process."""
        import psutil  # of the extra serve, which a client does without

        times = psutil.cpu_times()
        return time.monotonic(), sum(times) - times.idle - times.iowait, time.process_time()

    def share(self) -> float:
        """Of all cores; what the children of this process do is counted as others'."""
        wall, busy, own = (now - before for now, before in zip(self._now(), self._before, strict=True))
        return round(max(0.0, busy - own) / (wall * (os.cpu_count() or 1)), 3)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One turn: a run, or the mean of several."""

    wall: float
    cpu: float
    """Seconds, the second of all threads of this process."""
    runs: tuple[float, ...] = ()
    """Wall time of each run, if there were several."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds of several runs, for each tile."""

    p50: float
    p95: float
    p99: float
    """Percentiles of wall time; of few runs they lie between the largest."""
    cpu: float
    """Median CPU time, all threads together."""
    spread: float
    """Distance between the quartiles of wall time over its median."""
    runs: int
    best: float | None = None
    """The fastest run's wall time: what other programs disturbed least. None in older reports."""

    @property
    def trusted(self) -> bool:
        """Whether the wall time is steady enough to be quoted."""
        return self.spread <= WIDEST

    @classmethod
    def of(cls, samples: Sequence[Sample], tiles: int = 1) -> Timing:
        """Summarise runs of ``tiles`` tiles each."""
        wall = np.array([run for sample in samples for run in sample.runs or (sample.wall,)]) * 1e3 / tiles
        low, p50, high, p95, p99 = (float(value) for value in np.percentile(wall, [25, 50, 75, 95, 99]))
        cpu = statistics.median(sample.cpu for sample in samples) * 1e3 / tiles
        return cls(
            p50=p50, p95=p95, p99=p99, cpu=cpu, spread=(high - low) / p50, runs=len(wall), best=float(wall.min())
        )


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Values of the rounds, summarised."""

    median: float
    low: float
    high: float
    """``low`` and ``high``: 90 % bootstrap interval of the median."""
    smallest: float
    largest: float

    @property
    def certain(self) -> bool:
        """Whether the interval is narrow enough for the median to be quoted."""
        return self.high - self.low <= WIDEST_INTERVAL * self.median

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise."""
        drawn = np.random.default_rng(0).choice(np.asarray(values), size=(2000, len(values)))
        low, high = np.quantile(np.median(drawn, axis=1), [0.05, 0.95])
        return cls(
            median=statistics.median(values),
            low=float(low),
            high=float(high),
            smallest=min(values),
            largest=max(values),
        )


def in_turns(
    sides: Mapping[str, Callable[[], object]],
    rounds: int,
    progress: Callable[[str], None] = lambda message: None,
    *,
    least: float = 0.0,
) -> dict[str, list[Sample]]:
    """Give every side a turn in each round, forwards and backwards by turns, after one round that is not counted.

    Args:
        sides: what to run, by name.
        rounds: that are counted.
        progress: called with one line per round.
        least: seconds that a turn lasts at least. What takes less than three times that is repeated, and its first run
            is not counted: threads that the side before left spinning, and caches that it filled, were half of the
            processor time of one of 20 ms, in every second round.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in sides}
    order = list(sides)
    for index in range(rounds + 1):
        for name in order if index % 2 else reversed(order):
            sample = _turn(sides[name], least)
            if index:
                samples[name].append(sample)
        progress(f"round {index} of {rounds}" + ("" if index else " (not counted)"))
    return samples


def _turn(run: Callable[[], object], least: float) -> Sample:
    began = time.perf_counter()
    first = _timed(run)
    if first.wall >= 3 * least:
        return first
    counted = [_timed(run)]
    while time.perf_counter() - began < least:
        counted.append(_timed(run))
    return Sample(
        wall=statistics.fmean(one.wall for one in counted),
        cpu=statistics.fmean(one.cpu for one in counted),
        runs=tuple(one.wall for one in counted),
    )


def _timed(run: Callable[[], object]) -> Sample:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return Sample(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    """The checkout's commit."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", os.fspath(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


if __name__ == "__main__":
    sys.stdout.write(f"{Machine.here().kind}\n")
