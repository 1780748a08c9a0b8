"""``staindiffuser bench loader``: how fast the training loader makes augmented crops, and what each part costs.

Torch is imported when it runs.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from staindiffuser.benchmarks.reporting import JsonFile, hand_over

if TYPE_CHECKING:
    from staindiffuser.training.data.dataset import CropDataset

__all__ = ["LoaderReport", "Speed", "bench_loader", "loader"]


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What one run of the loader took."""

    tiles_per_second: float
    """By wall clock, including the start of the workers."""
    cpu_ms_per_tile: float
    """Processor time of all processes together; unlike wall clock, hardly affected by other load."""


@dataclass(frozen=True, kw_only=True)
class LoaderReport:
    """What was measured."""

    tiles: int
    """Training tiles in the folder."""
    samples: int
    """Crops per run."""
    stains: int
    crop: int
    batch: int
    workers: int
    cores: int
    """Cores available to this process."""
    cold: Speed
    """Every tile decoded from its files (which the operating system may have in memory)."""
    warm: Speed
    """Every tile from the cache of decoded tiles."""
    parts_ms: Mapping[str, float]
    """Processor time of each part of a sample, in one process, ms."""


def bench_loader(
    data: list[str],
    *,
    crop: int = 256,
    workers: int = 2,
    batch: int = 16,
    samples: int = 1024,
    progress: Callable[[str], None] = lambda message: None,
) -> LoaderReport:
    """Measure the loader that training uses, augmentation and noise included.

    Args:
        data: as ``train --data``: folders of paired tiles.
        samples: crops per run.
        progress: told before each run.

    Raises:
        DataError: the tiles cannot be used.
    """
    from staindiffuser.training.data.dataset import CropDataset
    from staindiffuser.training.tiles.mixed_tiles import open_tiles

    tiles = open_tiles(data)
    dataset = CropDataset(tiles, crop=crop, seed=0, cache_bytes=0)
    samples = max(batch, samples // batch * batch)
    progress(f"parts of {len(dataset)} tiles, one process")
    parts = _parts(dataset, min(64, samples))
    progress("cold: tiles are decoded")
    cold = _run(dataset, samples, batch, workers)
    progress("warm: tiles come from the cache")
    dataset = CropDataset(tiles, crop=crop, seed=0, cache_bytes=1 << 40)
    for sample in range(samples):
        dataset.decoded(dataset.index(sample))
    return LoaderReport(
        tiles=len(dataset),
        samples=samples,
        stains=len(dataset.stains),
        crop=crop,
        batch=batch,
        workers=workers,
        cores=len(os.sched_getaffinity(0)),
        cold=cold,
        warm=_run(dataset, samples, batch, workers),
        parts_ms=parts,
    )


def _run(dataset: CropDataset, samples: int, batch: int, workers: int) -> Speed:
    import torch

    from staindiffuser.training.data.loader import BatchLoader, sample_numbers

    numbers = sample_numbers(range(samples // batch), batch=batch)
    seen = 0
    start, cpu = time.perf_counter(), _cpu_seconds()
    with BatchLoader(dataset, numbers, workers=workers, pin=torch.cuda.is_available()) as batches:
        while (crops := batches.take()) is not None:
            seen += len(crops)
        seconds = time.perf_counter() - start
    # The loader processes have ended by now, so their processor time is counted.
    return Speed(
        tiles_per_second=round(seen / seconds, 1), cpu_ms_per_tile=round((_cpu_seconds() - cpu) / seen * 1e3, 2)
    )


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _parts(dataset: CropDataset, samples: int) -> dict[str, float]:
    """Median processor time of each part, ms per tile."""
    import numpy as np

    from staindiffuser.training.data.augmentation import jitter_stain
    from staindiffuser.training.data.dataset import normal_noise, oriented
    from staindiffuser.training.data.targets import load_tile

    rng = np.random.default_rng(0)
    crop, shape = dataset.crop, (len(dataset.stains), 4, dataset.crop, dataset.crop)
    seconds: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[..., Any], *arguments: Any) -> Any:
        start = time.process_time()
        result = work(*arguments)
        seconds.setdefault(name, []).append(time.process_time() - start)
        return result

    def augment(arrays: Mapping[str, Any], orientation: int) -> list[Any]:
        return [oriented(array[:crop, :crop], orientation) for array in arrays.values()]

    for sample in range(samples):
        arrays = timed("decode", load_tile, dataset.rows[dataset.index(sample)], dataset.stains)
        timed("augment", augment, arrays, sample % 8)
        timed("jitter", jitter_stain, arrays["he"][:crop, :crop], rng, dataset.jitter)
        timed("noise", normal_noise, rng, shape)
    return {name: round(float(np.median(values)) * 1e3, 3) for name, values in seconds.items()}


def loader(
    data: Annotated[
        list[str], typer.Option(help="Folder of paired tiles, or FOLDER=WEIGHT; repeat it to mix.", show_default=False)
    ],
    crop: Annotated[int, typer.Option(min=16, help="Edge of a crop, pixels.")] = 256,
    workers: Annotated[int, typer.Option(min=0, help="Loader processes.")] = 2,
    batch: Annotated[int, typer.Option(min=1, help="Crops a batch.")] = 16,
    samples: Annotated[int, typer.Option(min=1, help="Crops a run.")] = 1024,
    json_file: JsonFile = None,
) -> None:
    """Crops per second of the training loader: decoded from PNG, and from the cache; and the cost of each part."""

    report = bench_loader(
        data,
        crop=crop,
        workers=workers,
        batch=batch,
        samples=samples,
        progress=lambda message: typer.echo(message, err=True),
    )
    if hand_over(report, json_file):
        return
    typer.echo(
        f"{report.crop} px, {report.stains} stains, {report.workers} workers on {report.cores} cores, "
        f"{report.samples} crops of {report.tiles} tiles"
    )
    for label, speed in (("cold", report.cold), ("warm", report.warm)):
        typer.echo(f"{label}: {speed.tiles_per_second:.0f} tiles/s, {speed.cpu_ms_per_tile:.1f} ms of CPU a tile")
    for name, milliseconds in report.parts_ms.items():
        typer.echo(f"{name:>8} {milliseconds:7.2f} ms")
