"""Write a folder of simulated paired tiles, on several processes, resumably."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from staindiffuser.files import write_json
from staindiffuser.training.errors import ConfigError
from staindiffuser.training.simulate.config import CHUNK, MPP, STAINS, SimulatorConfig
from staindiffuser.training.simulate.tiles import simulate_tile, split_of, tile_name
from staindiffuser.training.tiles.description import check_described
from staindiffuser.training.tiles.paired_tiles import PairedTilesWriter, write_png

__all__ = ["SIMULATION_JSON", "TilesRequest", "TilesResult", "generator_hash", "one_thread_each", "write_tiles"]

SIMULATION_JSON = "simulation.json"


@dataclass(frozen=True, kw_only=True)
class TilesRequest:
    """What ``simulate tiles`` is asked for."""

    output: Path
    count: int
    size: int = CHUNK
    """Edge, pixels; a multiple of 16."""
    seed: int = 0
    first: int = 0
    """Index of the first tile."""
    stains: tuple[str, ...] = STAINS
    val_share: float = 0.1
    test_share: float = 0.1
    masks: bool = True
    jobs: int = 1
    config: SimulatorConfig = dataclasses.field(default_factory=SimulatorConfig)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"count is {self.count}; it must be at least 1")
        if self.jobs < 1:
            raise ConfigError(f"jobs is {self.jobs}; it must be at least 1")
        if self.seed < 0 or self.first < 0:
            raise ConfigError(f"seed is {self.seed} and first {self.first}; neither may be negative")
        if self.size < 16 or self.size % 16:
            raise ConfigError(f"size is {self.size}; it must be a positive multiple of 16 pixels")
        if min(self.val_share, self.test_share) < 0 or self.val_share + self.test_share > 0.6:
            raise ConfigError(
                f"val-share {self.val_share} and test-share {self.test_share} must be at least 0 and sum to at most 0.6"
            )
        for stain in self.stains:
            if stain not in STAINS:
                raise ConfigError(f"stain {stain!r} is not simulated; choose from {', '.join(STAINS)}")


@dataclass(frozen=True, kw_only=True)
class TilesResult:
    """What was done."""

    output: str
    tiles: int
    """In the folder now."""
    written: int
    """By this run."""
    seconds: float
    generator: str
    """Hash of the code that decides the pixels."""


def generator_hash() -> str:
    """SHA-256 of the sources that decide a tile's pixels: tiles of another version are not mixed with these."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    names = ("config", "randomness", "noise", "world", "tissue", "cells", "cellmap", "maps", "render", "tiles")
    for source in [*(here / f"{name}.py" for name in names), here.parent / "optical_density.py"]:
        if source.is_file():
            digest.update(source.read_bytes())
    return digest.hexdigest()


def write_tiles(request: TilesRequest, progress: Callable[[int, int], None] = lambda done, total: None) -> TilesResult:
    """Write the tiles that are not there yet.

    Args:
        request: what to write.
        progress: told the number of tiles done and asked for.

    Raises:
        UsageError: the folder cannot be written, or holds tiles of another simulation.
    """
    import time

    begun = time.perf_counter()
    description = _description(request)
    check_described(request.output, SIMULATION_JSON, description, what="tiles of another simulation")
    written = 0
    with PairedTilesWriter(request.output, request.stains, masks=request.masks, resume=True) as writer:
        write_json(request.output / SIMULATION_JSON, description)
        indices = range(request.first, request.first + request.count)
        missing = [index for index in indices if not writer.has(tile_name(request.seed, index))]
        done = request.count - len(missing)
        progress(done, request.count)
        for index, slide in _simulated(request, missing):
            split = split_of(index, val_share=request.val_share, test_share=request.test_share, config=request.config)
            writer.add_row(tile_name(request.seed, index), slide=slide, split=split, mpp=MPP)
            written, done = written + 1, done + 1
            progress(done, request.count)
        tiles = writer.count
    return TilesResult(
        output=str(request.output), tiles=tiles, written=written, seconds=round(time.perf_counter() - begun, 3),
        generator=description["generator"],
    )  # fmt: skip


def _description(request: TilesRequest) -> dict[str, str]:
    """What must be equal for tiles to belong into one folder; values as JSON text."""
    values = {
        "seed": request.seed, "size": request.size, "stains": list(request.stains), "masks": request.masks,
        "val_share": request.val_share, "test_share": request.test_share, "config": dataclasses.asdict(request.config),
    }  # fmt: skip
    return {"generator": generator_hash(), **{name: json.dumps(value) for name, value in values.items()}}


def _one(request: TilesRequest, index: int) -> tuple[int, str]:
    tile = simulate_tile(
        request.seed, index, size=request.size, config=request.config, stains=request.stains, masks=request.masks
    )
    name = tile_name(request.seed, index)
    images = {"he": tile.he, **tile.stains, **{f"{stain}_mask": mask for stain, mask in tile.masks.items()}}
    for column, image in images.items():
        write_png(request.output / column / f"{name}.png", image)
    return index, tile.slide


def _simulated(request: TilesRequest, indices: list[int]) -> Iterator[tuple[int, str]]:
    if request.jobs == 1 or len(indices) < 8:
        for index in indices:
            yield _one(request, index)
        return
    # Spawned, not forked: the caller may hold threads. Few tiles are in flight, so a long run stays small.
    with one_thread_each(), ProcessPoolExecutor(request.jobs, multiprocessing.get_context("spawn")) as pool:
        waiting: list[Future[tuple[int, str]]] = []
        try:
            for index in indices:
                waiting.append(pool.submit(_one, request, index))
                if len(waiting) >= 8 * request.jobs:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Child processes started within get one thread each: the processes already fill the cores."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
