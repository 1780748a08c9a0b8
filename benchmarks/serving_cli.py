"""``staindiffuser bench serving``: its options and its lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from staindiffuser.benchmarks.reporting import JsonFile, hand_over

if TYPE_CHECKING:
    from staindiffuser.benchmarks.serving import ServingReport

__all__ = ["serving"]

TARGETS = {"Triton / direct": "at least 0.95", "proxy / Triton": "at least 0.90"}
"""What the server is held to (ours)."""


def serving(
    repository: Annotated[
        Path | None,
        typer.Argument(help="Model repository from `export build`, or a shipped model's name; `demo` by default."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Tiles a request.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Counted rounds of each side.")] = 7,
    requests: Annotated[int, typer.Option(min=1, help="Requests a round.")] = 4,
    in_flight: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 2,
    threads: Annotated[int | None, typer.Option(help="Threads of each engine; 0 for all cores.")] = None,
    proxy: Annotated[
        bool, typer.Option("--proxy", help="Also behind HAProxy with mutual TLS (needs haproxy, cryptography).")
    ] = False,
    beside: Annotated[
        Path | None, typer.Option(help="Another repository of the same model, such as one of another flavour.")
    ] = None,
    two_clients: Annotated[
        bool, typer.Option("--two-clients", help="Also two clients, one stain each, side by side and alone.")
    ] = False,
    overhead: Annotated[
        int, typer.Option(min=0, help="Also this many requests of one tile to engines that do nothing; 0: none.")
    ] = 0,
    json_file: JsonFile = None,
) -> None:
    """The same tiles through a real Triton server and through the engines called directly in one process."""

    from staindiffuser.benchmarks.serving import bench_serving
    from staindiffuser.errors import UsageError
    from staindiffuser.export.manifest import Manifest
    from staindiffuser.serving.demo import repository_of

    def say(message: str) -> None:
        typer.echo(message, err=True)

    chosen = repository_of(repository, say)
    for folder in (chosen, beside):
        if folder is None:
            continue
        largest = Manifest.load(folder).max_batch
        if batch > largest:
            raise UsageError(f"--batch {batch} is more than the {largest} that {folder} accepts")
    report = bench_serving(
        chosen,
        batch=batch,
        rounds=rounds,
        requests=requests,
        in_flight=in_flight,
        threads=threads,
        proxy=proxy,
        beside=beside,
        two_clients=two_clients,
        overhead=overhead,
        progress=say,
    )
    if not hand_over(report, json_file):
        for line in _lines(report):
            typer.echo(line)


def _lines(report: ServingReport) -> Iterator[str]:
    yield f"model {report.model_name} ({report.model_version[:12]}), flavour {report.flavour}, on {report.device}"
    yield (
        f"batch {report.batch}, {report.in_flight} requests in flight, {report.threads} threads an engine, "
        f"{len(report.outputs)} outputs, {report.rounds} rounds of {report.tiles_per_round} tiles"
    )
    for side, spread in report.tiles_per_second.items():
        cpu = report.cpu_ms_per_tile[side]
        yield (
            f"{side}: {spread.median:.2f} tiles/s ({spread.smallest:.2f} to {spread.largest:.2f}), "
            f"{cpu.median:.0f} ms of processor time a tile ({cpu.smallest:.0f} to {cpu.largest:.0f})"
        )
    for name, ratio in report.ratios.items():
        wanted = f"; {TARGETS[name]} is asked" if name in TARGETS else ""
        yield (
            f"{name}: {ratio.median:.3f} (90 % interval of the median {ratio.low:.3f} to {ratio.high:.3f}, "
            f"rounds {ratio.smallest:.3f} to {ratio.largest:.3f}{wanted}); "
            f"by processor time {report.cpu_ratios[name].median:.3f}"
        )
    other = "" if report.beside_levels is None else f"; beside at most {report.beside_levels} grey levels apart"
    yield f"same bytes: {'yes' if report.same_bytes else 'NO'}{other}"
    if report.two_clients is not None:
        share, cpu = report.two_clients.clock, report.two_clients.cpu
        yield (
            f"two clients, one stain each, side by side / the sum of both alone: {share.median:.3f} "
            f"(rounds {share.smallest:.3f} to {share.largest:.3f}; at most 1 is asked); "
            f"by processor time {cpu.median:.3f}"
        )
    for flavour, cost in (report.overhead_ms or {}).items():
        yield (
            f"a tile through engines that do nothing, flavour {flavour}: {cost.median:.1f} ms more than called "
            f"directly (90 % interval of the median {cost.low:.1f} to {cost.high:.1f}; at most 8 is asked)"
        )
    yield f"{'ms per tile':>16} {'direct':>8} {'Triton':>8}"
    direct, triton = report.direct_ms_per_tile, report.triton_ms_per_tile
    for name in (*direct, *(name for name in triton if name not in direct)):
        columns = (f"{times[name]:8.2f}" if name in times else f"{'':8}" for times in (direct, triton))
        yield f"{name:>16} {' '.join(columns)}".rstrip()
