"""The contact sheet: the most suspicious tiles, each with its stains and the reason."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from staindiffuser.files import replacing
from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.image_files import read_image
from staindiffuser.training.check.suspicions import Suspicion
from staindiffuser.training.tiles.mask_codes import is_positive
from staindiffuser.training.tiles.stain_names import stain_label
from staindiffuser.training.tiles.tile import PairedTile

__all__ = ["worst_tiles", "write_sheet"]

_SIDE = 192
"""Of an image on the sheet, pixels."""
_CAPTION = 34
_GAP = 10


def worst_tiles(suspicions: Sequence[Suspicion], count: int) -> list[tuple[PairedTile, list[str]]]:
    """At most ``count`` tiles, the worst first, each with its reasons."""
    reasons: dict[Path, tuple[PairedTile, list[str]]] = {}
    for suspicion in suspicions:
        if suspicion.tile.he in reasons or len(reasons) < count:
            reasons.setdefault(suspicion.tile.he, (suspicion.tile, []))[1].append(suspicion.words)
    return list(reasons.values())


def write_sheet(path: Path, tiles: Sequence[tuple[PairedTile, Sequence[str]]], *, across: int = 3) -> None:
    """Write a JPEG or PNG: H&E, stains and outlines of their masks side by side, ``across`` tiles in a row.

    Raises:
        UsageError: the file cannot be written.
    """
    stains = list(tiles[0][0].stains)
    width = (1 + len(stains)) * _SIDE + _GAP
    height = _SIDE + _CAPTION
    rows = -(-len(tiles) // across)
    sheet = Image.new("RGB", (min(across, len(tiles)) * width, rows * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for number, (tile, reasons) in enumerate(tiles):
        left, top = number % across * width, number // across * height
        names = ", ".join(["H&E", *map(stain_label, stains)])
        draw.text((left + 2, top + 3), f"row {tile.row}, {tile.slide}: {names}"[:78], fill="black", font=font)
        draw.text((left + 2, top + 18), "; ".join(reasons)[:92], fill=(180, 0, 0), font=font)
        images = [read_image(tile.he), *(_with_outline(tile, stain) for stain in stains)]
        for column, image in enumerate(images):
            small = Image.fromarray(image).resize((_SIDE, _SIDE), Image.Resampling.BOX)
            sheet.paste(small, (left + column * _SIDE, top + _CAPTION))
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG" if path.suffix.lower() == ".png" else "JPEG", quality=88)


def _with_outline(tile: PairedTile, stain: str) -> UInt8Array:
    """A stain's image, or the H&E where there is none, with the outline of its mask in green."""
    image, path = read_image(tile.stains[stain] or tile.he), tile.masks[stain]
    if path is None:
        return image
    mask = is_positive(read_image(path, mode="L"), tile.mask_codes.get(stain, "grey"))
    edge = np.zeros_like(mask)
    edge[:-1] |= mask[:-1] != mask[1:]
    edge[:, :-1] |= mask[:, :-1] != mask[:, 1:]
    image[edge] = (0, 170, 0)
    return image
