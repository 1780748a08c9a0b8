"""A real server under load: how much it can take, and how long people wait at less.

Closed loop: a number of clients, each of which sends its next request once the last is answered. It tells the most that
a server does. Open loop: requests arrive at random moments (Poisson), whether or not the earlier ones are answered, as
people's do. Latency counts from the moment at which a request was due, so that a slow server cannot hide its queue by
slowing its clients down.

The other sides are the same engines behind what a user would pick instead, see
:mod:`~staindiffuser.benchmarks.rivals`.
"""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from staindiffuser.benchmarks.load_servers import Arrays, Call, Side, random_batch, rival_side, triton_side
from staindiffuser.benchmarks.measuring import Machine, Spread
from staindiffuser.benchmarks.rivals import RIVALS
from staindiffuser.benchmarks.rivals.pipeline import output_names
from staindiffuser.errors import DependencyError
from staindiffuser.export.manifest import verify

__all__ = ["LoadReport", "OpenLoop", "bench_load", "open_loop"]

TRITON = "Triton"
_MOST_WAITING = 512


@dataclass(frozen=True, kw_only=True)
class OpenLoop:
    """Requests that arrived at random."""

    share: float
    """Of what this server can take."""
    offered: float
    answered: float
    """Requests a second, until the last was answered."""
    requests: int
    failed: int
    p50: float | None
    p95: float | None
    p99: float | None
    """Milliseconds from when a request was due; None if none was answered."""


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What was measured."""

    machine: Machine
    model_name: str
    model_version: str
    target: str
    tile: int
    batch: int
    threads: int
    seconds: float
    clients: tuple[int, ...]
    closed: Mapping[str, tuple[float, ...]]
    """Requests a second by server, for each number of clients."""
    open: Mapping[str, tuple[OpenLoop, ...]]
    triton_ms: Mapping[str, Mapping[str, float]]
    """The server's own account of a request, by model: ``queue``, ``compute``; of Triton also ``input``, ``output``."""
    same_bytes: bool
    absent: Mapping[str, str] = field(default_factory=dict)
    """Servers that are not installed or did not start here, and why."""
    turns: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Requests a second of each round with the last number of clients; ``closed`` has their median. Empty if each
    server was measured alone, once."""

    def ratio(self, server: str) -> Spread:
        """Our requests a second over a server's, with the last number of clients, round by round."""
        rates = self.turns or {name: (values[-1],) for name, values in self.closed.items()}
        ours = next(iter(rates.values()))
        return Spread.of([own / other for own, other in zip(ours, rates[server], strict=True)])


_RIVALS = tuple(rival.name for rival in RIVALS)


def bench_load(
    repository: Path,
    *,
    batch: int = 1,
    clients: Sequence[int] = (1, 16),
    shares: Sequence[float] = (0.25, 0.5, 0.75),
    seconds: float = 10.0,
    threads: int | None = None,
    rivals: Sequence[str] = _RIVALS,
    rounds: int = 1,
    progress: Callable[[str], None] = lambda message: None,
) -> LoadReport:
    """Measure a model repository behind Triton, and behind what a user would write.

    Args:
        repository: what ``export build`` wrote.
        batch: tiles a request.
        clients: of the closed loop; the last number saturates.
        shares: of the saturated throughput, at which requests arrive in the open loop.
        seconds: of each measurement.
        threads: of each engine; the repository's by default.
        rivals: names of :data:`~staindiffuser.benchmarks.rivals.RIVALS` to measure as well.
        rounds: of the closed loop. With more than one, all servers are up at once and measured in turns, so that a slow
            moment of the machine meets every one; with one, each is alone on the machine.
        progress: called with one line per step.

    Raises:
        VerificationError, ServerError, DependencyError: as the server does.
    """
    manifest = verify(repository)
    threads = manifest.threads if threads is None else threads
    batches = [random_batch(manifest, batch, seed) for seed in range(4)]
    closed: dict[str, tuple[float, ...]] = {}
    opened: dict[str, tuple[OpenLoop, ...]] = {}
    answers: list[Arrays] = []
    told: Mapping[str, Mapping[str, float]] = {}
    absent: dict[str, str] = {}
    starts: dict[str, Callable[[], contextlib.AbstractContextManager[Side]]] = {
        TRITON: lambda: triton_side(repository, manifest, threads)
    }
    for rival in RIVALS:
        if rival.name not in rivals:
            continue
        if rival.absent:
            absent[rival.name] = rival.absent
            progress(f"{rival.name}: {rival.absent}")
            continue
        starts[rival.name] = lambda rival=rival: rival_side(rival, repository, manifest, threads)  # type: ignore[misc]
    turns: dict[str, tuple[float, ...]] = {}
    for group in [list(starts)] if rounds > 1 else [[name] for name in starts]:
        with contextlib.ExitStack() as stack:
            sides: dict[str, Side] = {}
            for name in group:
                try:
                    sides[name] = stack.enter_context(starts[name]())
                except DependencyError as error:
                    if name == TRITON:
                        raise
                    absent[name] = str(error)
                    progress(str(error))
            calls = {name: call for name, (call, _) in sides.items()}
            answers += [call(batches[0]) for call in calls.values()]
            for name, rates in _rates(calls, batches, clients, seconds, rounds, progress).items():
                closed[name] = tuple(statistics.median(values) for values in rates)
                if rounds > 1:
                    turns[name] = tuple(rates[-1])
            for name, (call, account) in sides.items():
                loops = []
                for share in shares:
                    loops.append(open_loop(call, batches, share, closed[name][-1], seconds))
                    last = loops[-1]
                    progress(f"{name} at {share:.0%}: {last.requests} requests, {last.failed} refused")
                opened[name] = tuple(loops)
                told = told or account()
    return LoadReport(
        machine=Machine.here(),
        model_name=manifest.model_name,
        model_version=manifest.model_version,
        target=manifest.target,
        tile=manifest.tile,
        batch=batch,
        threads=threads,
        seconds=seconds,
        clients=tuple(clients),
        closed=closed,
        open=opened,
        triton_ms=told,
        same_bytes=all(np.array_equal(a[name], answers[0][name]) for a in answers for name in output_names(manifest)),
        absent=absent,
        turns=turns,
    )


def _rates(
    calls: Mapping[str, Call],
    batches: Sequence[Arrays],
    clients: Sequence[int],
    seconds: float,
    rounds: int,
    progress: Callable[[str], None],
) -> dict[str, list[list[float]]]:
    """Requests a second of each server, for each number of clients, of each round."""
    rates: dict[str, list[list[float]]] = {name: [[] for _ in clients] for name in calls}
    order = list(calls)
    for number in range(rounds):
        for name in order if number % 2 == 0 else reversed(order):
            # Until threads, connections and memory are there.
            _closed_loop(calls[name], batches, clients[-1], seconds / 4)
            for index, count in enumerate(clients):
                rates[name][index].append(_closed_loop(calls[name], batches, count, seconds))
                progress(f"{name}: {rates[name][index][-1]:.2f} requests/s with {count} clients")
    return rates


def _closed_loop(call: Call, batches: Sequence[Arrays], clients: int, seconds: float) -> float:
    """Requests a second."""
    begin = time.perf_counter()
    end = begin + seconds
    done = [0] * clients

    def client(index: int) -> None:
        while time.perf_counter() < end:
            call(batches[done[index] % len(batches)])
            done[index] += 1

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    return sum(done) / (time.perf_counter() - begin)  # the last requests end after the time is up


def open_loop(call: Call, batches: Sequence[Arrays], share: float, saturated: float, seconds: float) -> OpenLoop:
    rate = share * saturated
    generator = np.random.default_rng(round(1e3 * share))
    due = np.cumsum(generator.exponential(1 / rate, max(8, int(rate * seconds))))
    latencies: list[float] = []
    failed = 0
    lock = threading.Lock()
    begin = time.perf_counter()

    def send(index: int) -> None:
        nonlocal failed
        try:
            call(batches[index % len(batches)])
        except Exception:  # a refusal under load is a result: it is counted
            with lock:
                failed += 1
            return
        with lock:
            latencies.append((time.perf_counter() - begin - due[index]) * 1e3)

    with ThreadPoolExecutor(min(_MOST_WAITING, len(due))) as pool:
        for index, moment in enumerate(due):
            time.sleep(max(0.0, begin + moment - time.perf_counter()))
            pool.submit(send, index)
    elapsed = time.perf_counter() - begin
    p50, p95, p99 = np.percentile(latencies, [50, 95, 99]).tolist() if latencies else (None, None, None)
    return OpenLoop(
        share=share,
        offered=rate,
        answered=len(latencies) / elapsed,
        requests=len(due),
        failed=failed,
        p50=p50,
        p95=p95,
        p99=p99,
    )
