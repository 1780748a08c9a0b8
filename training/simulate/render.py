"""From amounts of stain to images: Beer–Lambert, then the scanner."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from staindiffuser.imaging.arrays import FloatArray, UInt8Array
from staindiffuser.training.simulate.cells import REACH, Cells, Kind, place_cells
from staindiffuser.training.simulate.config import CHUNK, STAINS
from staindiffuser.training.simulate.maps import Layers, Maps
from staindiffuser.training.simulate.noise import fine_texture
from staindiffuser.training.simulate.randomness import stream
from staindiffuser.training.simulate.tissue import build_tissue
from staindiffuser.training.simulate.world import Scanner, Vector, World

__all__ = ["Chunk", "Rule", "render_chunk"]

Rule = Literal["context", "lymphocytes"]
"""How a predictor decides lymphocytes: by their neighbourhood, or all for T cells."""

HALO = 8
"""Pixels around a square that its blur and misalignment reach."""
_MAP_MARGIN = REACH + 8


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """One rendered square."""

    he: UInt8Array
    """uint8 [size, size, 3]."""
    stains: Mapping[str, UInt8Array]
    """Per stain the IHC, uint8 [size, size, 3]."""
    oracle: Mapping[str, UInt8Array]
    """Per stain the IHC with every lymphocyte as the rule says that was asked for; empty if none was."""
    cells: Cells
    """In world coordinates, some of them outside the square."""


def render_chunk(
    world: World,
    column: int,
    row: int,
    *,
    size: int = CHUNK,
    stains: tuple[str, ...] = STAINS,
    oracle: Rule | None = None,
) -> Chunk:
    """Render the square whose top-left corner is (column · size, row · size); size is a multiple of 16."""
    x0, y0 = column * size, row * size
    box = (x0 - HALO, y0 - HALO, x0 + size + HALO, y0 + size + HALO)
    m = _MAP_MARGIN
    tissue = build_tissue(world, box[0] - m, box[1] - m, box[2] + m, box[3] + m)
    cells = place_cells(world, tissue, box)
    maps = Maps(world, tissue, cells, box)
    rng = stream(world.seed, world.number, 9, column & 0xFFFFFFFF, row & 0xFFFFFFFF)
    seeds = rng.integers(0, 2**31, 1 + len(STAINS)).tolist()
    scanner = world.scanner

    def ihc(stain: str, t_cell: npt.NDArray[np.bool_]) -> UInt8Array:
        light = _displaced(_light(maps.ihc(stain, t_cell), scanner.white_ihc), scanner, maps.cloud)
        return _scan(light, scanner, seeds[1 + STAINS.index(stain)], max(88, scanner.quality))

    predicted = cells.kind == Kind.LYMPHOCYTE if oracle == "lymphocytes" else cells.t_context
    return Chunk(
        he=_scan(_light(maps.he(), scanner.white), scanner, seeds[0], scanner.quality),
        stains={stain: ihc(stain, cells.t_cell) for stain in stains},
        oracle={stain: ihc(stain, predicted) for stain in stains} if oracle else {},
        cells=cells,
    )


def _light(layers: Layers, white: Vector) -> FloatArray:
    """Beer–Lambert: densities add up, and light falls with their exponential. Grey levels [3, H, W]."""
    shape = np.broadcast_shapes(*(amount.shape for amount, _ in layers))
    light = np.empty((3, *shape), np.float32)
    for channel in range(3):
        density = light[channel]
        density[:] = 0
        for amount, vector in layers:
            density += amount * np.float32(-np.log(10.0) * vector[channel])
        np.exp(density, out=density)
        density *= np.float32(white[channel])
    return light


def _displaced(light: FloatArray, scanner: Scanner, cloud: FloatArray) -> FloatArray:
    """The IHC of a misaligned pair: shifted, and warped smoothly."""
    if scanner.shift == (0.0, 0.0):
        return light
    h, w = light.shape[1:]
    # Whole-pixel moves: the scanner's blur comes after, and hides the steps.
    dx = np.rint(scanner.shift[0] + np.float32(0.7 * scanner.warp) * cloud)
    dy = np.rint(scanner.shift[1] + np.float32(0.7 * scanner.warp) * np.roll(cloud, 37, axis=0))
    columns = np.clip(np.arange(w)[None, :] + dx, 0, w - 1).astype(np.int32)
    rows = np.clip(np.arange(h)[:, None] + dy, 0, h - 1).astype(np.int32)
    moved: FloatArray = light.reshape(3, -1)[:, rows * w + columns]
    return moved


def _scan(light: FloatArray, scanner: Scanner, seed: int, quality: int) -> UInt8Array:
    """Blur, sharpen, add noise and compress: [3, H, W] to uint8 [H - 2 HALO, W - 2 HALO, 3]."""
    blurred = _blurred(light, scanner.blur)
    trim = HALO - 3
    if scanner.sharpen:
        soft = _blurred(blurred, 1.3)
        inner = blurred[:, 3:-3, 3:-3]
        blurred = inner + np.float32(scanner.sharpen) * (inner - soft)
        trim -= 3
    inner = blurred[:, trim:-trim, trim:-trim]
    h, w = inner.shape[1:]
    image = np.empty((h, w, 3), np.uint8)
    for channel in range(3):
        values = inner[channel]
        if scanner.noise:
            # A slice of a stored texture at a random position: drawing normals per pixel costs more than all else.
            x, y = seed >> (3 * channel), seed >> (9 + 4 * channel)
            values = values + fine_texture(0.5, 10 + channel, x, y, h, w) * np.float32(scanner.noise)
        image[..., channel] = np.clip(values + np.float32(0.5), 0, 255)
    if not scanner.noise:
        return image
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=0 if quality > 85 else 2)
    decoded: UInt8Array = np.asarray(Image.open(buffer))
    return decoded


def _blurred(planes: FloatArray, sigma: float) -> FloatArray:
    """Gaussian of 7 taps, [3, H, W] to [3, H - 6, W - 6]."""
    taps = np.exp(-0.5 * (np.arange(4) / sigma) ** 2)
    taps = (taps / (taps[0] + 2 * taps[1:].sum())).astype(np.float32)
    reach = 2 if taps[3] < 2e-3 else 3
    for axis in (1, 2):
        n = planes.shape[axis]

        def part(offset: int, axis: int = axis, n: int = n, planes: FloatArray = planes) -> FloatArray:
            where = slice(3 + offset, n - 3 + offset)
            return planes[:, where, :] if axis == 1 else planes[:, :, where]

        total = part(0) * taps[0]
        for offset in range(1, reach + 1):
            total += (part(offset) + part(-offset)) * taps[offset]
        planes = total
    return planes
