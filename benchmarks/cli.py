"""``staindiffuser bench``: what things cost on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Measure this machine: latency, throughput, quality.")


@app.callback()
def _group() -> None:
    """Measure this machine: latency, throughput, quality."""


@app.command(epilog="Example: staindiffuser bench serving models --batch 8 --rounds 7 --json serving.json")
def serving(
    repository: Annotated[
        Path | None,
        typer.Argument(help="Model repository that `export build` wrote; the shipped demonstration if absent."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Tiles a request.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Counted rounds of either side.")] = 7,
    requests: Annotated[int, typer.Option(min=1, help="Requests a round.")] = 4,
    in_flight: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 2,
    threads: Annotated[int | None, typer.Option(help="Threads of each engine; 0 for all cores.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the report here as JSON; - for the screen.")
    ] = None,
) -> None:
    """The same tiles through a real Triton server and through the engines called directly in one process."""
    import dataclasses
    import json

    from staindiffuser.benchmarks.serving import bench_serving
    from staindiffuser.errors import UsageError
    from staindiffuser.export.manifest import Manifest
    from staindiffuser.files import write_json
    from staindiffuser.serving.demo import demo_repository

    def say(message: str) -> None:
        typer.echo(message, err=True)

    chosen = repository or demo_repository(say)
    largest = Manifest.load(chosen).max_batch
    if batch > largest:
        raise UsageError(f"--batch {batch} is more than the {largest} that {chosen} accepts")
    report = bench_serving(
        chosen, batch=batch, rounds=rounds, requests=requests, in_flight=in_flight, threads=threads, progress=say
    )
    if json_file is not None and str(json_file) == "-":
        typer.echo(json.dumps(dataclasses.asdict(report), indent=1))
        return
    if json_file is not None:
        write_json(json_file, dataclasses.asdict(report))
    typer.echo(f"model {report.model_name} ({report.model_version[:12]}) on {report.device}")
    typer.echo(
        f"batch {report.batch}, {report.in_flight} requests in flight, {report.threads} threads an engine, "
        f"{len(report.outputs)} outputs, {report.rounds} rounds of {report.tiles_per_round} tiles"
    )
    for label, spread in (("Triton", report.triton_tiles_per_second), ("direct", report.direct_tiles_per_second)):
        typer.echo(f"{label}: {spread.median:.2f} tiles/s ({spread.smallest:.2f} to {spread.largest:.2f})")
    ratio = report.ratio
    typer.echo(
        f"Triton / direct: {ratio.median:.3f} (90 % interval of the median {ratio.low:.3f} to {ratio.high:.3f}, "
        f"rounds {ratio.smallest:.3f} to {ratio.largest:.3f})"
    )
    typer.echo(f"same bytes: {'yes' if report.same_bytes else 'NO'}")
    typer.echo(f"{'ms per tile':>16} {'direct':>8} {'Triton':>8}")
    for name, milliseconds in report.direct_ms_per_tile.items():
        typer.echo(f"{name:>16} {milliseconds:8.2f} {report.triton_ms_per_tile.get(name, 0.0):8.2f}")


@app.command(epilog="Example: staindiffuser bench plausibility slide-stained other-stained --json plausibility.json")
def plausibility(
    results: Annotated[list[Path], typer.Argument(help="Folders that `stain` wrote; their H&E must still be there.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers here as JSON.")] = None,
) -> None:
    """Clean glass and kept nuclei: what can be said of a virtual stain on a real slide without its IHC."""
    import dataclasses

    from staindiffuser.benchmarks.plausibility import judge
    from staindiffuser.files import write_json

    rows = {str(result): judge(result) for result in results}
    for result, judged in rows.items():
        for row in judged:
            typer.echo(
                f"{result} {row.stain}: DAB optical density on glass {row.glass_dab:.4f}, "
                f"nuclei Dice {row.nuclei_dice:.3f}"
            )
    if json_file is not None:
        write_json(json_file, {name: [dataclasses.asdict(row) for row in judged] for name, judged in rows.items()})
