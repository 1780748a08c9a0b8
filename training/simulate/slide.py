"""A simulated slide of any size, read a region at a time."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.training.errors import ConfigError
from staindiffuser.training.simulate.config import CHUNK, MPP, STAINS, SimulatorConfig
from staindiffuser.training.simulate.render import Chunk, render_chunk
from staindiffuser.training.simulate.world import World

__all__ = ["SimulatedSlide"]


class SimulatedSlide:
    """One world, cut to a width and a height. Any region gives the same pixels, however the slide is read.

    The slide is rendered in squares of 256 px, each from its position alone; the last few hundred are kept. The IHC is
    rendered with them from the first time that it is read.

    Args:
        seed: of the simulation.
        width: pixels (0.5 µm each).
        height: pixels.
        number: which world of the seed.
        config: what is simulated.
    """

    mpp = MPP

    def __init__(
        self, seed: int, width: int, height: int, *, number: int = 0, config: SimulatorConfig | None = None
    ) -> None:
        if width < 1 or height < 1:
            raise ConfigError(f"a slide of {width} x {height} pixels cannot be; both must be at least 1")
        self.width, self.height = width, height
        self.world = World.draw(seed, number, config or SimulatorConfig(), extent=(width, height))
        self._stains: tuple[str, ...] = ()
        self._chunk = lru_cache(maxsize=256)(self._render)

    @property
    def name(self) -> str:
        """What the slide is called in paired tiles."""
        return self.world.name

    def read(self, x: int, y: int, width: int, height: int) -> UInt8Array:
        """The H&E of a region: uint8 [height, width, 3]; what lies outside the slide is white glass."""
        return self._read("he", x, y, width, height)

    def read_ihc(self, stain: str, x: int, y: int, width: int, height: int) -> UInt8Array:
        """The true IHC of a region, aligned with :meth:`read` unless this slide drew a misaligned pair."""
        if stain not in STAINS:
            raise ConfigError(f"stain {stain!r} is not simulated; choose from {', '.join(STAINS)}")
        self._stains = STAINS
        return self._read(stain, x, y, width, height)

    def _render(self, column: int, row: int, stains: tuple[str, ...]) -> Chunk:
        return render_chunk(self.world, column, row, stains=stains)

    def _read(self, layer: str, x: int, y: int, width: int, height: int) -> UInt8Array:
        white = self.world.scanner.white if layer == "he" else self.world.scanner.white_ihc
        region = np.empty((height, width, 3), np.uint8)
        region[:] = np.asarray(white).astype(np.uint8)
        left, top = max(x, 0), max(y, 0)
        right, bottom = min(x + width, self.width), min(y + height, self.height)
        for row in range(top // CHUNK, -(-bottom // CHUNK)):
            for column in range(left // CHUNK, -(-right // CHUNK)):
                chunk = self._chunk(column, row, self._stains)
                image = chunk.he if layer == "he" else chunk.stains[layer]
                x0, x1 = max(left, column * CHUNK), min(right, (column + 1) * CHUNK)
                y0, y1 = max(top, row * CHUNK), min(bottom, (row + 1) * CHUNK)
                region[y0 - y : y1 - y, x0 - x : x1 - x] = image[
                    y0 - row * CHUNK : y1 - row * CHUNK, x0 - column * CHUNK : x1 - column * CHUNK
                ]
        return region
