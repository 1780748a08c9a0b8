"""``staindiffuser bench engines``: its options and its table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from staindiffuser.benchmarks.engine_rows import TURN
from staindiffuser.benchmarks.reporting import JsonFile, hand_over

if TYPE_CHECKING:
    from collections.abc import Iterator

    from staindiffuser.benchmarks.engine_rows import EnginesReport, Row

__all__ = ["engines", "table"]


def engines(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="Checkpoint folder; the shipped demonstration if absent.")
    ] = None,
    graphs: Annotated[
        Path | None, typer.Option(help="What `export graphs` wrote from it; the folder graphs/ inside it if absent.")
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes, such as 1,2,4,8,16,32.")] = "1,8",
    rounds: Annotated[int, typer.Option(min=1, help="Counted rounds.")] = 5,
    turn: Annotated[float, typer.Option(min=0, help="Seconds that an engine runs at least in each round.")] = TURN,
    threads: Annotated[int, typer.Option(min=0, help="Threads of every engine; 0 for all cores.")] = 0,
    engine: Annotated[
        list[str] | None, typer.Option(help="Only this one, such as 'openvino bf16'. Repeatable. (default: all)")
    ] = None,
    parts: Annotated[
        bool,
        typer.Option(
            "--parts/--no-parts",
            help="At the first batch size, also encoder, image of 1, 2, 4 steps, cell map, 1 and 4 stains.",
        ),
    ] = True,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Also torch.compile, which takes minutes before it runs.")
    ] = False,
    tiles: Annotated[
        Path | None, typer.Option(help="Paired tiles of the model's size, on whose test split DAB-Dice is scored.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Every engine that this machine can run, in turns, against the machine's convolution peak (needs torch).

    Wall time counts the machine's other work too; CPU time, of all threads together, hardly does. `?` marks a wall time
    whose quartiles are more than 15 % apart, and a ratio whose 90 % interval is wider than 10 %.
    """

    from staindiffuser.benchmarks.engines import bench_engines
    from staindiffuser.errors import UsageError
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
        turn=turn,
        threads=threads,
        only=engine or (),
        parts=parts,
        compiled=compiled,
        tiles=tiles,
        progress=lambda message: typer.echo(message, err=True),
    )
    if hand_over(report, json_file):
        return
    for line in table(report):
        typer.echo(line)


def table(report: EnginesReport) -> Iterator[str]:
    """The report as lines of text."""
    machine = report.machine
    yield (
        f"model {report.model_name} ({report.model_version[:12]}), sampler steps: {report.steps}, {report.tile} px, "
        f"{report.threads} threads on {machine.processor}, load {machine.load} on {machine.cores} cores"
    )
    for name, gflops in report.peaks.items():
        yield f"{name} peak: {gflops:.0f} GFLOP/s"
    yield f"{'':16} {'batch':>5} {'engine':22} {'p50':>8} {'p95':>7} {'p99':>7} {'CPU':>7}  ms a tile; relative; peak"
    for row in sorted(report.rows, key=lambda row: (row.what, row.batch)):
        yield _line(row)
    for name, mebibytes in report.memory_mib.items():
        yield f"memory of {name}: {mebibytes:.0f} MiB"
    for name, scores in report.dab_dice.items():
        told = ", ".join(f"{stain} {value:.4f}" for stain, value in scores.items())
        yield f"DAB-Dice of {name} on {report.dice_tiles} tiles: {told}"
    for name, why in report.absent.items():
        yield f"{name}: not here: {why}"


def _line(row: Row) -> str:
    doubt = " " if row.ms.trusted else "?"
    relative = ""
    if row.relative is not None and row.relative_cpu is not None:
        uncertain = "" if row.relative_cpu.certain else "?"
        relative = f" x {row.relative.median:.2f} (CPU {row.relative_cpu.median:.2f}{uncertain})"
    share = (
        ""
        if row.share_of_peak is None or row.share_of_peak_cpu is None
        else (f" {row.share_of_peak:.0%} (CPU {row.share_of_peak_cpu:.0%})")
    )
    return (
        f"{row.what:16} {row.batch:5} {row.engine:22} {row.ms.p50:7.1f}{doubt} {row.ms.p95:7.1f} {row.ms.p99:7.1f} "
        f"{row.ms.cpu:7.1f} {row.tiles_per_second:6.2f} tiles/s {row.mm2_per_second:.3f} mm2/s{relative}{share}"
    )
