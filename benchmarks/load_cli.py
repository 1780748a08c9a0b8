"""``staindiffuser bench load``: its options and its table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from staindiffuser.benchmarks.reporting import JsonFile, hand_over

__all__ = ["load"]


def load(
    repository: Annotated[
        Path | None,
        typer.Argument(help="Model repository from `export build`, or a shipped model's name; `demo` by default."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Tiles a request.")] = 1,
    clients: Annotated[str, typer.Option(help="Clients that wait for one another (closed loop).")] = "1,16",
    shares: Annotated[
        str, typer.Option(help="Of what the server can take: rates at which requests arrive at random (open loop).")
    ] = "0.25,0.5,0.75",
    seconds: Annotated[float, typer.Option(min=0.1, help="Of each measurement.")] = 10.0,
    rounds: Annotated[
        int,
        typer.Option(min=1, help="With more than one, all servers are up at once and the closed loops take turns."),
    ] = 1,
    threads: Annotated[int | None, typer.Option(help="Threads of each engine; 0 for all cores.")] = None,
    rival: Annotated[
        list[str] | None,
        typer.Option(help="Also this server, such as 'LitServe'; repeat it. (default: all that are installed)"),
    ] = None,
    idle: Annotated[
        bool, typer.Option("--idle", help="Engines that do nothing, with the tensors of the repository's.")
    ] = False,
    no_rival: Annotated[bool, typer.Option("--no-rival", help="Only ours.")] = False,
    json_file: JsonFile = None,
) -> None:
    """A real Triton server under load, beside the same engines behind FastAPI, LitServe, BentoML, Ray Serve, PyTriton.

    Latency counts from the moment at which a request was due.
    """
    import contextlib
    import tempfile

    from staindiffuser.benchmarks.idle_engines import build_idle
    from staindiffuser.benchmarks.load import bench_load
    from staindiffuser.benchmarks.rivals import RIVALS
    from staindiffuser.errors import UsageError
    from staindiffuser.export.manifest import Manifest
    from staindiffuser.serving.demo import repository_of

    def say(message: str) -> None:
        typer.echo(message, err=True)

    try:
        counts = tuple(int(part) for part in clients.split(","))
        fractions = tuple(float(part) for part in shares.split(","))
    except ValueError:
        raise UsageError(
            "--clients and --shares: numbers with commas between them, such as 1,16 and 0.25,0.5"
        ) from None
    if min(counts) < 1 or min(fractions) <= 0:
        raise UsageError("--clients must be at least 1, --shares more than 0")
    names = [server.name for server in RIVALS]
    for name in rival or ():
        if name not in names:
            raise UsageError(f"--rival {name}: there is {', '.join(names)}")
    chosen = repository_of(repository, say)
    largest = Manifest.load(chosen).max_batch
    if batch > largest:
        raise UsageError(f"--batch {batch} is more than the {largest} that {chosen} accepts")
    with contextlib.ExitStack() as stack:
        if idle:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="staindiffuser-idle-")))
            manifest = Manifest.load(chosen)
            chosen = build_idle(manifest, folder, flavour=manifest.flavour, max_batch=manifest.max_batch)
        report = bench_load(
            chosen,
            batch=batch,
            clients=counts,
            shares=fractions,
            seconds=seconds,
            threads=threads,
            rounds=rounds,
            rivals=() if no_rival else rival or tuple(names),
            progress=say,
        )
    if hand_over(report, json_file):
        return
    typer.echo(
        f"model {report.model_name} on {report.target}, batch {batch}, {report.threads or 'all'} threads an engine"
    )
    for name, rates in report.closed.items():
        told = ", ".join(f"{rate:.2f} with {count}" for count, rate in zip(report.clients, rates, strict=True))
        typer.echo(f"{name}: requests/s by clients: {told}")
    name, *others = report.closed
    for other in others:
        found = report.ratio(other)
        spread = f" ({found.smallest:.2f} to {found.largest:.2f})" if report.turns else ""
        typer.echo(f"{name} / {other}, {report.clients[-1]} clients: {found.median:.2f}{spread}")
    for other, why in report.absent.items():
        typer.echo(f"{other}: not here: {why}")
    if others:
        typer.echo(f"same bytes: {'yes' if report.same_bytes else 'NO'}")
    for name, loops in report.open.items():
        for loop in loops:
            waited = "none answered"
            if loop.p50 is not None and loop.p95 is not None and loop.p99 is not None:
                ratio = loop.p99 / loop.p50
                waited = f"p50 {loop.p50:.0f}, p95 {loop.p95:.0f}, p99 {loop.p99:.0f} ms (p99 / p50 {ratio:.1f})"
            typer.echo(f"{name} at {loop.share:.0%}, {loop.offered:.2f} requests/s: {waited}; {loop.failed} refused")
    for model, parts in report.triton_ms.items():
        typer.echo(f"{model:>16} " + "  ".join(f"{part} {value:.2f} ms" for part, value in parts.items()))
