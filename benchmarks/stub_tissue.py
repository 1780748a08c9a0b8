"""A slide of any size and a server of known cost, for measuring the client alone.

Tissue is one drawing of ``PERIOD`` pixels, repeated: the slide, the stained images and the cell maps are cut from it,
so they fit together everywhere, and a tile costs no more than its copy.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from staindiffuser.client.contract import ModelContract, ServedStain
from staindiffuser.imaging.arrays import UInt8Array

__all__ = ["PERIOD", "StubStainer", "StubTissue", "write_slide"]

PERIOD = 2048
"""Of the drawing, pixels."""
MPP = 0.5
SIDE = 512
GLASS = 244
REDUCTIONS = (1, 4, 8)
"""Of the slide's levels."""
NEGATIVE_SHARE = 0.5
"""Of the nuclei, about: positive for no stain."""


class StubTissue:
    """Nuclei, some of them positive for one of the stains."""

    def __init__(self, cells_per_mm2: float, stains: int, seed: int = 0) -> None:
        """Draw the tissue.

        Args:
            cells_per_mm2: positive cells of all stains together.
            stains: number of stains.
            seed: of the drawing.
        """
        rng = np.random.default_rng(seed)
        shape = (PERIOD, PERIOD)
        positive = round(cells_per_mm2 * (PERIOD * MPP / 1000) ** 2)
        count = round(positive / (1 - NEGATIVE_SHARE))
        nuclei = np.zeros(shape, np.uint8)
        maps = [np.zeros(shape, np.uint8) for _ in range(stains)]
        axes = rng.uniform(4.5, 9, (count, 2))
        for number, (x, y) in enumerate(rng.uniform(0, PERIOD, (count, 2))):
            angle = float(rng.uniform(0, 180))
            kind = (nuclei,) if number >= positive else (nuclei, maps[number % stains])
            for image in kind:
                _ellipse(image, x, y, axes[number], angle)
        self.maps: list[UInt8Array] = [
            cv2.GaussianBlur(image, (0, 0), 1.2, borderType=cv2.BORDER_REFLECT).astype(np.uint8) for image in maps
        ]
        """Cell map per stain, uint8 [PERIOD, PERIOD]."""
        grain = rng.normal(0, 4, (*shape, 1)) + rng.normal(0, 2, (*shape, 3))
        self.he: UInt8Array = _coloured(nuclei, (225, 175, 205), (95, 70, 150), grain)
        """The H&E, uint8 [PERIOD, PERIOD, 3]."""
        self.images: list[UInt8Array] = [_coloured(image, (228, 226, 234), (120, 80, 50), grain) for image in self.maps]
        """Stained image per stain, uint8 [PERIOD, PERIOD, 3]."""


class StubStainer:
    """A :class:`~staindiffuser.client.contract.Stainer` of known cost, one tile after the other, like a GPU."""

    url = "stub:0"
    server_version = "stub"
    server_id = "stub"

    def __init__(
        self, maps: Sequence[UInt8Array], images: Sequence[UInt8Array], *, tile: int = 512, seconds_per_tile: float = 0
    ) -> None:
        """Create the stainer.

        Args:
            maps: of a :class:`StubTissue`.
            images: of the same.
            tile: side of a tile, pixels.
            seconds_per_tile: what a tile costs.
        """
        stains = tuple(ServedStain(name=f"stub{n}", label=f"Stub {n}") for n in range(1, len(maps) + 1))
        self.contract = ModelContract(
            stains=stains,
            tile=tile,
            margin=64,
            mpp=MPP,
            steps=1,
            origin_multiple=16,
            max_batch=32,
            model_name="stub",
            model_version="0" * 64,
            notice="A substitute without a model.",
        )
        self._seconds = seconds_per_tile
        self._busy = threading.Lock()
        drawn = {stain.image_tensor: image for stain, image in zip(stains, images, strict=True)}
        drawn |= {stain.cells_tensor: image[..., None] for stain, image in zip(stains, maps, strict=True)}
        wrapped = ((0, tile), (0, tile), (0, 0))
        self._drawn = {name: np.pad(image, wrapped, mode="wrap") for name, image in drawn.items()}

    def stain_tiles(
        self,
        tiles_BTT3: UInt8Array,
        origins_B2: NDArray[np.int64],
        seed: int,
        *,
        stains: Sequence[str] | None = None,
        images: bool = True,
        cells: bool = True,
        quality: bool = False,
    ) -> dict[str, NDArray[Any]]:
        """See :meth:`staindiffuser.client.connection.StainClient.stain_tiles`; its contract promises no quality."""
        if self._seconds:
            with self._busy:
                time.sleep(self._seconds * len(tiles_BTT3))
        side = self.contract.tile
        chosen = self.contract.select(stains)
        names = [stain.image_tensor for stain in chosen] * images + [stain.cells_tensor for stain in chosen] * cells
        corners = (origins_B2 % PERIOD).tolist()
        return {name: np.stack([self._drawn[name][y : y + side, x : x + side] for x, y in corners]) for name in names}

    def cancel(self) -> None:
        """Nothing is under way for long."""


def write_slide(path: Path, tissue: StubTissue, side: int, *, tissue_side: int, pyramid: bool = True) -> None:
    """Write a JPEG-compressed TIFF: tissue at its upper left, glass elsewhere.

    Args:
        path: the file.
        tissue: what is on it.
        side: of the slide, pixels.
        tissue_side: of the tissue, pixels; rounded up to whole tiles of the smallest level.
        pyramid: with reduced levels.
    """
    smallest = SIDE * REDUCTIONS[-1]
    tissue_side = -(-tissue_side // smallest) * smallest
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for reduction in REDUCTIONS if pyramid else REDUCTIONS[:1]:
            drawn = np.asarray(Image.fromarray(tissue.he).reduce(reduction))
            small = -(-side // reduction)
            tiff.write(
                _tiles(drawn, small, tissue_side // reduction),
                shape=(small, small, 3),
                dtype=np.uint8,
                tile=(SIDE, SIDE),
                photometric="rgb",
                compression="jpeg",
                subsampling=(1, 1),
                subfiletype=int(reduction > 1),
                resolution=(1e4 / MPP / reduction, 1e4 / MPP / reduction),
                resolutionunit="CENTIMETER",
                metadata=None,
            )


def _tiles(drawn: UInt8Array, side: int, tissue_side: int) -> Iterator[bytes]:
    repeats = max(1, SIDE // len(drawn))
    drawn = np.tile(drawn, (repeats, repeats, 1))
    per_axis = len(drawn) // SIDE
    encoded = {
        (row, column): _jpeg(drawn[row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE])
        for row, column in itertools.product(range(per_axis), repeat=2)
    }
    glass = _jpeg(np.full((SIDE, SIDE, 3), GLASS, np.uint8))
    for row, column in itertools.product(range(-(-side // SIDE)), repeat=2):
        inside = max(row, column) * SIDE < tissue_side
        yield encoded[row % per_axis, column % per_axis] if inside else glass


def _jpeg(tile_SS3: UInt8Array) -> bytes:
    return bytes(
        imagecodecs.jpeg8_encode(
            np.ascontiguousarray(tile_SS3), level=85, colorspace="RGB", outcolorspace="YCBCR", subsampling="444"
        )
    )


def _ellipse(image: UInt8Array, x: float, y: float, axes: NDArray[np.float64], angle: float) -> None:
    """Draw a filled ellipse that leaves at one edge and comes in at the other."""
    size = (round(axes[0] * 16), round(axes[1] * 16))
    for left, top in itertools.product((0, PERIOD, -PERIOD), repeat=2):
        if -20 < x + left < PERIOD + 20 and -20 < y + top < PERIOD + 20:
            centre = (round((x + left) * 16), round((y + top) * 16))
            cv2.ellipse(image, centre, size, angle, 0, 360, (240,), -1, cv2.LINE_AA, 4)


def _coloured(
    amount: UInt8Array, bright: tuple[int, ...], dark: tuple[int, ...], grain: NDArray[np.float64]
) -> UInt8Array:
    share = amount[..., None] / 240
    mixed = np.array(bright) * (1 - share) + np.array(dark) * share + grain
    coloured: UInt8Array = np.clip(np.rint(mixed), 0, 255).astype(np.uint8)
    return coloured
