"""``staindiffuser bench``: what things cost on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from staindiffuser.benchmarks.ablations_cli import ablations
from staindiffuser.benchmarks.loader import loader
from staindiffuser.benchmarks.slide import slide
from staindiffuser.files import check_file

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
        Path | None,
        typer.Option("--json", callback=check_file, help="Write the report here as JSON; - for the screen."),
    ] = None,
) -> None:
    """The same tiles through a real Triton server and through the engines called directly in one process."""
    import dataclasses
    import json

    from staindiffuser.benchmarks.serving import bench_serving
    from staindiffuser.errors import UsageError
    from staindiffuser.export.manifest import Manifest
    from staindiffuser.files import write_json
    from staindiffuser.serving.demo import repository_of

    def say(message: str) -> None:
        typer.echo(message, err=True)

    chosen = repository_of(repository, say)
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


@app.command(epilog="Example: staindiffuser bench plausibility slide-stained --slide slide.svs")
def plausibility(
    results: Annotated[list[Path], typer.Argument(help="Folders that `stain` wrote.")],
    slides: Annotated[
        list[Path] | None,
        typer.Option(
            "--slide",
            help="H&E slide of a result, or a folder of them; repeat it. Not needed after `--keep-names`.",
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", callback=check_file, help="Write the numbers here as JSON.")
    ] = None,
) -> None:
    """Clean glass and kept nuclei: what can be said of a virtual stain on a real slide without its IHC."""
    import dataclasses

    from staindiffuser.benchmarks.plausibility import judge
    from staindiffuser.files import write_json

    rows = {str(result): judge(result, slides or ()) for result in results}
    for result, judged in rows.items():
        for row in judged:
            typer.echo(
                f"{result} {row.stain}: DAB optical density on glass {row.glass_dab:.4f}, "
                f"nuclei Dice {row.nuclei_dice:.3f}"
            )
    if json_file is not None:
        write_json(json_file, {name: [dataclasses.asdict(row) for row in judged] for name, judged in rows.items()})


@app.command(epilog="Example: staindiffuser bench registration --pairs anhir-pairs --json registration.json")
def registration(
    pairs: Annotated[
        Path,
        typer.Option(
            help="Folder of pairs in ANHIR's layout: NAME_HE.jpg and its IHC, landmarks beside each as .csv.",
            show_default=False,
        ),
    ],
    angles: Annotated[int, typer.Option(min=1, help="Rotations to try with a third of the IHC erased.")] = 8,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", callback=check_file, help="Write the report here as JSON; - for the screen."),
    ] = None,
) -> None:
    """Register real sections: as scanned, rotated with a third erased, and wrong pairs, which must be refused."""
    import dataclasses
    import json

    from staindiffuser.benchmarks.registration import bench_registration
    from staindiffuser.files import write_json

    report = bench_registration(pairs, angles=angles, progress=lambda line: typer.echo(line, err=True))
    if json_file is not None and str(json_file) == "-":
        typer.echo(json.dumps(dataclasses.asdict(report), indent=1))
        return
    if json_file is not None:
        write_json(json_file, dataclasses.asdict(report))
    for line in report.lines():
        typer.echo(line)


@app.command(epilog="Example: staindiffuser bench engines --rounds 5 --json engines.json")
def engines(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="Checkpoint folder; the shipped demonstration if absent.")
    ] = None,
    graphs: Annotated[
        Path | None, typer.Option(help="What `export graphs` wrote from it; the folder graphs/ inside it if absent.")
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes to compare at.")] = "1,8",
    rounds: Annotated[int, typer.Option(min=1, help="Counted rounds.")] = 5,
    threads: Annotated[int, typer.Option(min=0, help="Threads of either side; 0 for all cores.")] = 0,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", callback=check_file, help="Write the report here as JSON; - for the screen."),
    ] = None,
) -> None:
    """ONNX Runtime against torch eager and the machine's convolution peak, for the whole multiplex (needs torch)."""
    import dataclasses
    import json

    from staindiffuser.benchmarks.engines import bench_engines
    from staindiffuser.errors import UsageError
    from staindiffuser.files import write_json
    from staindiffuser.serving.demo import demo_graphs

    try:
        batches = tuple(int(part) for part in batch.split(","))
    except ValueError:
        raise UsageError(f"--batch {batch}: must be numbers with commas between them, such as 1,8") from None
    if min(batches) < 1:
        raise UsageError(f"--batch {batch}: must be at least 1")
    folder = checkpoint or demo_graphs().parent
    report = bench_engines(
        graphs or folder / "graphs",
        folder,
        batches=batches,
        rounds=rounds,
        threads=threads,
        progress=lambda message: typer.echo(message, err=True),
    )
    if json_file is not None and str(json_file) == "-":
        typer.echo(json.dumps(dataclasses.asdict(report), indent=1))
        return
    if json_file is not None:
        write_json(json_file, dataclasses.asdict(report))
    typer.echo(
        f"model {report.model_name} ({report.model_version[:12]}), {report.stains} stains, "
        f"sampler steps: {report.steps}, {report.tile} px, {report.precision}: {report.gflop_per_tile:.1f} GFLOP a "
        f"tile, {report.threads} threads"
    )
    typer.echo(f"convolution peak: {report.peak_gflops:.0f} GFLOP/s ({report.peak})")
    for result in report.batches:
        typer.echo(
            f"batch {result.batch}: ONNX Runtime {result.onnxruntime_ms_per_tile:.0f} ms a tile, torch eager "
            f"{result.eager_ms_per_tile:.0f} (x {result.speed_up:.2f}), folded in torch eager "
            f"{result.folded_ms_per_tile:.0f} (x {result.speed_up_over_folded:.2f}); {result.gflops:.0f} GFLOP/s, "
            f"{result.share_of_peak:.0%} of the peak"
        )
    for name, milliseconds in report.engine_ms.items():
        typer.echo(f"{name:>16} {milliseconds:8.1f} ms")
    typer.echo(
        f"four stains: {report.four_stains_ms:.0f} ms, encoder + 4 images + 4 cell maps alone "
        f"{report.four_stains_sum_ms:.0f} ms: x {report.four_stains_ratio:.3f}"
    )


app.command(epilog="Example: staindiffuser bench loader --data tiles --crop 256 --workers 2 --json loader.json")(loader)
app.command(epilog="Example: staindiffuser bench slide --rounds 3 --json slide.json")(slide)
app.command()(ablations)
