"""Simulated paired tiles: tile ``index`` of ``seed`` is the same everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.optical_density import coarse_mask, dab_mask
from staindiffuser.training.errors import ConfigError
from staindiffuser.training.simulate.cells import Cells
from staindiffuser.training.simulate.config import CHUNK, MPP, STAINS, SimulatorConfig
from staindiffuser.training.simulate.randomness import stream
from staindiffuser.training.simulate.render import Rule, render_chunk
from staindiffuser.training.simulate.world import World
from staindiffuser.training.tiles.paired_tiles import Split

__all__ = ["SimulatedTile", "simulate_tile", "split_of", "tile_name"]

_GOLDEN = 0.6180339887498949


@dataclass(frozen=True, kw_only=True)
class SimulatedTile:
    """One tile and everything that is true of it."""

    he: UInt8Array
    """uint8 [size, size, 3]."""
    stains: Mapping[str, UInt8Array]
    """Per stain the true IHC, uint8 [size, size, 3]."""
    masks: Mapping[str, UInt8Array]
    """Per stain the coarse mask of the true IHC, uint8 [size, size]; empty unless asked for."""
    oracle: Mapping[str, UInt8Array]
    """Per stain what the oracle would paint that was asked for; empty if none was."""
    cells: Cells
    """The true cells, x and y in this tile's pixels; some lie just outside."""
    slide: str
    mpp: float = MPP


def simulate_tile(
    seed: int,
    index: int,
    *,
    size: int = CHUNK,
    config: SimulatorConfig | None = None,
    stains: tuple[str, ...] = STAINS,
    masks: bool = True,
    oracle: Rule | None = None,
) -> SimulatedTile:
    """Tile ``index`` of ``seed``.

    Tiles belong to slides of ``config.tiles_per_slide`` tiles each, which share tissue, stains and scanner.

    Args:
        seed: non-negative.
        index: non-negative.
        size: edge, pixels; a multiple of 16.
        config: what is simulated.
        stains: which of ``cd3`` and ``ck818``.
        masks: also derive the coarse masks.
        oracle: also render what an oracle would predict that knows everything but which lymphocytes are T cells, and
            decides them by ``context`` (right but for the undecidable share) or calls all ``lymphocytes`` T cells.

    Raises:
        ConfigError: an argument cannot be.
    """
    config = config or SimulatorConfig()
    if seed < 0 or index < 0:
        raise ConfigError(f"seed is {seed} and index {index}; neither may be negative")
    if size < 16 or size % 16:
        raise ConfigError(f"size is {size}; it must be a positive multiple of 16 pixels")
    for stain in stains:
        if stain not in STAINS:
            raise ConfigError(f"stain {stain!r} is not simulated; choose from {', '.join(STAINS)}")
    number, position = divmod(index, config.tiles_per_slide)
    world = _world(seed, number, config)
    # Tiles of a slide lie scattered, so that they show more of it than one neighbourhood.
    rng = stream(seed, number, 4, position)
    side = int(np.ceil(np.sqrt(config.tiles_per_slide)))
    column = int(world.phase(60) * 4096) + 3 * (position % side) + int(rng.integers(2))
    row = int(world.phase(61) * 4096) + 3 * (position // side) + int(rng.integers(2))
    chunk = render_chunk(world, column, row, size=size, stains=stains, oracle=oracle)
    return SimulatedTile(
        he=chunk.he,
        stains=chunk.stains,
        masks={stain: coarse_mask(dab_mask(image)) for stain, image in chunk.stains.items()} if masks else {},
        oracle=chunk.oracle,
        cells=chunk.cells.moved(-column * size, -row * size),
        slide=world.name,
    )


@lru_cache(maxsize=8)
def _world(seed: int, number: int, config: SimulatorConfig) -> World:
    return World.draw(seed, number, config)


def split_of(index: int, *, val_share: float, test_share: float, config: SimulatorConfig | None = None) -> Split:
    """The split of a tile: whole slides, spread evenly, the first to ``val`` and the second to ``test``."""
    number = index // (config or SimulatorConfig()).tiles_per_slide
    draw = (number * _GOLDEN) % 1.0
    if draw < val_share:
        return "val"
    if (draw - 0.6) % 1.0 < test_share:
        return "test"
    return "train"


def tile_name(seed: int, index: int) -> str:
    """File name of a tile, without suffix."""
    return f"s{seed}-{index:07d}"
