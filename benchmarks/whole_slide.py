"""A slide from opening to the last file: ours, and other programs with the same network on the same slide.

Each runs in turns as a command of its own, from a cold start of its process, with every core of the machine. Memory is
the largest sum over the processes of a command of what they do not share with others (PSS). The others run the network
in torch, float32, which is what they can run; ours runs what ``stain`` runs on this machine.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from staindiffuser.benchmarks.measuring import Machine
from staindiffuser.benchmarks.peers import PEERS
from staindiffuser.errors import UsageError
from staindiffuser.export.description import GraphSet

__all__ = ["WholeSlideReport", "WholeSlideRow", "bench_whole_slide", "run_measured"]

OURS = "StainDiffuser"


@dataclass(frozen=True, kw_only=True)
class WholeSlideRow:
    """One program on the slide."""

    name: str
    seconds: tuple[float, ...]
    """Wall time of the command, each run."""
    tiles: int
    """That went through the network."""
    peak_mib: float
    """Largest of the runs."""
    output_mib: float
    """Size of what it wrote."""
    image: bool
    """It writes an image of the slide."""
    leaves_out: str

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)


@dataclass(frozen=True, kw_only=True)
class WholeSlideReport:
    """What was measured."""

    machine: Machine
    slide: str
    model_name: str
    model_version: str
    tile: int
    stride: int
    rounds: int
    rows: tuple[WholeSlideRow, ...]
    absent: Mapping[str, str]
    """Programs that did not run here, and why."""

    def lines(self) -> list[str]:
        """The report for people."""
        lines = [f"{self.slide}: {self.model_name}, tiles of {self.tile} px every {self.stride} px, {self.rounds} runs"]
        ours = self.rows[0]
        for row in self.rows:
            ratio = (
                ""
                if row is ours
                else f"; {row.median / ours.median:.1f} x our time, {row.peak_mib / ours.peak_mib:.1f} x our memory"
            )
            what = f"; leaves out: {row.leaves_out}" if row.leaves_out else ""
            lines.append(
                f"{row.name}: {row.median:.1f} s ({min(row.seconds):.1f} to {max(row.seconds):.1f}), "
                f"{row.tiles} tiles, peak {row.peak_mib:.0f} MiB, {row.output_mib:.0f} MiB written{ratio}{what}"
            )
        return [*lines, *(f"{name}: not here: {why}" for name, why in self.absent.items())]


def bench_whole_slide(
    slide: Path,
    checkpoint: Path,
    peers: Mapping[str, Path],
    *,
    rounds: int = 3,
    batch: int = 4,
    options: Sequence[str] = (),
    progress: Callable[[str], None] = lambda message: None,
) -> WholeSlideReport:
    """Measure ``stain`` and every peer (needs torch).

    Args:
        slide: the H&E slide.
        checkpoint: of the model that ships and that ``stain`` serves, for the peers' network.
        peers: name of :data:`~staindiffuser.benchmarks.peers.PEERS` to the Python that has it.
        rounds: runs of each, in turns.
        batch: tiles at a time, of the peers.
        options: more options of ``stain``.
        progress: called with one line per run.

    Raises:
        UsageError: there is no such peer.
        CheckpointError, SlideError: see there.
    """
    from staindiffuser.imaging.slides import open_slide

    known = {peer.name: peer for peer in PEERS}
    for name in peers:
        if name not in known:
            raise UsageError(f"--peer {name}: there is {', '.join(known)}")
    graphs = GraphSet.load(checkpoint / "graphs")
    with open_slide(slide) as opened:
        mpp = opened.pixel_size(None)
    absent = {peer.name: "no Python named that has it" for peer in PEERS if peer.name not in peers}
    settings = {
        "tile": graphs.tile,
        "stride": graphs.tile - 2 * graphs.margin,
        "mpp": sum(mpp) / 2,  # resampling to the model's own would be a pixel in a hundred
        "batch": batch,
        "stains": [stain.name for stain in graphs.stains],
    }
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        network = folder / "network.pt"
        _write_network(checkpoint, graphs, network)
        scripts = Path(__file__).with_name("peers")
        commands: dict[str, Callable[[Path], list[str]]] = {
            OURS: lambda output: [
                sys.executable,
                "-c",
                "from staindiffuser.cli import main; main()",
                "stain",
                os.fspath(slide),
                "--output",
                os.fspath(output / "result"),
                *options,
            ]
        }
        for name, python in peers.items():
            commands[name] = lambda output, name=name, python=python: [  # type: ignore[misc]
                os.fspath(python),
                os.fspath(scripts / known[name].script),
                os.fspath(slide),
                os.fspath(network),
                os.fspath(output),
                json.dumps(settings),
            ]
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        found: dict[str, tuple[int, float, float]] = {}
        for number in range(rounds):
            for name in list(commands) if number % 2 == 0 else reversed(list(commands)):
                if name in absent:
                    continue
                output = folder / f"{number} {name}"
                output.mkdir()
                taken, peak, said, failed = run_measured(commands[name](output), folder)
                if failed:
                    absent[name] = failed
                    progress(f"{name}: {failed}")
                    continue
                seconds[name].append(taken)
                tiles = _tiles_of_ours(output) if name == OURS else int(json.loads(said)["tiles"])
                before = found.get(name, (0, 0.0, 0.0))
                found[name] = (tiles, max(peak, before[1]), _size(output))
                progress(f"{name}: {taken:.1f} s, {tiles} tiles, {peak:.0f} MiB")
    if OURS in absent:
        raise UsageError(f"stain did not work: {absent[OURS]}")
    return WholeSlideReport(
        machine=Machine.here(),
        slide=slide.name,
        model_name=graphs.name,
        model_version=graphs.model_version,
        tile=graphs.tile,
        stride=graphs.tile - 2 * graphs.margin,
        rounds=rounds,
        rows=tuple(
            WholeSlideRow(
                name=name,
                seconds=tuple(round(value, 2) for value in seconds[name]),
                tiles=tiles,
                peak_mib=round(peak),
                output_mib=round(size, 1),
                image=name == OURS or known[name].image,
                leaves_out="" if name == OURS else known[name].leaves_out,
            )
            for name, (tiles, peak, size) in found.items()
        ),
        absent=absent,
    )


def _write_network(checkpoint: Path, graphs: GraphSet, path: Path) -> None:
    """The model's images and cell maps as one TorchScript network, see :mod:`staindiffuser.benchmarks.peers`."""
    import torch

    from staindiffuser.export.modules import BranchEngine, EncoderEngine
    from staindiffuser.training.checkpoint import Checkpoint
    from staindiffuser.triton_models.noise.philox import tile_noise

    network = Checkpoint.load(checkpoint).network
    config = network.config
    side = graphs.tile
    image, cells = tile_noise(
        torch.zeros(1, 1, dtype=torch.int64).numpy(),
        torch.zeros(1, 2, dtype=torch.int64).numpy(),
        steps=graphs.steps,
        height=side,
        width=side,
    )

    class Whole(torch.nn.Module):
        """H&E in 0..1 → images and cell maps in 0..1."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder = EncoderEngine(network).eval()
            self.images = torch.nn.ModuleList(BranchEngine(network, "images", s, graphs.sigmas) for s in config.stains)
            self.maps = torch.nn.ModuleList(
                BranchEngine(network, "cells", s, [config.sigma_max]) for s in config.stains
            )
            self.noise = torch.nn.Buffer(torch.from_numpy(image))
            self.cell_noise = torch.nn.Buffer(torch.from_numpy(cells))

        def forward(self, he: torch.Tensor) -> torch.Tensor:
            count = he.shape[0]
            features = self.encoder((he * 255).round().to(torch.uint8).permute(0, 2, 3, 1))
            noise = self.noise.expand(count, *self.noise.shape[1:])
            cell_noise = self.cell_noise.expand(count, *self.cell_noise.shape[1:])
            planes = [branch(*features, noise) for branch in self.images]
            maps = [branch(*features, cell_noise) for branch in self.maps]
            maps = [*maps, *[maps[0]] * (3 - len(maps))]  # three planes, of which ours are the first
            return torch.cat([*planes, *maps[:3]], dim=3).permute(0, 3, 1, 2).float() / 255

    with torch.inference_mode():
        traced: Any = torch.jit.trace(  # type: ignore[no-untyped-call]
            Whole().eval(), torch.zeros(2, 3, side, side), check_trace=False
        )
        traced.save(os.fspath(path))


def run_measured(command: Sequence[str], folder: Path) -> tuple[float, float, str, str]:
    """Seconds, largest memory in MiB, the last line of output, and why it failed, if it did."""
    with (folder / "output.txt").open("w+", encoding="utf-8") as log:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        peak = [0.0]
        watcher = threading.Thread(target=_watch, args=(process, peak))
        watcher.start()
        code = process.wait()
        taken = time.perf_counter() - start
        watcher.join()
        log.seek(0)
        lines = log.read().strip().splitlines() or [""]
    return taken, peak[0], lines[-1], lines[-1][:300] or f"exit status {code}" if code else ""


def _watch(process: subprocess.Popen[bytes], peak: list[float]) -> None:
    """Note the largest memory of a process and its descendants, until it ends."""
    while process.poll() is None:
        total = 0
        try:
            top = psutil.Process(process.pid)
            for one in (top, *top.children(recursive=True)):
                try:
                    total += one.memory_full_info().pss
                except psutil.Error:
                    continue
        except psutil.Error:
            return
        peak[0] = max(peak[0], total / 2**20)
        time.sleep(0.1)


def _size(folder: Path) -> float:
    """Of the result's files, MiB; not of copies of the slide or the network."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".svs", ".pt")]
    return sum(path.stat().st_size for path in files) / 2**20


def _tiles_of_ours(output: Path) -> int:
    (record,) = output.rglob("run.json")
    return int(json.loads(record.read_text(encoding="utf-8"))["tiles"]["stained"])
