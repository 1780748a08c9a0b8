"""What the server costs: the same tiles through Triton and through the engines called directly in this process.

Both sides compute everything (noise, encoder, an image and a cell map per stain), with the same number of threads per
engine, the same batches, and the same bytes out. Rounds of the two alternate, so that a slow moment of the machine
meets both; the result is the ratio of their throughputs, round by round.
"""

from __future__ import annotations

import contextlib
import queue
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from staindiffuser.benchmarks.measuring import Spread
from staindiffuser.export import builders
from staindiffuser.export.builders import Engine
from staindiffuser.export.loading import load_engines
from staindiffuser.export.manifest import Manifest, verify
from staindiffuser.export.parity import engine_runs, run_pipeline
from staindiffuser.serving.server import TritonServer
from staindiffuser.triton_models.noise import philox
from staindiffuser.triton_models.shared.cpus import available_cpus

__all__ = ["ServingReport", "bench_serving"]

Arrays = dict[str, np.ndarray[Any, Any]]
IN_FLIGHT = 2
"""Requests in flight: one is computed while the other is received, noised and encoded."""
_MESSAGE_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class ServingReport:
    """What was measured."""

    model_name: str
    model_version: str
    device: str
    threads: int
    """Per engine, on both sides."""
    batch: int
    in_flight: int
    rounds: int
    tiles_per_round: int
    outputs: tuple[str, ...]
    triton_tiles_per_second: Spread
    direct_tiles_per_second: Spread
    ratio: Spread
    """Triton's throughput divided by the direct one's, round by round."""
    same_bytes: bool
    """Whether both sides gave the same bytes for the same batch."""
    direct_ms_per_tile: Mapping[str, float]
    """Median time of each stage, called directly, one after another."""
    triton_ms_per_tile: Mapping[str, float]
    """Mean compute time that Triton reports per model; with requests in flight models share the cores."""


def bench_serving(
    repository: Path,
    *,
    batch: int = 8,
    rounds: int = 7,
    requests: int = 4,
    in_flight: int = IN_FLIGHT,
    threads: int | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> ServingReport:
    """Measure a model repository on this machine.

    Args:
        repository: what ``export build`` wrote.
        batch: tiles a request; at most the repository's largest.
        rounds: of either side, alternating, after one that is not counted.
        requests: a round.
        in_flight: requests the client keeps in flight.
        threads: per engine; the repository's by default, 0 for all.
        progress: told after each round.

    Raises:
        VerificationError, ServerError, DependencyError: as the server does.
    """
    manifest = verify(repository)
    threads = manifest.threads if threads is None else threads
    batches = [_random_batch(manifest, batch, seed) for seed in range(requests)]
    outputs = [f"{kind}_{stain.name}".upper() for stain in manifest.stains for kind in ("stain", "cells")]
    builder = builders.get(manifest.target)
    with contextlib.ExitStack() as stack:
        files = {name: repository / record.file for name, record in manifest.engines.items()}
        engines = load_engines(builder, files, threads=threads, flavour=manifest.flavour)
        for engine in set(engines.values()):
            stack.callback(engine.close)
        server = stack.enter_context(TritonServer(repository, threads=threads))
        client = stack.enter_context(_Client(server.url, outputs, in_flight))
        served, called = client.run(batches[:1])[0], _direct(engines, manifest, batches[0])
        same = all(np.array_equal(served[name], called[name]) for name in outputs)
        seconds: dict[str, list[float]] = {"triton": [], "direct": []}
        before = client.compute_ns()
        for index in range(rounds + 1):
            sides: list[tuple[str, Callable[[], object]]] = [
                ("triton", lambda: client.run(batches)),
                ("direct", lambda: [_direct(engines, manifest, inputs) for inputs in batches]),
            ]
            for side, run in sides if index % 2 else reversed(sides):
                start = time.perf_counter()
                run()
                if index:
                    seconds[side].append(time.perf_counter() - start)
            if index:
                rates = {side: batch * requests / values[-1] for side, values in seconds.items()}
                progress(f"round {index}: {rates['triton']:.2f} tiles/s through Triton, {rates['direct']:.2f} directly")
        after = client.compute_ns()
        stages = _stage_times(engines, manifest, batches[0])
    tiles = batch * requests
    return ServingReport(
        model_name=manifest.model_name,
        model_version=manifest.model_version,
        device=builder.device().name,
        threads=threads or available_cpus(),
        batch=batch,
        in_flight=in_flight,
        rounds=rounds,
        tiles_per_round=tiles,
        outputs=tuple(outputs),
        triton_tiles_per_second=Spread.of([tiles / s for s in seconds["triton"]]),
        direct_tiles_per_second=Spread.of([tiles / s for s in seconds["direct"]]),
        ratio=Spread.of([d / t for d, t in zip(seconds["direct"], seconds["triton"], strict=True)]),
        same_bytes=same,
        direct_ms_per_tile=stages,
        triton_ms_per_tile={name: (after[name] - before[name]) / 1e6 / (tiles * (rounds + 1)) for name in after},
    )


class _Client:
    """Sends batches, a bounded number in flight, and reads the results."""

    def __init__(self, url: str, outputs: Sequence[str], in_flight: int) -> None:
        import tritonclient.grpc as triton

        self._triton = triton
        self._outputs = [triton.InferRequestedOutput(name) for name in outputs]
        self._in_flight = in_flight
        self._client = triton.InferenceServerClient(
            url,
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
                    "staindiffuser",
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

    def compute_ns(self) -> dict[str, int]:
        """Time each model has computed so far, nanoseconds."""
        models = self._client.get_inference_statistics().model_stats
        spent = {m.name: int(m.inference_stats.compute_infer.ns) for m in models}
        return {
            name: ns for name, ns in spent.items() if name != "staindiffuser"
        } or spent  # an ensemble computes nothing

    def _inputs(self, arrays: Arrays) -> list[Any]:
        inputs = []
        for name, dtype in (("HE", "UINT8"), ("ORIGIN", "INT64"), ("SEED", "INT64")):
            tensor = self._triton.InferInput(name, arrays[name].shape, dtype)
            inputs.append(tensor.set_data_from_numpy(arrays[name]))
        return inputs


def _direct(engines: Mapping[str, Engine], manifest: Manifest, inputs: Arrays) -> Arrays:
    return run_pipeline(engines, manifest.engines, steps=manifest.steps, tile=manifest.tile, inputs=inputs)[1]


def _random_batch(manifest: Manifest, batch: int, seed: int) -> Arrays:
    generator = np.random.default_rng(seed)
    return {
        "HE": generator.integers(0, 256, (batch, manifest.tile, manifest.tile, 3), dtype=np.uint8),
        "ORIGIN": generator.integers(-64, 64, (batch, 2)) * philox.ORIGIN_MULTIPLE,
        "SEED": generator.integers(0, 2**40, (batch, 1)),
    }


def _stage_times(
    engines: Mapping[str, Engine], manifest: Manifest, inputs: Arrays, repeats: int = 3
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

    measure("noise", noise)
    for run in engine_runs(engines, manifest.engines):
        # Engines that are one graph are Triton's one model.
        name = run.names[0] if len(run.names) == 1 else "staindiffuser"
        measure(name, lambda run=run: run.engine.run({n: tensors[n] for n in run.inputs}, run.outputs))  # type: ignore[misc]
    return times
