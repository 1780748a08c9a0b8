"""The page and the charts of what ``bench engines``, ``frontier``, ``load`` and ``slide`` measured, from their files.

One file of each a machine, in ``benchmarks/results``. Where a machine was not idle, the page quotes CPU time, and says
so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from staindiffuser.benchmarks.engine_rows import REFERENCE, EnginesReport, Row
from staindiffuser.benchmarks.frontier import FrontierReport, Point, mean
from staindiffuser.benchmarks.load import LoadReport
from staindiffuser.benchmarks.measuring import Machine
from staindiffuser.benchmarks.report_servers import chart_load, chart_slide, load_section, slide_section
from staindiffuser.benchmarks.whole_slide import WholeSlideReport
from staindiffuser.errors import InputError, UsageError

__all__ = ["PATTERN", "headline", "read_frontiers", "read_results", "write_report"]

PATTERN = "engines-*.json"
FRONTIERS = "frontier-*.json"
_Report = TypeVar("_Report")
_PARTS = ("encoder", "image, 1 step", "image, 2 steps", "image, 4 steps", "cell map")
_COLOURS = {"fp32": "#4a6fa5", "bf16": "#c8553d", "int8": "#e0a030", "trained": "#8a8a8a"}


def read_results(folder: Path) -> dict[str, EnginesReport]:
    """Every machine's report, by file name.

    Raises:
        UsageError: there is none.
        InputError: a file is not one.
    """
    files = sorted(folder.glob(PATTERN))
    if not files:
        raise UsageError(f"{folder} holds no {PATTERN}: write one with `staindiffuser bench engines --json`")
    return {file.name: _read(file, TypeAdapter(EnginesReport), "engines") for file in files}


def read_frontiers(folder: Path) -> dict[str, FrontierReport]:
    """The reports of ``bench frontier``, by file name; there may be none.

    Raises:
        InputError: a file is not one.
    """
    return _read_all(folder, FRONTIERS, TypeAdapter(FrontierReport), "frontier")


def _read_all(folder: Path, pattern: str, adapter: TypeAdapter[_Report], command: str) -> dict[str, _Report]:
    return {file.name: _read(file, adapter, command) for file in sorted(folder.glob(pattern))}


def _read(file: Path, adapter: TypeAdapter[_Report], command: str) -> _Report:
    try:
        return adapter.validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{file} is no report of `bench {command}`: {where}: {first['msg']}") from error


def headline(report: EnginesReport) -> tuple[str, float]:
    """What takes least time for the whole work of a tile, and its share of ONNX Runtime's in float32."""
    ways = report.whole_work(report.rows[0].batch)
    best = list(ways)[-1]
    return best, report.cost(ways[best]) / report.cost(ways[REFERENCE])


def write_report(results: Path, output: Path) -> Path:
    """Write ``benchmarks.md`` and its charts into a folder; returns the page.

    Raises:
        UsageError, InputError: see :func:`read_results`.
    """
    reports = read_results(results)
    output.mkdir(parents=True, exist_ok=True)
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench` from `benchmarks/results`: change nothing here by hand. Every engine that the machine",
        "can run, in turns in one process, on the same weights and noise. A *share of the peak* is that of the",
        "machine's fastest library on one large convolution of the same precision.",
        "",
    ]
    for name, report in reports.items():
        stem = Path(name).stem
        lines += _section(name, report)
        _chart_engines(report, output / f"{stem}.png")
        lines += ["", f"![Time of the whole work by engine]({stem}.png)"]
        if any(row.what == "encoder" for row in report.rows):
            _chart_parts(report, output / f"{stem}-parts.png")
            lines += ["", f"![Where the time goes, by engine]({stem}-parts.png)"]
        if len({row.batch for row in report.rows}) > 1:
            _chart_batches(report, output / f"{stem}-batches.png")
            lines += ["", f"![Throughput against batch size]({stem}-batches.png)"]
        lines += [""]
    for name, frontier in read_frontiers(results).items():
        stem = Path(name).stem
        lines += [*_frontier_section(name, frontier), "", f"![Quality against time]({stem}.png)", ""]
        _chart_frontier(frontier, output / f"{stem}.png")
    for name, load in _read_all(results, "load-*.json", TypeAdapter(LoadReport), "load").items():
        stem = Path(name).stem
        lines += [*load_section(name, load), "", f"![Servers side by side]({stem}.png)", ""]
        chart_load(_pyplot(), load, output / f"{stem}.png")
    for name, slide in _read_all(results, "slide-*.json", TypeAdapter(WholeSlideReport), "slide").items():
        stem = Path(name).stem
        lines += [*slide_section(name, slide), "", f"![A whole slide]({stem}.png)", ""]
        chart_slide(_pyplot(), slide, output / f"{stem}.png")
    page = output / "benchmarks.md"
    page.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return page


def _section(name: str, report: EnginesReport) -> list[str]:
    machine = report.machine
    packages = ", ".join(f"{package} {version}" for package, version in machine.packages.items())
    lines = [
        f"## {_title(machine)}",
        "",
        f"{machine.cores} cores ({', '.join(machine.instructions)}), {machine.memory_gib:g} GiB, Python "
        f"{machine.python}, {packages}; {machine.date}, commit `{machine.commit}`, `{name}`. Model {report.model_name} "
        f"`{report.model_version[:12]}`, tiles of {report.tile} px at {report.mpp:g} µm, {report.steps} sampler "
        f"step(s); {report.threads} thread(s) an engine, {report.rounds} rounds.",
        "",
    ]
    if report.others is None:
        lines += _busy(machine)
    else:
        lines += [f"Other programs took {report.others:.0%} of the processors meanwhile.", ""]
    peaks = ", ".join(f"{precision} {gflops:.0f}" for precision, gflops in _peaks(report).items())
    unit = "of all threads together" if report.timed == "time" else "for each second of CPU time"
    lines += [f"Peak of a convolution, GFLOP/s {unit}: {peaks}.", ""]
    lines += [
        "| work | batch | engine | fastest run, ms a tile | p50 / p95 / p99 | tiles/s | mm²/s | CPU, ms a tile | × of "
        "ONNX Runtime's CPU time in float32 (90 %) | share of peak |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|--:|",
        *(_line(row, report) for row in _sorted(report)),
        "",
        "A `?` marks a wall time whose quartiles are more than 15 % apart, and a ratio whose interval is wider than "
        "10 %: do not quote it.",
        "",
        "Memory while loaded: " + ", ".join(f"{n} {v:.0f} MiB" for n, v in report.memory_mib.items()) + ".",
    ]
    if report.absent:
        reasons = {name.split()[0]: why.partition(":")[0].partition(" (")[0] for name, why in report.absent.items()}
        lines += ["", "Not here: " + "; ".join(f"{target}: {why}" for target, why in reasons.items()) + "."]
    return lines


def _title(machine: Machine) -> str:
    return machine.gpu or ", ".join([machine.processor, *machine.instructions[-1:]])


def _busy(machine: Machine) -> list[str]:
    """A warning where others used the machine."""
    if machine.load <= machine.cores * 0.75:
        return []
    return [
        f"**The machine was not idle**: {machine.load:g} runnable processes on {machine.cores} cores. Wall times "
        "are what its other users left over; only CPU times and their ratios mean something.",
        "",
    ]


def _frontier_section(name: str, report: FrontierReport) -> list[str]:
    served = report.points[report.gated]
    return [
        f"## Quality against time: {_title(report.machine)}",
        "",
        f"Every sampler in torch, in turns, on the same {report.tiles} simulated tiles of {report.tile} px from the "
        f"same noise; encoder and images of all stains. {report.threads} thread(s), {report.machine.date}, commit "
        f"`{report.machine.commit}`, `{name}`. Cell AUROC: how well the image's brown tells the positive cells.",
        "",
        *_busy(report.machine),
        "| model | sampler | evaluations | CPU, ms a tile | × of what is served | DAB-Dice | cell AUROC |",
        "|---|---|--:|--:|--:|---|---|",
        *(
            f"| {point.model} | {point.sampler} | {point.evaluations} | {point.cpu_ms:.0f} | "
            f"{point.cpu_ms / served.cpu_ms:.1f} | {_scores(point.dab_dice)} | "
            f"{_scores(point.cell_auroc) or point.scored} |"
            for point in report.points
        ),
        "",
        f"Served: {served.model}, {served.sampler}.",
    ]


def _scores(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{stain} {value:.3f}" for stain, value in scores.items())


def _peaks(report: EnginesReport) -> dict[str, float]:
    """GFLOP/s at the peak, or GFLOP for each second of CPU time, by precision."""
    return {
        row.engine.split()[-1]: report.gflop[row.what] * 1e3 / report.cost(row) / share
        for row in report.rows
        if (share := report.share(row))
        and row.engine.endswith(("fp32", "bf16", "int8"))
        and row.what == report.headline
    }


def _line(row: Row, report: EnginesReport) -> str:
    ratio = row.relative_cpu
    relative = "" if ratio is None else f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
    if ratio is not None and not ratio.certain:
        relative += " ?"
    peak = report.share(row)
    share = "" if peak is None else f"{peak:.0%}"
    best = "" if row.ms.best is None else f"{row.ms.best:.0f}"
    doubt = "" if row.ms.trusted else " ?"
    return (
        f"| {row.what} | {row.batch} | {row.engine} | {best} | "
        f"{row.ms.p50:.0f} / {row.ms.p95:.0f} / {row.ms.p99:.0f}{doubt} | {row.tiles_per_second:.2f} | "
        f"{row.mm2_per_second:.3f} | {row.ms.cpu:.0f} | {relative} | {share} |"
    )


def _sorted(report: EnginesReport) -> list[Row]:
    order = {what: index for index, what in enumerate(_PARTS)}
    return sorted(report.rows, key=lambda row: (order.get(row.what, -1), row.what, row.batch, report.cost(row)))


def _colour(engine: str) -> str:
    return _COLOURS.get(engine.partition(",")[0].split()[-1], "#6d9c6d")


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def _of(report: EnginesReport, what: str, batch: int) -> Mapping[str, Row]:
    rows = [row for row in report.rows if row.what == what and row.batch == batch]
    return {row.engine: row for row in sorted(rows, key=lambda row: -report.cost(row))}


def _chart_engines(report: EnginesReport, path: Path) -> None:
    """Bars of time, longest first, each with its ratio to ONNX Runtime in float32."""
    plt = _pyplot()
    batch = report.rows[0].batch
    rows = report.whole_work(batch)
    reference = report.cost(rows[REFERENCE])
    figure, axis = plt.subplots(figsize=(9, 0.7 + 0.5 * len(rows)), layout="constrained")
    bars = axis.barh(
        list(rows), [report.cost(row) for row in rows.values()], color=[_colour(engine) for engine in rows]
    )
    labels = []
    for engine, row in rows.items():
        cost = report.cost(row)
        ratio = "(× 1)" if engine == REFERENCE else f"× {cost / reference:.2f}"
        peak = report.share(row)
        share = "" if peak is None else f", {peak:.0%} of a convolution's peak"
        labels.append(f" {cost:.0f} ms  {ratio}{share}")
    axis.bar_label(bars, labels)
    axis.set_xlim(0, 2.0 * max(report.cost(row) for row in rows.values()))
    axis.set(
        xlabel=f"{report.timed} of a tile, ms (shorter is faster)",
        title=f"A tile of {report.tile} px with {report.headline} and their cells, batch {batch}",
    )
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


def _chart_parts(report: EnginesReport, path: Path) -> None:
    """Groups of bars: what each part of the work costs on each engine."""
    plt = _pyplot()
    batch = report.rows[0].batch
    parts = [part for part in _PARTS if _of(report, part, batch)]
    engines = [row.engine for row in _of(report, parts[0], batch).values()]
    figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
    hatches = ("", "//", "..", "xx", "--")
    for index, engine in enumerate(engines):
        heights = [
            report.cost(rows[engine]) if (rows := _of(report, part, batch)).get(engine) else 0.0 for part in parts
        ]
        positions = [i + 0.8 * (index - (len(engines) - 1) / 2) / len(engines) for i in range(len(parts))]
        bars = axis.bar(
            positions,
            heights,
            0.75 / len(engines),
            label=engine,
            color=_colour(engine),
            hatch=hatches[index % 5],
            edgecolor="white",
        )
        axis.bar_label(bars, [f"{height:.0f}" if height else "" for height in heights], fontsize=8)
    axis.set_xticks(range(len(parts)), parts)
    axis.set(ylabel=f"{report.timed} of a tile, ms", title=f"Where the time goes: one part at a time, batch {batch}")
    axis.legend()
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


def _chart_batches(report: EnginesReport, path: Path) -> None:
    """Lines: throughput against batch size."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(10, 4), layout="constrained")
    markers = "osD^vP"
    batches = sorted({row.batch for row in report.rows})
    ways = {batch: report.whole_work(batch) for batch in batches}
    for index, engine in enumerate(reversed(ways[batches[0]])):
        rows = [ways[batch][engine] for batch in batches if engine in ways[batch]]
        axis.plot(
            [row.batch for row in rows],
            [1e3 / report.cost(row) for row in rows],
            marker=markers[index % 6],
            color=_colour(engine),
            linestyle="-" if engine.endswith("one graph") else "--",
            label=engine,
        )
    axis.set_xticks(batches)
    axis.set_ylim(0)
    axis.set(
        xlabel="batch size",
        ylabel="tiles a second" if report.timed == "time" else "tiles a second of CPU time",
        title="Throughput against batch size",
    )
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


def _chart_frontier(report: FrontierReport, path: Path) -> None:
    """Points: DAB-Dice and cell AUROC against CPU time, each named."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    models = list(dict.fromkeys(point.model for point in report.points))
    scores: dict[str, Callable[[Point], float]] = {
        "DAB-Dice, mean of the stains": lambda point: mean(point.dab_dice),
        "AUROC of the cells, mean of the stains": lambda point: mean(point.cell_auroc),
    }
    for axis, (title, score) in zip(axes, scores.items(), strict=True):
        shown = [point for point in report.points if point.cell_auroc or not title.startswith("AUROC")]
        span = max(map(score, shown)) - min(map(score, shown))
        for index, point in enumerate(report.points):
            if point not in shown:
                continue
            # Of points that lie on one another, the first says what all of them are, if they are the same.
            named = any(
                other.sampler == point.sampler
                and abs(other.cpu_ms / point.cpu_ms - 1) < 0.05
                and abs(score(other) - score(point)) < 0.01 * span
                for other in shown[: shown.index(point)]
            )
            # Of neighbours, the higher one has its name above.
            below = any(0.5 < other.cpu_ms / point.cpu_ms < 2 and score(other) > score(point) for other in shown)
            served = index == report.gated
            which = models.index(point.model)
            axis.plot(
                point.cpu_ms,
                score(point),
                marker="*" if served else "osD^v"[which % 5],
                markersize=16 if served else 8,
                color=("#c8553d", "#4a6fa5", "#6d9c6d", "#8a8a8a", "#e0a030")[which % 5],
                linestyle="none",
                label=f"{point.model}, served" if served else point.model,
            )
            axis.annotate(
                "" if named else point.sampler,
                (point.cpu_ms, score(point)),
                xytext=(0, -20 if below else 11),
                textcoords="offset points",
                ha="center",
            )
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.margins(0.15, 0.25)
        handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))  # one a label
        axis.legend(handles.values(), handles.keys())
        axis.set(xlabel="CPU time of a tile, ms (further left is faster)", title=title)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)
