"""``staindiffuser bench frontier``: what quality costs, from one step of the shipped model to fifty of a DDIM.

Every way to make an image runs on the same tiles from the same noise, in turns, in torch and in one process. Timed are
the encoder and the images of all stains. Fifty steps of DDIM, from the teacher's weights, stand for conditional
diffusion as it is usually sampled (Palette, arXiv 2111.05826); 18 of Heun's (35 evaluations of the network) are what
the teacher itself is judged by. A U-Net that was trained as regression and as pix2pix is timed with random weights,
which take as long, and brings the scores that ``bench ablations`` recorded of it.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from staindiffuser.benchmarks.measuring import Machine
from staindiffuser.benchmarks.reporting import JsonFile, hand_over
from staindiffuser.errors import UsageError
from staindiffuser.imaging.arrays import UInt8Array

if TYPE_CHECKING:
    from torch import Tensor

    from staindiffuser.training.checkpoint import Checkpoint
    from staindiffuser.training.evaluation.cell_scores import CellScore

__all__ = ["FrontierReport", "Point", "bench_frontier", "ddim", "frontier"]

DDIM_STEPS = 50


@dataclass(frozen=True, kw_only=True)
class Point:
    """One way to make the images of a tile."""

    model: str
    sampler: str
    """``1 step``, ``18 steps, Heun``, ``50 steps, DDIM``."""
    evaluations: int
    """Of the network, for each stain."""
    cpu_ms: float
    """Median CPU time of a tile: encoder and images of all stains."""
    wall_ms: float
    dab_dice: Mapping[str, float]
    """By stain, as ``evaluate`` does."""
    cell_auroc: Mapping[str, float]
    """By stain: how well the image's brown tells the positive cells; empty if that was not recorded."""
    scored: str = ""
    """Where the scores come from, if not from these tiles."""


@dataclass(frozen=True, kw_only=True)
class FrontierReport:
    """What was measured."""

    machine: Machine
    tile: int
    tiles: int
    threads: int
    gated: int
    """Index of the point that is served."""
    points: tuple[Point, ...]

    def lines(self) -> list[str]:
        """The report for people."""
        lines = [f"{self.tiles} tiles of {self.tile} px, {self.threads} threads on {self.machine.processor}"]
        for point in self.points:
            scores = ", ".join(
                f"{stain} {dice:.3f}" + (f" / {point.cell_auroc[stain]:.3f}" if point.cell_auroc else "")
                for stain, dice in point.dab_dice.items()
            )
            scores += f" ({point.scored})" if point.scored else ""
            lines.append(
                f"{point.model}, {point.sampler}: {point.cpu_ms:.0f} ms of CPU a tile ({point.wall_ms:.0f} ms), "
                f"DAB-Dice / cell AUROC: {scores}"
            )
        gated = self.points[self.gated]
        for point in self.points:
            if point.sampler.endswith(("Heun", "DDIM")):
                ratio = point.cpu_ms / gated.cpu_ms
                lines.append(f"{point.model}, {point.sampler}: {ratio:.1f} x the CPU time of what is served")
        best = max(mean(point.dab_dice) for point in self.points)
        lines.append(f"DAB-Dice of the best sampler above the served one's: {best - mean(gated.dab_dice):.4f}")
        return lines


def mean(scores: Mapping[str, float]) -> float:
    """Over the stains."""
    return statistics.fmean(scores.values())


def bench_frontier(
    student: Path,
    teacher: Path,
    tiles: Path,
    *,
    most: int = 24,
    threads: int = 0,
    baselines: Path | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> FrontierReport:
    """Measure and score every sampler (needs torch).

    Args:
        student: the checkpoint that is served.
        teacher: the checkpoint that it was distilled from.
        tiles: paired tiles, whose test split is scored.
        most: tiles at most, evenly spread.
        threads: of torch; 0 for all that the process may use.
        baselines: what ``bench ablations`` recorded of networks of one evaluation.
        progress: called with one line per tile.

    Raises:
        CheckpointError, DataError: a checkpoint or a tile cannot be used.
        UsageError: the teacher lacks a stain of the student.
    """
    import torch

    from staindiffuser.training.checkpoint import Checkpoint
    from staindiffuser.training.errors import DataError
    from staindiffuser.training.evaluation.cell_scores import CellScore, measure_nuclei
    from staindiffuser.training.evaluation.evaluate import check_data
    from staindiffuser.training.evaluation.scoring import ScoredTile, score_tiles
    from staindiffuser.training.tiles.paired_tiles import PairedTiles, spread
    from staindiffuser.triton_models.shared.cpus import available_cpus

    threads = threads or available_cpus()
    torch.set_num_threads(threads)
    served, taught = Checkpoint.load(student), Checkpoint.load(teacher)
    stains = served.config.model.stain_names
    if missing := [stain for stain in stains if stain not in taught.config.model.stain_names]:
        raise UsageError(f"--teacher {teacher}: it lacks {', '.join(missing)} of {student}; name its own teacher")
    paired = PairedTiles.load(tiles, mpp=served.config.model.mpp)
    check_data(paired, served.config.model)
    rows = spread(paired.scored("test"), most)
    if not rows:
        raise DataError(f"{tiles / 'tiles.csv'}: no row of the test split has an image of every stain")
    ways: list[_Way | _Baseline] = [*_few_step_ways(served), *_few_step_ways(taught), *_long_ways(taught)]
    ways += _baselines(baselines, served) if baselines is not None else []
    gated = next(index for index, way in enumerate(ways) if way.steps == served.config.steps)
    seconds: list[list[tuple[float, float]]] = [[] for _ in ways]
    cells: list[dict[str, CellScore]] = [{stain: CellScore() for stain in stains} for _ in ways]

    def stain(he: UInt8Array, seeds: Any) -> list[Mapping[str, UInt8Array]]:
        results: list[Mapping[str, UInt8Array]] = [{} for _ in ways]
        order = range(len(ways)) if int(seeds[0, 0]) % 2 else reversed(range(len(ways)))
        for index in order:
            wall, cpu = time.perf_counter(), time.process_time()
            results[index] = ways[index].run(he, seeds)
            seconds[index].append((time.perf_counter() - wall, time.process_time() - cpu))
        return results

    def seen(tile: ScoredTile) -> None:
        nuclei = measure_nuclei(tile.data["he"], tile.row.mpp)
        for scores, result in zip(cells, tile.results, strict=True):
            for name, score in scores.items():
                mask = tile.data[f"{name}_mask"]
                score.add(
                    tile.row.slide,
                    nuclei,
                    real=tile.data[name],
                    mask=mask,
                    virtual=result[f"STAIN_{name.upper()}"],
                    cells=np.zeros_like(mask),  # the cell map is the same for all of them
                )
        progress(f"tile {tile.number + 1} of {len(rows)}")

    scores = score_tiles(stain, rows, stains=stains, samplers=len(ways), batch=1, seen=seen)
    points = []
    for way, times, dice, of_cells in zip(ways, seconds, scores, cells, strict=True):
        counted = times[1:] or times  # the first warms up
        points.append(
            Point(
                model=way.model,
                sampler=way.sampler,
                evaluations=way.evaluations,
                cpu_ms=statistics.median(cpu for _, cpu in counted) * 1e3,
                wall_ms=statistics.median(wall for wall, _ in counted) * 1e3,
                dab_dice=way.recorded or {name: float(score.metrics()["dab_dice"]) for name, score in dice.items()},
                cell_auroc={}
                if way.recorded
                else {name: score.metrics()["image_auroc"] for name, score in of_cells.items()},
                scored=way.scored,
            )
        )
    return FrontierReport(
        machine=Machine.here(),
        tile=rows[0].size[0],
        tiles=len(rows),
        threads=threads,
        gated=gated,
        points=tuple(points),
    )


Sample = Callable[[Callable[["Tensor", float], "Tensor"], Sequence["Tensor"]], "Tensor"]
"""Denoiser and noise fields → images [B, 3, H, W], standardised."""


@dataclass(frozen=True)
class _Way:
    """One sampler of one checkpoint."""

    checkpoint: Checkpoint
    sampler: str
    steps: int
    evaluations: int
    sample: Sample
    recorded: Mapping[str, float] = dataclasses.field(default_factory=dict)
    scored: str = ""

    @property
    def model(self) -> str:
        return self.checkpoint.config.name

    def run(self, he: UInt8Array, seeds: Any) -> dict[str, UInt8Array]:
        """``STAIN_<NAME>`` uint8 [B, H, W, 3] of each stain."""
        import torch

        from staindiffuser.training.infer import sampler_noise
        from staindiffuser.training.model.network import he_to_network, unstandardize

        network = self.checkpoint.network
        origins = np.zeros((len(he), 2), np.int64)
        fields = max(map(int, self.checkpoint.config.sigmas))
        noise, _ = sampler_noise(seeds, origins, steps=fields, size=(he.shape[1], he.shape[2]))
        noises = torch.from_numpy(noise).float().unbind(1)
        images = {}
        with torch.inference_mode():
            features = network.encoder(he_to_network(torch.from_numpy(he)))
            for stain in network.config.stains:
                y = self.sample(network.denoiser("images", stain.name, features), noises)
                image = unstandardize(y, stain, "images", network.config.sigma_data).clamp(0, 1).mul(255).round()
                images[f"STAIN_{stain.name.upper()}"] = image.to(torch.uint8).permute(0, 2, 3, 1).numpy()
        return images


@dataclass(frozen=True)
class _Baseline:
    """A network of one evaluation: its time is measured, its scores were."""

    model: str
    run: Callable[[UInt8Array, Any], Mapping[str, UInt8Array]]
    recorded: Mapping[str, float]
    scored: str
    sampler: str = "1 evaluation"
    steps: int = 0
    evaluations: int = 1


def _baselines(file: Path, served: Checkpoint) -> list[_Baseline]:
    from staindiffuser.training.baselines.unet import Regression
    from staindiffuser.training.config import TrainConfig

    found = []
    for record in json.loads(file.read_text(encoding="utf-8")):
        learner = Regression(served.config.model, TrainConfig())
        settings = record["settings"]
        train = settings["train"]
        found.append(
            _Baseline(
                model=f"U-Net, {settings['arm']}",
                run=lambda he, seeds, learner=learner: {  # type: ignore[misc]
                    f"STAIN_{name.upper()}": image for name, image in learner.stain_tiles(he).items()
                },
                recorded={stain: float(scores["dab_dice"]) for stain, scores in record["stains"].items()},
                scored=f"recorded on {settings['scored_tiles']} other tiles; {record['steps']} steps of "
                f"{train['batch']} crops of {train['crop']} px, {record['seconds'] / 60:.0f} minutes",
            )
        )
    return found


def _few_step_ways(checkpoint: Checkpoint) -> list[_Way]:
    from staindiffuser.training.diffusion.samplers import few_step

    ways = []
    for text, sigmas in sorted(checkpoint.config.sigmas.items(), key=lambda item: int(item[0])):
        steps = int(text)

        def sample(denoise: Any, noises: Any, sigmas: Sequence[float] = sigmas) -> Tensor:
            return few_step(denoise, noises[: len(sigmas)], sigmas)

        ways.append(_Way(checkpoint, f"{steps} step{'s' if steps > 1 else ''}", steps, steps, sample))
    return ways


def _long_ways(checkpoint: Checkpoint) -> list[_Way]:
    from staindiffuser.training.diffusion.samplers import heun
    from staindiffuser.training.infer import HEUN_STEPS

    model = checkpoint.config.model
    span = {"sigma_max": model.sigma_max, "sigma_min": model.sigma_min}
    return [
        _Way(
            checkpoint,
            f"{HEUN_STEPS} steps, Heun",
            HEUN_STEPS,
            2 * HEUN_STEPS - 1,
            lambda denoise, noises: heun(denoise, noises[0], steps=HEUN_STEPS, **span),
        ),
        _Way(
            checkpoint,
            f"{DDIM_STEPS} steps, DDIM",
            DDIM_STEPS,
            DDIM_STEPS,
            lambda denoise, noises: ddim(denoise, noises[0], steps=DDIM_STEPS, **span),
        ),
    ]


def ddim(
    denoise: Callable[[Tensor, float], Tensor], noise: Tensor, *, steps: int, sigma_max: float, sigma_min: float
) -> Tensor:
    """DDIM without added noise (Song et al. 2021, Equation 12 with η = 0), in EDM's variables: Euler's method."""
    from itertools import pairwise

    from staindiffuser.training.diffusion.samplers import karras_sigmas

    sigmas = karras_sigmas(steps, sigma_max=sigma_max, sigma_min=sigma_min)
    x = sigmas[0] * noise
    for now, after in pairwise(sigmas):
        clean = denoise(x, now)
        x = clean + after / now * (x - clean)
    return x


def frontier(
    tiles: Annotated[Path, typer.Option(help="Folder of paired tiles whose test split neither model has seen.")],
    student: Annotated[Path, typer.Option(help="The checkpoint that is served.")] = Path("checkpoints/demo"),
    teacher: Annotated[Path, typer.Option(help="The one that it was distilled from.")] = Path(
        "checkpoints/demo-teacher"
    ),
    most: Annotated[int, typer.Option(min=2, help="Tiles at most; the first warms up.")] = 24,
    threads: Annotated[int, typer.Option(min=0, help="Threads of torch; 0 for all cores.")] = 0,
    baselines: Annotated[
        Path | None, typer.Option(help="Results of `bench ablations` for regression and pix2pix, to be timed as well.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """DAB-Dice and cell AUROC against CPU time, from one step to 50 of DDIM, on the same tiles (needs torch)."""
    report = bench_frontier(
        student,
        teacher,
        tiles,
        most=most,
        threads=threads,
        baselines=baselines,
        progress=lambda line: typer.echo(line, err=True),
    )
    if hand_over(report, json_file):
        return
    for line in report.lines():
        typer.echo(line)
