"""A virtual stain beside another image of the same stain: a registered real one, or that of another model or seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from staindiffuser.client.contract import ServedStain
from staindiffuser.client.run_record import RunRecord
from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.optical_density import DAB_THRESHOLD, dab_density
from staindiffuser.imaging.slides import open_slide
from staindiffuser.viewer.errors import ViewerUsageError
from staindiffuser.viewer.pyramids import SIDE, Pyramid, SlidePyramid, TileCache

__all__ = ["TRUTH", "Reference", "agreement", "difference", "open_truth", "parse_truth"]

TRUTH = "~real"
"""Name of the real stains among the references; a result's name has no such character."""
FULL = 0.6
"""Difference of DAB's optical densities that is shown in full colour (ours)."""
MORE, LESS = (190, 45, 20), (20, 90, 170)
"""Colour of what only the virtual stain shows, and of what only the other one shows."""
SAME_SHAPE = 0.02
"""Sides of registered images may differ by this share."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What a result is compared with."""

    name: str
    """Part of addresses: :data:`TRUTH`, or the other result's."""
    label: str
    """For people: ``real``, or the other result's title and model."""
    stains: tuple[str, ...]
    """Names of the stains that it has, too."""


def parse_truth(options: Sequence[str], stains: Sequence[ServedStain]) -> dict[str, Path]:
    """The files of ``--truth [STAIN=]FILE``, by the stain's name.

    Raises:
        ViewerUsageError: a stain is unknown, not named where there are several, or named twice.
    """
    found: dict[str, Path] = {}
    names = {key: stain.name for stain in stains for key in (stain.name, stain.label.lower())}
    for option in options:
        stain, equals, path = option.partition("=")
        if not equals and len(stains) == 1:
            stain, path = stains[0].name, option
        name = names.get(stain.lower()) if path else None
        known = ", ".join(one.name for one in stains)
        if name is None:
            raise ViewerUsageError(f"--truth {option}: say of which stain it is, as STAIN=FILE; the result has {known}")
        if name in found:
            raise ViewerUsageError(f"--truth {option}: {name} was named twice")
        found[name] = Path(path)
    return found


def open_truth(path: Path, run: RunRecord, image: Pyramid, cache: TileCache) -> Pyramid:
    """A registered real stain, on the grid of the virtual one.

    Raises:
        SlideError: it cannot be read.
        ViewerUsageError: it does not have the slide's shape, so it is not registered to it.
    """
    slide = open_slide(path)
    sides = np.array(slide.size) / np.array(run.input.size)
    if slide.mpp is not None:
        sides = sides * np.array(slide.mpp) / np.array(run.input.mpp)
        wrong = np.abs(sides - 1).max() > SAME_SHAPE
    else:
        wrong = abs(sides[0] / sides[1] - 1) > SAME_SHAPE
    if wrong:
        slide.close()
        raise ViewerUsageError(
            f"--truth {path} is {slide.size[0]} × {slide.size[1]} pixels, not of the shape of the slide "
            f"({run.input.size[0]} × {run.input.size[1]}): register it to the H&E first"
        )
    return SlidePyramid(slide, cache, (TRUTH, str(path.resolve())), size=image.levels[0])


def difference(virtual_HW3: UInt8Array, other_HW3: UInt8Array) -> UInt8Array:
    """Where DAB differs: red where only the virtual stain shows it, blue where only the other does, else white."""
    height, width = (min(a, b) for a, b in zip(virtual_HW3.shape[:2], other_HW3.shape[:2], strict=True))
    change = dab_density(virtual_HW3[:height, :width]) - dab_density(other_HW3[:height, :width])
    strength = np.clip(np.abs(change) / FULL, 0, 1)[..., None]
    colour = np.where(change[..., None] > 0, np.array(MORE, np.float32), np.array(LESS, np.float32))
    shown: UInt8Array = np.rint(255 + strength * (colour - 255)).astype(np.uint8)
    return shown


def agreement(
    virtual: Pyramid, other: Pyramid, polygon: NDArray[np.float64], masks: Any, most: int
) -> dict[str, float | None]:
    """How well two stains agree in a polygon.

    Args:
        virtual: the virtual stain.
        other: the other one, on the same grid.
        polygon: corners [N, 2], level-0 pixels of that grid.
        masks: function of corners relative to a tile that gives the polygon's part on it, bool [SIDE, SIDE].
        most: pixels to look at; a reduced level is taken for more.

    Returns:
        ``dice`` of the DAB masks (None if neither has any), ``virtual_share`` and ``other_share`` of the polygon's
        pixels, ``correlation`` of the densities (None where one is constant).
    """
    (x0, y0), (x1, y1) = polygon.min(axis=0), polygon.max(axis=0)
    level, levels = 0, min(len(virtual.levels), len(other.levels))
    while level + 1 < levels and (x1 - x0) * (y1 - y0) / 4**level > most:
        level += 1
    corners = polygon / 2**level
    (left, top), (right, bottom) = np.floor(corners.min(axis=0)), np.ceil(corners.max(axis=0))
    width, height = virtual.levels[level]
    moments = np.zeros(6)  # n, Σa, Σb, Σa², Σb², Σab
    both = one = two = 0
    for row in range(int(top) // SIDE, math.ceil(min(bottom, height) / SIDE)):
        for column in range(int(left) // SIDE, math.ceil(min(right, width) / SIDE)):
            inside = masks(corners - np.array([column * SIDE, row * SIDE]))
            if not inside.any():
                continue
            pixels = [dab_density(image.pixels(level, column, row)) for image in (virtual, other)]
            shape = tuple(min(sides) for sides in zip(*(values.shape for values in pixels), strict=True))
            inside = inside[: shape[0], : shape[1]]
            a, b = (values[: shape[0], : shape[1]][inside].astype(np.float64) for values in pixels)
            moments += [len(a), a.sum(), b.sum(), (a * a).sum(), (b * b).sum(), (a * b).sum()]
            brown_a, brown_b = a >= DAB_THRESHOLD, b >= DAB_THRESHOLD
            both, one, two = both + int((brown_a & brown_b).sum()), one + int(brown_a.sum()), two + int(brown_b.sum())
    count, sum_a, sum_b, square_a, square_b, product = moments
    spread = (square_a - sum_a**2 / max(count, 1)) * (square_b - sum_b**2 / max(count, 1))
    return {
        "dice": 2 * both / (one + two) if one + two else None,
        "virtual_share": one / count if count else None,
        "other_share": two / count if count else None,
        "correlation": float((product - sum_a * sum_b / count) / math.sqrt(spread))
        if count and spread > 1e-9
        else None,
    }
