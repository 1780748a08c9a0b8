"""``staindiffuser bench view``: how long people wait for the viewer; the people are threads.

A person opens the slide, then moves: at each step all tiles that a window of 1280 × 800 pixels needs of the H&E and of
every stain are asked for, on one connection per panel, and then looked at for a while. Latencies are those of single
tiles, as the person's side sees them; both sides share this machine.
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import math
import random
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from staindiffuser.benchmarks.reporting import JsonFile, hand_over
from staindiffuser.benchmarks.viewer_frames import LayoutFrames, count_frames
from staindiffuser.errors import UsageError
from staindiffuser.viewer.cell_index import BLOCK

__all__ = ["ViewReport", "bench_view", "view"]

WINDOW = (1280, 800)
CONNECTIONS = 6
"""Of a browser to one server."""
LOOK = 0.5
"""Seconds that a person looks at a view."""


@dataclass(frozen=True, kw_only=True)
class ViewReport:
    """What was measured."""

    result: str
    size: tuple[int, int]
    people: int
    seconds: float
    first_view_ms: float
    """From the first request to the last tile of the whole slide."""
    tiles: int
    tile_p50_ms: float
    tile_p95_ms: float
    tile_p99_ms: float
    by_kind: dict[str, tuple[int, float]]
    """Per kind of tile: number, and p95 in ms."""
    cells_p95_ms: float | None
    """Of blocks of cells."""
    server_peak_mib: float | None
    """Largest resident memory of the server; None where the system does not say."""
    frames: tuple[LayoutFrames, ...] = ()
    """Of zooming in a browser, if they were counted."""

    def lines(self) -> list[str]:
        """The report for people."""
        kinds = ", ".join(f"{kind} {p95:.1f} ms ({count})" for kind, (count, p95) in self.by_kind.items())
        memory = "unknown" if self.server_peak_mib is None else f"{self.server_peak_mib:.0f} MiB"
        cells = "" if self.cells_p95_ms is None else f"; blocks of cells p95 {self.cells_p95_ms:.1f} ms"
        return [
            f"{self.result}: {self.size[0]} x {self.size[1]} px, {self.people} people for {self.seconds:g} s",
            f"first view {self.first_view_ms:.0f} ms",
            f"{self.tiles} tiles: p50 {self.tile_p50_ms:.1f} ms, p95 {self.tile_p95_ms:.1f} ms, "
            f"p99 {self.tile_p99_ms:.1f} ms{cells}",
            f"p95 by kind: {kinds}",
            f"server: peak {memory}",
            *(one.line() for one in self.frames),
        ]


class _Browser:
    """Requests on a few connections that stay open."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._local = threading.local()

    def get(self, path: str) -> tuple[bytes, float]:
        """The body, and the time that it took, ms."""
        connection = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        start = time.perf_counter()
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
        if answer.status != 200:
            raise UsageError(f"the viewer answers {path} with {answer.status}: {body[:200]!r}")
        return body, 1000 * (time.perf_counter() - start)


def bench_view(
    result: Path,
    *,
    slides: tuple[Path, ...] = (),
    people: int = 10,
    seconds: float = 10,
    wait: float = 3,
    frames: float = 0,
) -> ViewReport:
    """Serve a result and let people look at it.

    Args:
        result: a result folder.
        slides: where its H&E lies, if not beside it.
        people: at once.
        seconds: for how long.
        wait: seconds until the first of them comes: the server opens its first slide meanwhile.
        frames: seconds of zooming in a browser, per layout; 0 for none.

    Raises:
        UsageError: the viewer does not start, or does not answer.
        DependencyError: frames are to be counted, and there is no browser.
    """
    options = [word for path in slides for word in ("--slides", str(path))]
    program = "from staindiffuser.cli import main; main()"
    command = [sys.executable, "-c", program, "view", str(result), "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, encoding="utf-8") as server:
        try:
            port = _port_of(server)
            time.sleep(wait)
            report = _measure(result, port, server.pid, people, seconds)
            if frames:
                browser = _Browser(port)
                (line,) = json.loads(browser.get("/api/slides")[0])["slides"]
                about = json.loads(browser.get(f"/api/slides/{line['name']}")[0])
                counted = count_frames(f"http://127.0.0.1:{port}/", about, frames)
                report = dataclasses.replace(report, frames=tuple(counted))
            return report
        finally:
            server.terminate()


def _port_of(server: subprocess.Popen[str]) -> int:
    assert server.stderr is not None
    said = ""
    for line in server.stderr:
        said += line
        if found := re.search(r"http://127\.0\.0\.1:(\d+)/", line):
            return int(found[1])
    raise UsageError(f"the viewer does not start: {' '.join(said.split())}")


def _measure(result: Path, port: int, pid: int, people: int, seconds: float) -> ViewReport:
    browser = _Browser(port)
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        start = time.perf_counter()
        page, _ = browser.get("/")
        files = re.findall(r'(?:src|href)="(/static/[^"]+)"', page.decode("utf-8"))
        list(pool.map(browser.get, files))
        (line,) = json.loads(browser.get("/api/slides")[0])["slides"]
        about = json.loads(browser.get(f"/api/slides/{line['name']}")[0])
        panels = _panels(about)
        whole = [path for panel in panels for path in _view(panel, 0.5, 0.5, 0.0)]
        list(pool.map(browser.get, whole))
        first_view = 1000 * (time.perf_counter() - start)
    while json.loads(browser.get(f"/api/slides/{line['name']}/cells")[0])["state"] == "reading":
        time.sleep(0.2)
    tiles: list[tuple[str, float]] = []
    blocks: list[float] = []
    end = time.perf_counter() + seconds
    with ThreadPoolExecutor(people) as crowd:
        for walked in crowd.map(lambda number: _walk(port, about, panels, number, end), range(people)):
            tiles += walked[0]
            blocks += walked[1]
    times = np.array([taken for _, taken in tiles])
    kinds = sorted({kind for kind, _ in tiles})
    by_kind = {kind: np.array([taken for one, taken in tiles if one == kind]) for kind in kinds}
    return ViewReport(
        result=result.name,
        size=(about["size"][0], about["size"][1]),
        people=people,
        seconds=seconds,
        first_view_ms=round(first_view, 1),
        tiles=len(tiles),
        tile_p50_ms=round(float(np.percentile(times, 50)), 2),
        tile_p95_ms=round(float(np.percentile(times, 95)), 2),
        tile_p99_ms=round(float(np.percentile(times, 99)), 2),
        by_kind={kind: (len(taken), round(float(np.percentile(taken, 95)), 2)) for kind, taken in by_kind.items()},
        cells_p95_ms=round(float(np.percentile(blocks, 95)), 2) if blocks else None,
        server_peak_mib=_peak_mib(pid),
    )


def _panels(about: dict[str, Any]) -> list[dict[str, Any]]:
    base = f"/slides/{about['name']}"
    panels = [{"kind": "he", "base": f"{base}/he", **about["he"]}] if about["he"] else []
    stains = about["stains"]
    return panels + [
        {"kind": "stain", "base": f"{base}/stain/{one['name']}", "levels": one["levels"], "sides": one["sides"]}
        for one in stains
    ]


def _view(panel: dict[str, Any], x: float, y: float, depth: float) -> list[str]:
    """The tiles of a panel's window, centred at a place (0 … 1) and at a depth (0: the whole slide, 1: its pixels)."""
    levels = panel["levels"]
    width, height = WINDOW[0] / 3, WINDOW[1]
    fit = min(width / levels[0][0], height / levels[0][1])
    scale = fit ** (1 - depth)
    level = min(len(levels) - 1, max(0, math.floor(-math.log2(scale))))
    (across, down), side = levels[level], panel["sides"][level]
    half = (width / scale / 2 / 2**level, height / scale / 2 / 2**level)
    centre = (x * across, y * down)
    first = [max(0, int((middle - reach) // side)) for middle, reach in zip(centre, half, strict=True)]
    last = [
        min(-(-size // side) - 1, int((middle + reach) // side))
        for middle, reach, size in zip(centre, half, (across, down), strict=True)
    ]
    return [
        f"{panel['base']}/{level}/{column}_{row}.jpg"
        for row in range(first[1], last[1] + 1)
        for column in range(first[0], last[0] + 1)
    ]


def _walk(
    port: int, about: dict[str, Any], panels: list[dict[str, Any]], number: int, end: float
) -> tuple[list[tuple[str, float]], list[float]]:
    """One person: tiles with their kinds and times, and times of blocks of cells."""
    chance = random.Random(number)
    browser = _Browser(port)
    tiles: list[tuple[str, float]] = []
    blocks: list[float] = []
    time.sleep(chance.random() * LOOK)
    with ThreadPoolExecutor(len(panels)) as pool:
        while time.perf_counter() < end:
            x, y = chance.random(), chance.random()
            for depth in (0.3, 0.6, 0.85, 1.0):  # zooms in on a place
                wanted = [(panel["kind"], _view(panel, x, y, depth)) for panel in panels]

                def fetch(one: tuple[str, list[str]]) -> list[tuple[str, float]]:
                    return [(one[0], browser.get(path)[1]) for path in one[1]]

                for found in pool.map(fetch, wanted):
                    tiles += found
                time.sleep(LOOK)
            column, row = int(x * about["size"][0] // BLOCK), int(y * about["size"][1] // BLOCK)
            blocks.append(browser.get(f"/slides/{about['name']}/cells/outlines/{column}_{row}.json")[1])
            blocks.append(browser.get(f"/slides/{about['name']}/cells/3/0_0.json?threshold=0.5")[1])
    return tiles, blocks


def _peak_mib(pid: int) -> float | None:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return round(int(found[1]) / 1024, 1) if found else None


def view(
    result: Annotated[Path, typer.Argument(help="A result folder.")],
    slides: Annotated[list[Path] | None, typer.Option(metavar="PATH", help="Where its H&E lies.")] = None,
    people: Annotated[int, typer.Option(min=1, help="People at once.")] = 10,
    seconds: Annotated[float, typer.Option(min=1, help="For how long they look.")] = 10,
    wait: Annotated[float, typer.Option(min=0, help="Seconds after the start until the first of them comes.")] = 3,
    frames: Annotated[
        float,
        typer.Option(min=0, help="Seconds of zooming per layout in headless Chromium: frames and holes; 0: none."),
    ] = 0,
    json_file: JsonFile = None,
) -> None:
    """The viewer: time to the first view, time per tile with several people at once, memory of the server.

    Example: staindiffuser bench view slide-stained --people 10
    """

    report = bench_view(result, slides=tuple(slides or ()), people=people, seconds=seconds, wait=wait, frames=frames)
    if hand_over(report, json_file):
        return
    for line in report.lines():
        typer.echo(line)
