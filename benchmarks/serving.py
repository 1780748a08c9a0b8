"""What the server costs: the same tiles through Triton and through the engines called directly in this process.

Both sides compute the same (an image and a cell map per stain, and the noise that they read), with the same number of
threads per engine, the same batches, and the same bytes out. Rounds of all sides alternate, so that a slow moment of
the machine meets every one; the results are ratios of their throughputs, round by round.

Beside that, in the same run: the server behind its proxy with mutual TLS, the server of another repository, two clients
that want one stain each, and a request of one tile around engines that do nothing, which is the server's own cost.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from staindiffuser.benchmarks.behind_proxy import behind_proxy
from staindiffuser.benchmarks.idle_engines import build_idle
from staindiffuser.benchmarks.load_servers import random_batch
from staindiffuser.benchmarks.measuring import Sample, Spread, in_turns
from staindiffuser.client.credentials import Credentials
from staindiffuser.export import builders
from staindiffuser.export.builders import Engine
from staindiffuser.export.description import QUALITY
from staindiffuser.export.loading import load_engines
from staindiffuser.export.manifest import Manifest, verify
from staindiffuser.export.parity import engine_runs, run_pipeline
from staindiffuser.export.wire import ENSEMBLE
from staindiffuser.serving.metrics import read_metrics
from staindiffuser.serving.server import TritonServer
from staindiffuser.triton_models.noise import philox
from staindiffuser.triton_models.shared.cpus import available_cpus
from staindiffuser.triton_models.shared.meters import SECONDS

__all__ = ["ServingReport", "TwoClients", "bench_serving"]

Arrays = dict[str, np.ndarray[Any, Any]]
IN_FLIGHT = 2
"""Requests in flight: one is computed while the other is received, noised and encoded."""
DIRECT, TRITON, PROXY, BESIDE = "direct", "Triton", "proxy", "beside"
"""The sides."""
_MESSAGE_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class TwoClients:
    """Two clients with one stain each, side by side, over the sum of both alone."""

    clock: Spread
    """Of the time until both are served."""
    cpu: Spread
    """Of the processor time."""


@dataclass(frozen=True, kw_only=True)
class ServingReport:
    """What was measured."""

    model_name: str
    model_version: str
    flavour: str
    device: str
    threads: int
    """Per engine, on all sides."""
    batch: int
    in_flight: int
    rounds: int
    tiles_per_round: int
    outputs: tuple[str, ...]
    tiles_per_second: Mapping[str, Spread]
    """By side: ``direct``, ``Triton``, ``proxy`` (the same server behind HAProxy), ``beside`` (another repository)."""
    ratios: Mapping[str, Spread]
    """Throughputs, divided round by round: ``Triton / direct``, ``proxy / Triton``, ``Triton / beside``."""
    cpu_ms_per_tile: Mapping[str, Spread]
    """Processor time of client, proxy and server together, which tells more where others use the machine."""
    cpu_ratios: Mapping[str, Spread]
    """As :attr:`ratios`, with processor time in the place of the clock's."""
    same_bytes: bool
    """Whether the server, also behind its proxy, gave the bytes of the direct call for the same batch."""
    beside_levels: int | None = None
    """Grey levels by which the other repository's outputs differ at most: its engines may be other ones."""
    direct_ms_per_tile: Mapping[str, float]
    """Median time of each stage, called directly, one after another."""
    triton_ms_per_tile: Mapping[str, float]
    """Mean compute time that the server reports per model; with requests in flight models share the cores."""
    two_clients: TwoClients | None = None
    overhead_ms: Mapping[str, Spread] | None = None
    """Time of a request of one tile beyond the direct call, around engines that do nothing, by flavour."""


def bench_serving(
    repository: Path,
    *,
    batch: int = 8,
    rounds: int = 7,
    requests: int = 4,
    in_flight: int = IN_FLIGHT,
    threads: int | None = None,
    proxy: bool = False,
    beside: Path | None = None,
    two_clients: bool = False,
    overhead: int = 0,
    progress: Callable[[str], None] = lambda message: None,
) -> ServingReport:
    """Measure a model repository on this machine.

    Args:
        repository: what ``export build`` wrote.
        batch: tiles a request; at most the repository's largest.
        rounds: of each side, alternating, after one that is not counted.
        requests: a round.
        in_flight: requests the client keeps in flight.
        threads: per engine; the repository's by default, 0 for all.
        proxy: also the same server behind HAProxy with mutual TLS.
        beside: another repository of the same model, whose server is a side too.
        two_clients: also two clients with one stain each.
        overhead: requests to engines that do nothing, of each flavour that runs here.
        progress: told after each round.

    Raises:
        VerificationError, ServerError, DependencyError: as the server does.
    """
    manifest = verify(repository)
    threads = manifest.threads if threads is None else threads
    batches = [random_batch(manifest, batch, seed) for seed in range(requests)]
    outputs = [f"{kind}_{stain.name}".upper() for stain in manifest.stains for kind in ("stain", "cells")]
    builder = builders.get(manifest.target)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="staindiffuser-bench-")))
        files = {n: repository / r.file for n, r in manifest.engines.items() if not n.startswith(QUALITY)}
        engines = load_engines(builder, files, threads=threads, flavour=manifest.flavour)
        for engine in set(engines.values()):
            stack.callback(engine.close)
        server = stack.enter_context(TritonServer(repository, threads=threads))
        programs: dict[str, tuple[int, ...]] = {DIRECT: (), TRITON: (server.pid,)}
        clients = {TRITON: stack.enter_context(_Client(server.url, outputs, in_flight))}
        if proxy:
            url, credentials, proxy_pid = stack.enter_context(behind_proxy(server, folder))
            programs[PROXY] = (server.pid, proxy_pid)
            clients[PROXY] = stack.enter_context(_Client(url, outputs, in_flight, credentials))
        if beside is not None:
            other = stack.enter_context(TritonServer(beside, threads=threads))
            programs[BESIDE] = (other.pid,)
            clients[BESIDE] = stack.enter_context(_Client(other.url, outputs, in_flight))

        def called(inputs: Arrays) -> Arrays:
            return _direct(engines, manifest, inputs)

        wanted = called(batches[0])
        answers = {side: client.run(batches[:1])[0] for side, client in clients.items()}
        levels = {
            side: max(int(np.abs(answer[name].astype(np.int16) - wanted[name]).max()) for name in outputs)
            for side, answer in answers.items()
        }
        sides: dict[str, Callable[[], object]] = {DIRECT: lambda: [called(inputs) for inputs in batches]}
        sides |= {name: functools.partial(client.run, batches) for name, client in clients.items()}
        before = _compute_ms(server, clients[TRITON])
        samples = _in_turns(sides, programs, rounds, progress)
        after = _compute_ms(server, clients[TRITON])
        together = _two_clients(server, manifest, batches, rounds, progress) if two_clients else None
        stages = _stage_times(engines, manifest, batches[0])
    tiles = batch * requests
    seconds = {side: [sample.wall for sample in taken] for side, taken in samples.items()}
    spent = {side: [sample.cpu for sample in taken] for side, taken in samples.items()}
    served = tiles * (rounds + 1) * (1 + proxy)
    return ServingReport(
        model_name=manifest.model_name,
        model_version=manifest.model_version,
        flavour=manifest.flavour,
        device=builder.device().name,
        threads=threads or available_cpus(),
        batch=batch,
        in_flight=in_flight,
        rounds=rounds,
        tiles_per_round=tiles,
        outputs=tuple(outputs),
        tiles_per_second={side: Spread.of([tiles / s for s in taken]) for side, taken in seconds.items()},
        cpu_ms_per_tile={side: Spread.of([1e3 * s / tiles for s in taken]) for side, taken in spent.items()},
        ratios=_ratios(seconds),
        cpu_ratios=_ratios(spent),
        same_bytes=not any(apart for side, apart in levels.items() if side != BESIDE),
        beside_levels=levels.get(BESIDE),
        direct_ms_per_tile=stages,
        triton_ms_per_tile={name: (after[name] - before[name]) / served for name in after},
        two_clients=together,
        overhead_ms=_overhead(manifest, overhead, progress) if overhead else None,
    )


def _ratios(seconds: Mapping[str, Sequence[float]]) -> dict[str, Spread]:
    return {
        f"{one} / {base}": Spread.of([b / o for o, b in zip(seconds[one], seconds[base], strict=True)])
        for one, base in ((TRITON, DIRECT), (PROXY, TRITON), (TRITON, BESIDE))
        if one in seconds and base in seconds
    }


def _in_turns(
    sides: Mapping[str, Callable[[], object]],
    programs: Mapping[str, Sequence[int]],
    rounds: int,
    progress: Callable[[str], None],
) -> dict[str, list[Sample]]:
    """As :func:`~staindiffuser.benchmarks.measuring.in_turns`, with the processor time of a side's programs as well."""
    elsewhere: dict[str, list[float]] = {side: [] for side in sides}

    def counted(side: str, run: Callable[[], object]) -> None:
        before = _cpu_seconds(programs[side])
        run()
        elsewhere[side].append(_cpu_seconds(programs[side]) - before)

    samples = in_turns({side: functools.partial(counted, side, run) for side, run in sides.items()}, rounds, progress)
    return {
        side: [Sample(wall=s.wall, cpu=s.cpu + more) for s, more in zip(taken, elsewhere[side][1:], strict=True)]
        for side, taken in samples.items()
    }


def _cpu_seconds(programs: Sequence[int]) -> float:
    """Processor time that these processes and their children have used so far."""
    total = 0.0
    for pid in programs:
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            times = each.cpu_times()
            total += times.user + times.system
    return total


class _Client:
    """Sends batches, a bounded number in flight, and reads the results."""

    def __init__(
        self, url: str, outputs: Sequence[str], in_flight: int, credentials: Credentials | None = None
    ) -> None:
        import tritonclient.grpc as triton

        self._triton = triton
        self._outputs = [triton.InferRequestedOutput(name) for name in outputs]
        self._in_flight = in_flight
        self._client = triton.InferenceServerClient(
            url,
            **(credentials or Credentials()).tls(),
            channel_args=[
                ("grpc.enable_http_proxy", 0),
                ("grpc.max_send_message_length", _MESSAGE_BYTES),
                ("grpc.max_receive_message_length", _MESSAGE_BYTES),
            ],
        )

    def __enter__(self) -> _Client:
        return self

    def __exit__(self, *error: object) -> None:
        self._client.close()

    def run(self, batches: Sequence[Arrays]) -> list[Arrays]:
        """Results in the order of the batches."""
        done: queue.SimpleQueue[tuple[int, Any, Any]] = queue.SimpleQueue()
        results: list[Arrays] = [{} for _ in batches]
        sent = received = 0
        while received < len(batches):
            while sent < len(batches) and sent - received < self._in_flight:
                self._client.async_infer(
                    ENSEMBLE,
                    self._inputs(batches[sent]),
                    lambda result, error, index=sent: done.put((index, result, error)),
                    outputs=self._outputs,
                )
                sent += 1
            index, result, error = done.get()
            if error is not None:
                raise error
            results[index] = {output.name(): result.as_numpy(output.name()) for output in self._outputs}
            received += 1
        return results

    def compute_ms(self) -> dict[str, float]:
        """Time each model has computed so far, as Triton counts it, milliseconds."""
        models = self._client.get_inference_statistics().model_stats
        spent = {m.name: int(m.inference_stats.compute_infer.ns) / 1e6 for m in models}
        return {name: ms for name, ms in spent.items() if name != ENSEMBLE}  # an ensemble computes nothing

    def _inputs(self, arrays: Arrays) -> list[Any]:
        inputs = []
        for name, dtype in (("HE", "UINT8"), ("ORIGIN", "INT64"), ("SEED", "INT64")):
            tensor = self._triton.InferInput(name, arrays[name].shape, dtype)
            inputs.append(tensor.set_data_from_numpy(arrays[name]))
        return inputs


def _compute_ms(server: TritonServer, client: _Client) -> dict[str, float]:
    """Time each model has computed so far, milliseconds."""
    if server.manifest.flavour != "single":
        return client.compute_ms()
    time.sleep(2 * SECONDS)  # until the model has told what it has done
    return {ENSEMBLE: 1e3 * read_metrics(server.metrics_url)["staindiffuser_compute_seconds_total"]}


def _direct(engines: Mapping[str, Engine], manifest: Manifest, inputs: Arrays) -> Arrays:
    return run_pipeline(engines, manifest.engines, steps=manifest.steps, tile=manifest.tile, inputs=inputs)[1]


def _two_clients(
    server: TritonServer,
    manifest: Manifest,
    batches: Sequence[Arrays],
    rounds: int,
    progress: Callable[[str], None],
) -> TwoClients | None:
    """Two clients, each of which sends its next request once the last is answered; None for a model of one stain."""
    if len(manifest.stains) < 2:
        return None
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(_Client(server.url, [f"{kind}_{stain.name.upper()}" for kind in ("STAIN", "CELLS")], 1))
            for stain in manifest.stains[:2]
        ]
        pool = stack.enter_context(ThreadPoolExecutor(2))
        sides: dict[str, Callable[[], object]] = {
            "one stain": functools.partial(clients[0].run, batches),
            "the other": functools.partial(clients[1].run, batches),
            "both": lambda: list(pool.map(lambda client: client.run(batches), clients)),
        }
        programs = dict.fromkeys(sides, (server.pid,))
        samples = _in_turns(sides, programs, rounds, lambda line: progress(f"two clients, {line}"))
    one, other, both = (samples[side] for side in sides)
    rounds_of = list(zip(one, other, both, strict=True))
    return TwoClients(
        clock=Spread.of([c.wall / (a.wall + b.wall) for a, b, c in rounds_of]),
        cpu=Spread.of([c.cpu / (a.cpu + b.cpu) for a, b, c in rounds_of]),
    )


def _overhead(manifest: Manifest, requests: int, progress: Callable[[str], None]) -> dict[str, Spread]:
    """Milliseconds, by flavour that runs on this machine."""
    found = {}
    for flavour in dict.fromkeys((manifest.flavour, "single", "python")):
        if flavour == "native":
            continue
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="staindiffuser-idle-")))
            repository = build_idle(manifest, folder, flavour=flavour)
            idle = verify(repository)
            files = {name: repository / record.file for name, record in idle.engines.items()}
            engines = load_engines(builders.get(idle.target), files, threads=1, flavour=flavour)
            for engine in set(engines.values()):
                stack.callback(engine.close)
            server = stack.enter_context(TritonServer(repository))
            outputs = [f"{kind}_{stain.name}".upper() for stain in idle.stains for kind in ("stain", "cells")]
            client = stack.enter_context(_Client(server.url, outputs, 1))
            inputs = random_batch(idle, 1, 0)
            sides: dict[str, Callable[[], object]] = {
                TRITON: functools.partial(client.run, [inputs]),
                DIRECT: functools.partial(_direct, engines, idle, inputs),
            }
            samples = in_turns(sides, requests)
        pairs = zip(samples[TRITON], samples[DIRECT], strict=True)
        found[flavour] = Spread.of([1e3 * (through.wall - direct.wall) for through, direct in pairs])
        progress(f"a tile through engines that do nothing, flavour {flavour}: {found[flavour].median:.1f} ms")
    return found


def _stage_times(
    engines: Mapping[str, Engine], manifest: Manifest, inputs: Arrays, repeats: int = 2
) -> dict[str, float]:
    """Median milliseconds per tile of the noise and of each engine, alone."""
    batch = len(inputs["HE"])
    tensors: Arrays = dict(inputs)
    times: dict[str, float] = {}

    def measure(name: str, run: Callable[[], Arrays]) -> None:
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            tensors.update(run())
            seconds.append(time.perf_counter() - start)
        times[name] = statistics.median(seconds) * 1e3 / batch

    def noise() -> Arrays:
        image, cells = philox.tile_noise(
            inputs["SEED"], inputs["ORIGIN"], steps=manifest.steps, height=manifest.tile, width=manifest.tile
        )
        return {"NOISE": image, "NOISE_CELLS": cells}

    runs = engine_runs(engines, manifest.engines)
    if any(tensor.startswith("NOISE") for run in runs for tensor in run.inputs):
        measure("noise", noise)
    for run in runs:
        # Engines that are one graph are Triton's one model.
        name = run.names[0] if len(run.names) == 1 else "staindiffuser"
        measure(name, lambda run=run: run.engine.run({n: tensors[n] for n in run.inputs}, run.outputs))  # type: ignore[misc]
    return times
