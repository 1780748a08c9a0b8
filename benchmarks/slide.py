"""``staindiffuser bench slide``: what the client costs besides the server, with a stub of known cost in its place, or
Triton with engines that do nothing; of a real slide, beside Triton with its engines, or the whole of it beside other
programs (:mod:`~staindiffuser.benchmarks.whole_slide`).

Each measurement runs in a process of its own, whose peak memory and processor time are its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import multiprocessing
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args
from unittest.mock import patch

import typer

from staindiffuser.allocator import use_few_arenas
from staindiffuser.benchmarks.reporting import JsonFile, hand_over

__all__ = ["SlideBench", "SlideReport", "SlideRun", "bench_slide", "slide"]

MPP = 0.5
SLIDE, DRAWINGS = "slide.tif", "drawings.npz"


Writes = Literal["images", "images and maps", "cells too"]
"""What a run writes: the stained images alone, with their cell maps, or with maps and cells."""


@dataclass(frozen=True, kw_only=True)
class SlideBench:
    """What is stained."""

    slide: str = ""
    """Name of a real one, stained by Triton and the demonstration's engines; by default one is made up."""
    side: int = 20480
    """Of the slide, pixels."""
    cells: int = 500_000
    """Stained cells on it, of all stains together, about."""
    stains: int = 2
    tissue: float = 1.0
    """Share of the slide's side that is tissue; the rest is glass."""
    tile: int = 512
    """Side of the stub's tiles, pixels."""
    tile_ms: float = 0.0
    """What the stub takes for a tile, ms; of a real slide, what the server takes for it alone."""
    triton: bool = False
    """A real Triton on the same cores instead of the stub; its engines do nothing."""
    pyramid: bool = True
    """The slide has reduced levels."""
    cores: int = 2
    batch: int = 8
    in_flight: int = 3
    rounds: int = 1
    nuclei: bool = True
    """With cells, count the H&E's nuclei as well, as `stain` does."""
    images_only: bool = True
    """Measure images alone, and images and cell maps without finding the cells, as well, in turns."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class SlideRun:
    """What one run took."""

    writes: Writes
    megapixels: float
    """Of the slide."""
    seconds: float
    """From opening the slide to the last file."""
    megapixels_per_second: float
    cpu_seconds: float
    """Of all cores together."""
    peak_mib: float
    """Largest resident memory of the process."""
    base_mib: float
    """Of it, with libraries and the stub's drawings loaded."""
    tiles: int
    cells: dict[str, int]
    server_share: float | None
    """Wall time over tiles × the stub's time per tile."""
    stages: dict[str, float]
    """Seconds per stage, summed over threads."""
    cpu_ms_per_megapixel: dict[str, float]
    """Processor time per stage, summed over threads; ``other`` is what no stage names, such as opening the slide."""


@dataclass(frozen=True, kw_only=True)
class SlideReport:
    """All runs, and what follows from them."""

    bench: SlideBench
    runs: tuple[SlideRun, ...]
    with_cells: float
    """Median megapixels a second."""
    images_only: float | None
    ratio: float | None
    """The median over rounds of the rate with cells over that of images alone."""
    cpu_ratio: float | None
    """The same by processor time, for a machine that does other things as well."""
    maps_ratio: float | None
    """The median over rounds of the rate with cells over that of the same images and maps without cells."""
    maps_cpu_ratio: float | None
    """The same by processor time."""

    def lines(self) -> list[str]:
        """The report for people."""
        bench = self.bench
        server = f"stub of {bench.tile_ms:g} ms a tile"
        if bench.slide:
            server = f"Triton that takes {bench.tile_ms:.1f} ms a tile alone"
        elif bench.triton:
            server = "Triton with engines that do nothing"
        what = f"{bench.side} x {bench.side} px, {bench.stains} stains" if not bench.slide else bench.slide
        lines = [f"{what}, {server}, {bench.cores} cores, {bench.rounds} rounds"]
        for run in self.runs:
            what = f"{sum(run.cells.values())} cells" if run.writes == "cells too" else f"{run.writes} only"
            share = f", {run.server_share:.3f} x the server's time" if run.server_share is not None else ""
            lines.append(
                f"{what}: {run.megapixels_per_second:.2f} MP/s, {run.seconds:.1f} s, {run.cpu_seconds:.1f} s of CPU, "
                f"peak {run.peak_mib:.0f} MiB ({run.base_mib:.0f} before the slide){share}"
            )
            lines.append("  " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in run.stages.items()))
            parts = ", ".join(f"{name} {ms:.1f}" for name, ms in run.cpu_ms_per_megapixel.items())
            whole = 1000 * run.cpu_seconds / run.megapixels
            lines.append(f"  CPU, ms a megapixel: {whole:.1f} ({parts}), {bench.cores * 1000 / whole:.1f} MP/s at most")
        if self.ratio is not None:
            lines.append(f"with cells / images only: {self.ratio:.3f}, by processor time {self.cpu_ratio:.3f}")
            lines.append(
                f"with cells / images and maps only: {self.maps_ratio:.3f}, by processor time {self.maps_cpu_ratio:.3f}"
            )
        return lines


def bench_slide(
    bench: SlideBench,
    progress: Callable[[str], None] = lambda line: None,
    *,
    real: Path | None = None,
    keep: Path | None = None,
) -> SlideReport:
    """Stain a slide with and without cells, in turns.

    Args:
        bench: what to measure.
        progress: told before each run.
        real: the slide that ``bench`` names.
        keep: where to keep the result with cells, written as GeoParquet and SpatialData too.
    """
    import numpy as np

    from staindiffuser.benchmarks.stub_tissue import StubTissue, write_slide

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = stack.enter_context(_triton(bench, folder)) if bench.triton else None
        if real is not None and url is not None:
            progress("the server alone")
            bench = dataclasses.replace(bench, tile_ms=_tile_ms(bench, url))
        else:
            progress("writing the slide")
            area_mm2 = (bench.side * bench.tissue * MPP / 1000) ** 2
            tissue = StubTissue(bench.cells / area_mm2, bench.stains, bench.seed)
            tissue_side = round(bench.side * bench.tissue)
            write_slide(folder / SLIDE, tissue, bench.side, tissue_side=tissue_side, pyramid=bench.pyramid)
            np.savez(folder / DRAWINGS, maps=np.stack(tissue.maps), images=np.stack(tissue.images))
        runs = []
        for number in range(bench.rounds):
            kinds: tuple[Writes, ...] = get_args(Writes)
            for writes in kinds if bench.images_only else kinds[-1:]:
                progress(f"round {number + 1}: {writes}")
                # A fresh process each: its peak memory is that of one run.
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    runs.append(pool.submit(_measure, bench, folder, writes, url, real, keep).result())
    return _report(bench, runs)


@contextlib.contextmanager
def _triton(bench: SlideBench, folder: Path) -> Iterator[str]:
    """The address of a Triton whose engines do nothing, or, for a real slide, of one that stains."""
    from staindiffuser.benchmarks.idle_engines import build_idle
    from staindiffuser.export.manifest import Manifest
    from staindiffuser.serving.demo import repository_of
    from staindiffuser.serving.server import TritonServer

    if not bench.slide:
        manifest = Manifest.load(repository_of(None, fast=False))
        repository = build_idle(manifest, folder, flavour=manifest.flavour, max_batch=bench.batch)
    else:
        repository = repository_of(None)
    with TritonServer(repository) as server:
        yield server.url


def _tile_ms(bench: SlideBench, url: str) -> float:
    """What the server takes for a tile at the same batch and as many requests in flight, for a client that does
    nothing else: the median of three rounds."""
    import numpy as np

    from staindiffuser.client.connection import StainClient

    with StainClient(url) as client, ThreadPoolExecutor(bench.in_flight) as pool:
        batch, side = min(bench.batch, client.contract.max_batch), client.contract.tile
        tiles = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), np.uint8)
        requests = 2 * bench.in_flight
        rounds = []
        for _ in range(3):
            start = time.perf_counter()
            list(pool.map(lambda number: client.stain_tiles(tiles, quality=True), range(requests)))
            rounds.append(time.perf_counter() - start)
    return 1000 * statistics.median(rounds) / (requests * batch)


def _report(bench: SlideBench, runs: Sequence[SlideRun]) -> SlideReport:
    images, maps, complete = ([run for run in runs if run.writes == writes] for writes in get_args(Writes))

    def median(others: Sequence[SlideRun], ratio: Callable[[SlideRun, SlideRun], float]) -> float | None:
        return statistics.median(map(ratio, complete, others)) if others else None

    def rate(run: SlideRun, other: SlideRun) -> float:
        return run.megapixels_per_second / other.megapixels_per_second

    def cpu(run: SlideRun, other: SlideRun) -> float:
        return other.cpu_seconds / run.cpu_seconds

    return SlideReport(
        bench=bench,
        runs=tuple(runs),
        with_cells=statistics.median(run.megapixels_per_second for run in complete),
        images_only=statistics.median(run.megapixels_per_second for run in images) if images else None,
        ratio=median(images, rate),
        cpu_ratio=median(images, cpu),
        maps_ratio=median(maps, rate),
        maps_cpu_ratio=median(maps, cpu),
    )


def _measure(
    bench: SlideBench,
    folder: Path,
    writes: Writes,
    url: str | None = None,
    real: Path | None = None,
    keep: Path | None = None,
) -> SlideRun:
    """One run, in this process; without ``url`` by the stub, without ``real`` of the slide made up in ``folder``."""
    use_few_arenas()  # as `stain` does
    allowed = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, set(allowed[: bench.cores]))
    import numpy as np

    from staindiffuser.benchmarks.stub_tissue import StubStainer
    from staindiffuser.client.cells import MapCells
    from staindiffuser.client.connection import StainClient
    from staindiffuser.client.contract import Stainer
    from staindiffuser.client.options import StainingOptions
    from staindiffuser.client.progress import QuietReporter
    from staindiffuser.client.staining import SlideJob

    stainer: Stainer
    if url is not None:
        stainer = StainClient(url)
    else:
        with np.load(folder / DRAWINGS) as drawn:
            stainer = StubStainer(
                drawn["maps"], drawn["images"], tile=bench.tile, seconds_per_tile=bench.tile_ms / 1000
            )
    complete = writes == "cells too"
    options = StainingOptions(
        batch=bench.batch, in_flight=bench.in_flight, cells=writes != "images", nuclei=bench.nuclei and complete
    )
    output = folder / "result"
    if keep is not None and complete:
        output = keep
        options = dataclasses.replace(options, parquet=True, formats=("spatialdata",), overwrite=True)
    base, cpu, start = _peak_mib(), time.process_time(), time.perf_counter()
    with (
        contextlib.nullcontext() if complete else patch.object(MapCells, "add_row", lambda self, blocks: []),
        SlideJob(real or folder / SLIDE, output, options) as job,
    ):
        run = job.stain(stainer, QuietReporter())
        seconds = time.perf_counter() - start
        cpu_seconds = time.process_time() - cpu
    if output != keep:
        shutil.rmtree(output)
    server = run.tiles.stained * bench.tile_ms / 1000
    megapixels = math.prod(run.result.size) / 1e6
    stages = job.run.watch.cpu_seconds() if job.run is not None else {}
    stages["other"] = cpu_seconds - sum(stages.values())
    return SlideRun(
        writes=writes,
        megapixels=megapixels,
        seconds=round(seconds, 2),
        megapixels_per_second=round(megapixels / seconds, 3),
        cpu_seconds=round(cpu_seconds, 2),
        peak_mib=round(_peak_mib(), 1),
        base_mib=round(base, 1),
        tiles=run.tiles.stained,
        cells=run.cells,
        server_share=round(seconds / server, 4) if server else None,
        stages=run.seconds.stages_summed_over_threads,
        cpu_ms_per_megapixel={name: round(1000 * value / megapixels, 2) for name, value in stages.items()},
    )


def _peak_mib() -> float:
    """Largest resident memory so far; not ``getrusage``'s, in which a process begins with its parent's."""
    status = Path("/proc/self/status")
    if not status.exists():  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    (line,) = [line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) / 1024


def slide(
    real: Annotated[
        Path | None,
        typer.Argument(
            help="A real slide to stain whole, with the model that ships, beside --peer; with --triton, by a server "
            "that runs already. Without it, a made-up slide."
        ),
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(help="NAME=PYTHON: LazySlide, tiatoolbox or WSInfer, in the Python that has it. Repeatable."),
    ] = None,
    side: Annotated[int, typer.Option(min=512, help="Side of the slide, pixels.")] = 20480,
    cells: Annotated[int, typer.Option(min=0, help="Stained cells on it, of all stains together.")] = 500_000,
    stains: Annotated[int, typer.Option(min=1, help="Number of stains.")] = 2,
    tissue: Annotated[float, typer.Option(min=0.05, max=1, help="Share of the side that is tissue, not glass.")] = 1.0,
    tile: Annotated[int, typer.Option(min=256, help="Side of a tile, pixels.")] = 512,
    tile_ms: Annotated[float, typer.Option(min=0, help="What the stub takes for a tile, ms.")] = 0.0,
    triton: Annotated[
        bool,
        typer.Option(
            "--triton",
            help="A real Triton in the stub's place, with the demonstration's stains and engines that do nothing and "
            "find no cells; for a real slide, with its engines.",
        ),
    ] = False,
    pyramid: Annotated[bool, typer.Option("--pyramid/--no-pyramid", help="Whether the slide has levels.")] = True,
    cores: Annotated[int, typer.Option(min=1, help="Cores to use.")] = 2,
    batch: Annotated[int, typer.Option(min=1, help="Tiles per request.")] = 8,
    in_flight: Annotated[int, typer.Option(min=1, help="Concurrent requests.")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="Runs with cells and without, in turns.")] = 1,
    nuclei: Annotated[
        bool, typer.Option("--nuclei/--no-nuclei", help="With cells, count the H&E's nuclei as well.")
    ] = True,
    images_only: Annotated[
        bool, typer.Option("--images-only/--no-images-only", help="Also measure without cells, for the ratio.")
    ] = True,
    keep: Annotated[
        Path | None,
        typer.Option(help="Keep the result with cells in this folder, with GeoParquet and SpatialData as well."),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """The slide client alone, with a stub of known cost as the server; or a real slide whole, beside other programs."""

    if real is not None and not triton:
        from staindiffuser.benchmarks.peers import PEERS
        from staindiffuser.benchmarks.whole_slide import bench_whole_slide
        from staindiffuser.errors import UsageError
        from staindiffuser.serving.demo import demo_graphs

        pairs = [entry.partition("=") for entry in peer or ()]
        if not all(python for _, _, python in pairs):
            raise UsageError("--peer: NAME=PYTHON, such as LazySlide=/opt/lazyslide/bin/python")
        spelled = {one.name.lower(): one.name for one in PEERS}
        whole = bench_whole_slide(
            real,
            demo_graphs().parent,
            {spelled.get(name.lower(), name): Path(python) for name, _, python in pairs},
            rounds=rounds,
            progress=lambda line: typer.echo(line, err=True),
        )
        if not hand_over(whole, json_file):
            for line in whole.lines():
                typer.echo(line)
        return
    bench = SlideBench(
        slide=real.name if real is not None else "",
        side=side,
        cells=cells,
        stains=stains,
        tissue=tissue,
        tile=tile,
        tile_ms=tile_ms,
        triton=triton,
        pyramid=pyramid,
        cores=cores,
        batch=batch,
        in_flight=in_flight,
        rounds=rounds,
        nuclei=nuclei,
        images_only=images_only,
    )
    report = bench_slide(bench, lambda line: typer.echo(line, err=True), real=real, keep=keep)
    if hand_over(report, json_file):
        return
    for line in report.lines():
        typer.echo(line)
