"""An image of tiles that the gate judged, as every sampler stains them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from staindiffuser.errors import UsageError
from staindiffuser.training.evaluation.scoring import ScoredTile

__all__ = ["Gallery"]

SIDE = 192
"""Side of the part of a tile that is shown, pixels."""
TYPICAL = 0.3
"""Preferred positive share of that part: such tiles show both positive and negative cells."""
EACH = 2
"""Tiles kept for each stain."""
_GAP, _HEAD = 4, 24


class Gallery:
    """Keeps tiles worth looking at while they are scored, some for each stain (by machine name), and draws them."""

    def __init__(self, stains: Sequence[str]) -> None:
        self._kept: dict[str, list[tuple[float, ScoredTile]]] = {stain: [] for stain in stains}

    def see(self, tile: ScoredTile) -> None:
        """Consider a tile."""
        for stain, kept in self._kept.items():
            distance = abs(float(np.mean(_centre(tile.data[f"{stain}_mask"]) > 127)) - TYPICAL)
            kept.append((distance, tile))
            kept.sort(key=lambda item: item[0])
            del kept[EACH:]

    def draw(self, path: Path, samplers: Sequence[str]) -> None:
        """A row per tile: the H&E, the real stain, and the result of each sampler.

        Args:
            path: a JPEG.
            samplers: their names, in the order of the results.

        Raises:
            UsageError: the file cannot be written.
        """
        titles = ["H&E", "real", *samplers]
        rows = [(stain, tile) for stain, kept in self._kept.items() for _, tile in kept]
        step = SIDE + _GAP
        sheet = Image.new("RGB", (len(titles) * step, _HEAD + len(rows) * step), "white")
        draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
        for column, title in enumerate(titles):
            draw.text((column * step + 4, 4), title, fill="black", font=font)
        for number, (stain, tile) in enumerate(rows):
            results = (result[f"STAIN_{stain.upper()}"] for result in tile.results)
            for column, image in enumerate((tile.data["he"], tile.data[stain], *results)):
                corner = (column * step, _HEAD + number * step)
                sheet.paste(Image.fromarray(_centre(image)), corner)
                if column == 1:
                    draw.text((corner[0] + 4, corner[1] + 2), stain, fill="black", font=font)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            sheet.save(path, quality=90)
        except OSError as error:
            raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error


def _centre(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width = image.shape[:2]
    top, left = max(0, (height - SIDE) // 2), max(0, (width - SIDE) // 2)
    return np.ascontiguousarray(image[top : top + SIDE, left : left + SIDE])
