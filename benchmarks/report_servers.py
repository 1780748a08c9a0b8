"""Sections and charts of what ``bench load`` and ``bench slide SLIDE`` measured, for :mod:`.report`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from staindiffuser.benchmarks.load import LoadReport, OpenLoop
from staindiffuser.benchmarks.measuring import Machine
from staindiffuser.benchmarks.whole_slide import WholeSlideReport

__all__ = ["chart_load", "chart_slide", "load_section", "slide_section"]

OURS, OTHERS = "#c8553d", "#4a6fa5"


def load_section(name: str, report: LoadReport) -> list[str]:
    """Lines of Markdown."""
    clients = report.clients[-1]
    how = f"{clients} clients that wait for one another, {report.seconds:g} s"
    if report.turns:
        count = len(next(iter(report.turns.values())))
        how += (
            f" a turn, {count} rounds, with all servers up at once: median rates, and the median of the rounds' ratios "
            "(smallest to largest)"
        )
    lines = [
        f"## Serving: {report.model_name}, {_title(report.machine)}",
        "",
        f"The same engines ({report.target}, {report.tile} px, batch {report.batch}) behind Triton and behind what a "
        f"user would write. Saturated: {how}. Then "
        "requests at random moments (Poisson) at a share of what that server took; latency counts from when a request "
        f"was due. {_runnable(report.machine)} {report.machine.date}, commit `{report.machine.commit}`, `{name}`.",
        "",
        f"| server | requests/s, {clients} clients | Triton's × | load | p50 / p95 / p99, ms | p99 / p50 | refused |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for server, rates in report.closed.items():
        ratio = report.ratio(server)
        told = f"{ratio.median:.2f}"
        if report.turns and server != next(iter(report.closed)):
            told += f" ({ratio.smallest:.2f} to {ratio.largest:.2f})" + ("" if ratio.certain else " ?")
        for number, loop in enumerate(report.open[server]):
            rate = f"{rates[-1]:.2f} | {told}" if number == 0 else " |"
            lines.append(
                f"| {server if number == 0 else ''} | {rate} | {loop.share:.0%} | {_latencies(loop)} | {loop.failed} |"
            )
    if report.turns:
        lines += ["", "A `?` marks a ratio whose 90 % interval is wider than 10 %: do not quote it."]
    else:
        lines += [
            "",
            "Each server was measured once, alone, one after another: a slow moment of the machine met one of them and "
            "not the others. Only `bench load --rounds` measures them in turns.",
        ]
    if report.triton_ms:
        told = ", ".join(f"{part} {value:.1f}" for part, value in next(iter(report.triton_ms.values())).items())
        lines += ["", f"The server's own account of a request, in the mean over all of these loads, ms: {told}."]
    if report.absent:
        lines += ["", "Not here: " + "; ".join(f"{server}: {why}" for server, why in report.absent.items()) + "."]
    lines += ["", f"All servers gave the same bytes: {'yes' if report.same_bytes else 'no'}."]
    return lines


def _title(machine: Machine) -> str:
    return ", ".join([machine.processor, *machine.instructions[-1:]])


def _runnable(machine: Machine) -> str:
    return (
        f"In the minute before it ended {machine.load:g} processes were runnable on {machine.cores} cores, the "
        "measured ones among them."
    )


def _latencies(loop: OpenLoop) -> str:
    if loop.p50 is None or loop.p95 is None or loop.p99 is None:
        return "none answered | "
    return f"{loop.p50:.0f} / {loop.p95:.0f} / {loop.p99:.0f} | {loop.p99 / loop.p50:.1f}"


def slide_section(name: str, report: WholeSlideReport) -> list[str]:
    """Lines of Markdown."""
    ours = report.rows[0]
    lines = [
        f"## A whole slide: {report.slide}, {_title(report.machine)}",
        "",
        f"From the start of the command to the last file, median of {report.rounds} run(s) in turns; every program "
        f"starts cold, ours with its server. The same network, tiles of {report.tile} px every {report.stride} px; the "
        "others run it in torch (float32), ours on the engines that `stain` chooses here. Memory is the largest sum "
        f"over all processes (PSS). {_runnable(report.machine)} {report.machine.date}, commit "
        f"`{report.machine.commit}`, `{name}`.",
        "",
        "| program | s | × ours | tiles | s a tile | × ours | peak memory, MiB | written, MiB | leaves out |",
        "|---|--:|--:|--:|--:|--:|--:|--:|---|",
        *(
            f"| {row.name} | {row.median:.1f} ({min(row.seconds):.1f} to {max(row.seconds):.1f}) | "
            f"{row.median / ours.median:.2f} | {row.tiles} | {row.median / row.tiles:.2f} | "
            f"{row.median / row.tiles * ours.tiles / ours.median:.2f} | {row.peak_mib:.0f} | {row.output_mib:.0f} | "
            f"{row.leaves_out or '–'} |"
            for row in report.rows
        ),
    ]
    if report.absent:
        lines += ["", "Not here: " + "; ".join(f"{program}: {why}" for program, why in report.absent.items()) + "."]
    return lines


def chart_load(plt: Any, report: LoadReport, path: Path) -> None:
    """Bars: requests a second of each server; beside them the latencies at half load."""
    figure, (rates, waits) = plt.subplots(1, 2, figsize=(11, 0.9 + 0.5 * len(report.closed)), layout="constrained")
    names = list(report.closed)[::-1]
    colours = [OURS if name == next(iter(report.closed)) else OTHERS for name in names]
    bars = rates.barh(names, [report.closed[name][-1] for name in names], color=colours)
    rates.bar_label(bars, [f" {report.closed[name][-1]:.1f}" for name in names])
    rates.set_title(f"Requests a second, {report.clients[-1]} clients (longer is better)")
    rates.set_xlim(0, 1.2 * max(values[-1] for values in report.closed.values()))
    half = {name: min(report.open[name], key=lambda loop: abs(loop.share - 0.5)) for name in names}
    for name, colour in zip(names, colours, strict=True):
        loop = half[name]
        if loop.p50 is not None and loop.p99 is not None:
            waits.plot([loop.p50, loop.p99], [name, name], color=colour, linewidth=3)
            waits.plot(loop.p50, name, "o", color=colour)
            waits.plot(loop.p99, name, "|", color=colour, markersize=14)
            waits.annotate(f" {loop.p50:.0f} to {loop.p99:.0f}", (loop.p99, name), va="center")
    waits.set_xlim(0, 1.25 * max(loop.p99 or 0 for loop in half.values()))
    waits.set_title("Half of it, at random: median to p99, ms")
    waits.tick_params(labelleft=False)
    for axis in (rates, waits):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


def chart_slide(plt: Any, report: WholeSlideReport, path: Path) -> None:
    """Bars: seconds and memory of each program."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.9 + 0.5 * len(report.rows)), layout="constrained")
    rows = list(reversed(report.rows))
    names = [row.name if row.image else f"{row.name} (no image)" for row in rows]
    colours = [OURS if row is report.rows[0] else OTHERS for row in rows]
    for axis, values, title in (
        (axes[0], [row.median for row in rows], f"{report.slide}, whole: seconds (shorter is better)"),
        (axes[1], [row.peak_mib for row in rows], "peak memory, MiB"),
    ):
        axis.bar_label(axis.barh(names, values, color=colours), [f" {value:.0f}" for value in values])
        axis.set_xlim(0, 1.2 * max(values))
        axis.set_title(title)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].tick_params(labelleft=False)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)
