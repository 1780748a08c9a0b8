"""Which tiles of a set to look at, and why: each measured against what it should be, or against the rest of the set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from staindiffuser.imaging.optical_density import DAB_THRESHOLD
from staindiffuser.training.check.measure import StainMeasures, TileMeasures
from staindiffuser.training.prepare.quality import LARGEST_SHIFT, LEAST_FIT, LEAST_SHARPNESS
from staindiffuser.training.tiles.tile import PairedTile

__all__ = ["FEWEST", "LEAST_TISSUE", "Suspicion", "find_suspicions"]

LEAST_TISSUE = 0.05
"""Share of a tile below which it is blank."""
FEWEST = 40
"""Tiles below which a tile is not compared with the rest of the set."""
_BETTER = 0.1
"""How much higher the correlation must be when shifted: a chance peak is not."""
_BACKGROUND = DAB_THRESHOLD / 2
"""Mean DAB density outside the positive area from which a tile is suspicious: where a marker was stretched to fill its
range, or the section was not washed, brown lies on everything (ours)."""
_ODD = 3.5
"""Robust deviations of the hue, from which a tile is suspicious: swapped channels reach 4, simulated slides with all
their stains 2.6 (ours)."""
_HUE_NOISE = 0.01
"""Standard deviation of a channel's share of the optical density that any set has (ours)."""
_LEAST_DICE = 0.3
"""Dice of a mask and the brown area below which they hardly overlap (ours)."""
_DISPUTED = 0.02
"""Share of a tile, positive by its mask or by DAB, from which the two are compared."""


@dataclass(frozen=True, kw_only=True)
class Suspicion:
    """Something about a tile that deserves a look."""

    tile: PairedTile
    kind: str
    """``background``, ``blank``, ``blurred``, ``colour``, ``copy``, ``mask`` or ``misaligned``."""
    stain: str | None
    words: str
    """For people."""
    weight: float
    """1 at the threshold; larger is worse."""


def find_suspicions(tiles: Sequence[PairedTile], measures: Sequence[TileMeasures]) -> list[Suspicion]:
    """All suspicions, the worst first."""
    found = [
        suspicion for tile, measured in zip(tiles, measures, strict=True) for suspicion in _of_tile(tile, measured)
    ]
    found += _odd_colours(tiles, measures)
    found += _copies(tiles, measures)
    return sorted(found, key=lambda suspicion: (-suspicion.weight, suspicion.tile.row))


def _of_tile(tile: PairedTile, measured: TileMeasures) -> Iterator[Suspicion]:
    blank = measured.tissue < LEAST_TISSUE
    if not blank:
        yield from _blur(tile, None, measured.sharpness)
    for stain, part in measured.stains.items():
        if not blank:
            yield from _of_stain(tile, stain, part)
        elif part.positive is not None and part.positive > LEAST_TISSUE:
            words = f"{part.positive:.0%} {stain}-positive on glass"
            yield _suspicion(tile, "blank", stain, words, 1 + 10 * part.positive)


def _of_stain(tile: PairedTile, stain: str, part: StainMeasures) -> Iterator[Suspicion]:
    image = part.image
    if image is None or part.positive is None:
        return
    yield from _blur(tile, stain, image.sharpness)
    if image.shift > LARGEST_SHIFT and image.best_correlation > image.correlation + _BETTER:
        words = f"{stain} fits better when shifted by {image.shift:.0f} px"
        yield _suspicion(tile, "misaligned", stain, words, image.shift / LARGEST_SHIFT)
    elif image.correlation < LEAST_FIT:
        words = f"{stain} does not fit the H&E (correlation {image.correlation:.2f})"
        yield _suspicion(tile, "misaligned", stain, words, 1 + 5 * (LEAST_FIT - image.correlation))
    if image.negative_dab > _BACKGROUND:
        words = f"{stain} is brown where it is negative (mean DAB density {image.negative_dab:.2f})"
        yield _suspicion(tile, "background", stain, words, image.negative_dab / _BACKGROUND)
    disputed = max(part.positive, image.dab) > _DISPUTED
    if part.mask_dice is not None and disputed and part.mask_dice < _LEAST_DICE:
        words = f"mask of {stain} covers {part.positive:.1%}, DAB {image.dab:.1%}"
        yield _suspicion(tile, "mask", stain, words, 2 - part.mask_dice / _LEAST_DICE)


def _blur(tile: PairedTile, stain: str | None, sharpness: float) -> Iterator[Suspicion]:
    if sharpness < LEAST_SHARPNESS:
        words = f"{stain or 'H&E'} blurred ({sharpness:.2f})"
        yield _suspicion(tile, "blurred", stain, words, LEAST_SHARPNESS / max(sharpness, 0.02))


def _odd_colours(tiles: Sequence[PairedTile], measures: Sequence[TileMeasures]) -> Iterator[Suspicion]:
    chosen = [number for number, measured in enumerate(measures) if measured.tissue >= LEAST_TISSUE]
    if len(chosen) < FEWEST:
        return
    # How much is absorbed depends on how dense the tissue is; the channels' shares of it do not.
    colours = np.array([measures[number].colour for number in chosen])
    hues = colours / np.maximum(colours.sum(axis=1, keepdims=True), 1e-6)
    away = np.abs(hues - np.median(hues, axis=0))
    spread = 1.4826 * np.median(away, axis=0) + _HUE_NOISE
    for number, deviation in zip(chosen, (away / spread).max(axis=1), strict=True):
        if deviation > _ODD:
            words = f"H&E of an odd colour ({deviation:.0f} deviations)"
            yield _suspicion(tiles[number], "colour", None, words, float(deviation) / _ODD)


def _copies(tiles: Sequence[PairedTile], measures: Sequence[TileMeasures]) -> Iterator[Suspicion]:
    first: dict[str, PairedTile] = {}
    for tile, measured in zip(tiles, measures, strict=True):
        other = first.setdefault(measured.hash, tile)
        if other is not tile and measured.tissue >= LEAST_TISSUE:
            yield _suspicion(tile, "copy", None, f"same H&E as in row {other.row}", 3.0)


def _suspicion(tile: PairedTile, kind: str, stain: str | None, words: str, weight: float) -> Suspicion:
    return Suspicion(tile=tile, kind=kind, stain=stain, words=words, weight=weight)
