"""``staindiffuser bench``: what things cost on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from staindiffuser.benchmarks.ablations_cli import ablations
from staindiffuser.benchmarks.engines_cli import engines
from staindiffuser.benchmarks.frontier import frontier
from staindiffuser.benchmarks.load_cli import load
from staindiffuser.benchmarks.loader import loader
from staindiffuser.benchmarks.reporting import JsonFile, hand_over
from staindiffuser.benchmarks.scaling_cli import scaling
from staindiffuser.benchmarks.seams_cli import seams
from staindiffuser.benchmarks.serving_cli import serving
from staindiffuser.benchmarks.slide import slide
from staindiffuser.benchmarks.viewer import view
from staindiffuser.interruption import sigterm_like_ctrl_c

app = typer.Typer(no_args_is_help=True, help="Measure this machine: latency, throughput, quality.")


@app.callback()
def _group(context: typer.Context) -> None:
    """Measure this machine: latency, throughput, quality."""
    context.with_resource(sigterm_like_ctrl_c())  # no server that is measured outlives the command


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
    json_file: JsonFile = None,
) -> None:
    """Clean glass and kept nuclei: what can be said of a virtual stain on a real slide without its IHC."""
    import dataclasses

    from staindiffuser.benchmarks.plausibility import judge

    rows = {str(result): judge(result, slides or ()) for result in results}
    if hand_over({name: [dataclasses.asdict(row) for row in judged] for name, judged in rows.items()}, json_file):
        return
    for result, judged in rows.items():
        for row in judged:
            typer.echo(
                f"{result} {row.stain}: DAB optical density on glass {row.glass_dab:.4f}, "
                f"nuclei Dice {row.nuclei_dice:.3f}"
            )


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
    json_file: JsonFile = None,
) -> None:
    """Register real sections: as scanned, rotated with a third erased, and wrong pairs, which must be refused."""

    from staindiffuser.benchmarks.registration import bench_registration

    report = bench_registration(pairs, angles=angles, progress=lambda line: typer.echo(line, err=True))
    if hand_over(report, json_file):
        return
    for line in report.lines():
        typer.echo(line)


@app.command(epilog="Example: staindiffuser bench report --output docs/explanation/benchmarks")
def report(
    results: Annotated[Path, typer.Option(help="Folder of engines-*.json, one a machine.")] = Path(
        "benchmarks/results"
    ),
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for benchmarks.md and its charts.")] = Path(
        "docs/explanation/benchmarks"
    ),
) -> None:
    """Write the page and the charts of what `bench engines --json` measured (needs matplotlib)."""
    from staindiffuser.benchmarks.report import write_report

    typer.echo(write_report(results, output))


@app.command(epilog="Example: staindiffuser bench compare HEAD~1 --rounds 11 --threads 1")
def compare(
    base: Annotated[str, typer.Argument(help="Commit, branch or tag to compare this checkout with.")],
    graphs: Annotated[
        Path | None, typer.Option(help="Graphs that both run; by default each those of its own commit.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Tiles at a time.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Counted turns of either side.")] = 11,
    threads: Annotated[int, typer.Option(min=0, help="Threads of each engine; 0 for all cores.")] = 0,
    json_file: JsonFile = None,
) -> None:
    """This checkout against a commit of it, tile by tile in turns: ratios of time, with 90 % intervals."""

    from staindiffuser.benchmarks.compare import compare as measure

    result = measure(
        base,
        graphs=graphs,
        batch=batch,
        rounds=rounds,
        threads=threads,
        progress=lambda message: typer.echo(message, err=True),
    )
    if hand_over(result, json_file):
        return
    typer.echo(f"{result.base}: {result.base_ms.p50:.0f} ms a tile (CPU {result.base_ms.cpu:.0f})")
    typer.echo(f"here: {result.ms.p50:.0f} ms a tile (CPU {result.ms.cpu:.0f})")
    for what, ratio in (("wall", result.wall_ratio), ("CPU", result.cpu_ratio)):
        typer.echo(f"{what} time, here / {result.base}: {ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})")


@app.command(
    epilog="Example: staindiffuser bench quality graphs --tiles tiles --other skin=CMU-1.svs --json quality.json"
)
def quality(
    graphs: Annotated[Path, typer.Argument(help="Graphs with the engines that `export quality` adds.")],
    tiles: Annotated[
        list[Path], typer.Option(help="Folder of paired tiles whose test split the model has not seen. Repeatable.")
    ],
    other: Annotated[
        list[str] | None,
        typer.Option(help="NAME=SLIDE or NAME=SLIDE@MPP: other tissue, to be told from that. Repeatable."),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(help="Engines that score them: 'onnxruntime fp32', 'openvino int8', … as `serve` chooses from."),
    ] = "onnxruntime fp32",
    most: Annotated[int, typer.Option(min=2, help="Fields at most from each folder and slide.")] = 60,
    json_file: JsonFile = None,
) -> None:
    """Whether tiles that a model should not judge are told apart: pen, blur, IHC, broken colours; and abstention."""

    from staindiffuser.benchmarks.quality import bench_quality

    report = bench_quality(
        graphs,
        tiles,
        other or (),
        engine=engine,
        most=most,
        progress=lambda line: typer.echo(line, err=True),
    )
    if hand_over(report, json_file):
        return
    for line in report.lines():
        typer.echo(line)


app.command(epilog="Example: staindiffuser bench loader --data tiles --crop 256 --workers 2 --json loader.json")(loader)
app.command(epilog="Example: staindiffuser bench slide --rounds 3 --json slide.json")(slide)
app.command(epilog="Example: staindiffuser bench seams checkpoints/demo slide.svs --margin 0 --margin 64 --x 640")(
    seams
)
app.command()(view)
app.command(epilog="Example: staindiffuser bench frontier --tiles unseen --json frontier.json")(frontier)
app.command()(ablations)
app.command(
    epilog="Examples: staindiffuser bench engines --rounds 5 --json engines.json\n\n"
    "staindiffuser bench engines --batch 1,2,4,8 --no-parts --engine 'onnxruntime fp32' --engine 'openvino bf16'",
)(engines)
app.command(epilog="Example: staindiffuser bench load models --clients 1,16 --shares 0.25,0.5 --json load.json")(load)
app.command(
    epilog="Example: staindiffuser bench serving models --proxy --two-clients --overhead 200 --json serving.json"
)(serving)
app.command(epilog="Example: staindiffuser bench scaling --server-rate 1.9 --client-ms 21 --chart scaling.png")(scaling)
