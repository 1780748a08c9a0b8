"""Figures by which a person judges a registration and the tiles made from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from staindiffuser.files import replacing
from staindiffuser.imaging.arrays import FloatArray, UInt8Array
from staindiffuser.imaging.glass import glass_percentile
from staindiffuser.training.prepare.quality import Reason
from staindiffuser.training.prepare.registration.features import structure
from staindiffuser.training.prepare.registration.register import Registration
from staindiffuser.training.prepare.registration.resampling import WHITE, sampled
from staindiffuser.training.prepare.sections import SectionImage

__all__ = ["registration_image", "tiles_image"]

_SQUARES = 12
"""Squares of the checkerboard along the longer side."""
_CAPTION = 28
_KEPT = (0, 150, 60)
_COLOURS = {Reason.ihc_missing: (240, 150, 0), Reason.blurred: (120, 80, 220), Reason.misregistered: (220, 0, 40)}


def registration_image(
    path: Path, he: SectionImage, ihc: SectionImage, registration: Registration, caption: str
) -> None:
    """Write a JPEG: left a checkerboard of both sections, right an overlay of their hematoxylin.

    In the overlay the H&E's is magenta and the IHC's green: grey where both have it, coloured where only one has.

    Raises:
        UsageError: the file cannot be written.
    """
    height, width = he.rgb.shape[:2]
    coordinates = registration.warp.grid(he.origin, (height, width), he.mpp)
    at = ((coordinates - np.asarray(ihc.origin)) / ihc.mpp - 0.5).astype(np.float32)
    moved = sampled(ihc.rgb, at, beyond=WHITE)
    side = max(8, max(height, width) // _SQUARES)
    rows, columns = np.arange(height)[:, None] // side, np.arange(width)[None] // side
    board = np.where(((rows + columns) % 2 == 0)[..., None], he.rgb, moved)
    first = _ink(structure(he.rgb, "he", glass_percentile(he.rgb)).hematoxylin)
    second = _ink(structure(moved, "ihc", glass_percentile(ihc.rgb)).hematoxylin)
    laid_over = np.stack([255 - second, 255 - first, 255 - second], axis=-1)
    _save(path, np.concatenate([board, np.full((height, 8, 3), 255, np.uint8), laid_over], axis=1), caption)


def tiles_image(
    path: Path,
    he: SectionImage,
    *,
    side_um: float,
    kept: Iterable[tuple[int, int]],
    dropped: Mapping[tuple[int, int], Reason],
    caption: str,
) -> None:
    """Write a JPEG of the H&E with its tiles: green kept, orange IHC missing, violet blurred, red misregistered.

    Raises:
        UsageError: the file cannot be written.
    """
    image = Image.fromarray(he.rgb)
    draw = ImageDraw.Draw(image)
    colours = dict.fromkeys(kept, _KEPT) | {
        position: _COLOURS[reason] for position, reason in dropped.items() if reason in _COLOURS
    }
    for (column, row), colour in colours.items():
        corners = np.array([[column, row], [column + 1, row + 1]], float) * side_um
        (x0, y0), (x1, y1) = (corners - np.asarray(he.origin)) / he.mpp
        draw.rectangle((x0 + 1, y0 + 1, max(x0 + 1, x1 - 1), max(y0 + 1, y1 - 1)), outline=colour)
    _save(path, np.asarray(image), caption)


def _ink(hematoxylin: FloatArray) -> UInt8Array:
    top = max(1e-3, float(np.percentile(hematoxylin, 99)))
    return np.clip(hematoxylin * (255 / top), 0, 255).astype(np.uint8)


def _save(path: Path, pixels: UInt8Array, caption: str) -> None:
    image = Image.new("RGB", (pixels.shape[1], pixels.shape[0] + _CAPTION), "white")
    image.paste(Image.fromarray(np.ascontiguousarray(pixels)), (0, _CAPTION))
    ImageDraw.Draw(image).text((6, 5), caption, fill="black", font=ImageFont.load_default(15))
    with replacing(path) as temporary:
        image.save(temporary, format="JPEG", quality=85)
