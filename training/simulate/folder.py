"""Write a folder of simulated paired tiles, on several processes, resumably."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from staindiffuser.files import write_json
from staindiffuser.imaging import morphology, optical_density
from staindiffuser.imaging.image_files import write_png
from staindiffuser.parallel import in_order, process_pool
from staindiffuser.training.errors import ConfigError
from staindiffuser.training.simulate.config import CHUNK, MPP, STAINS, SimulatorConfig
from staindiffuser.training.simulate.tiles import simulate_tile, split_of, tile_name
from staindiffuser.training.tiles.description import check_described
from staindiffuser.training.tiles.writing import PairedTilesWriter

__all__ = ["SIMULATION_JSON", "TilesRequest", "TilesResult", "generator_hash", "write_tiles"]

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
    sources = [here / f"{name}.py" for name in names]
    sources += [Path(inspect.getfile(module)) for module in (optical_density, morphology)]
    for source in sources:
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
    """What must be equal for tiles to share a folder; values as JSON text."""
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
    with process_pool(request.jobs) as pool:
        yield from in_order(pool, partial(_one, request), indices, ahead=8 * request.jobs)
