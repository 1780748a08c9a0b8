"""Scores per slide and how far they spread: the mean of a set hides the slide on which a model fails."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from staindiffuser.files import finite
from staindiffuser.training.evaluation.metrics import StainScore
from staindiffuser.training.tiles.tile import PairedTile

__all__ = ["SlideScore", "Spread", "scores_by_slide", "spread_of"]


@dataclass(frozen=True, kw_only=True)
class SlideScore:
    """One stain on the tiles of one slide."""

    slide: str
    patient: str | None
    tiles: int
    dab_dice: float
    """Pooled over the slide; NaN where neither image has a positive pixel."""

    def figures(self) -> dict[str, Any]:
        """Ready for JSON."""
        figures: dict[str, Any] = finite(vars(self))
        return figures


@dataclass(frozen=True, kw_only=True)
class Spread:
    """DAB-Dice between slides, of those in which it is defined."""

    slides: int
    median: float
    lowest: float
    highest: float
    deviation: float
    """Standard deviation."""

    def line(self) -> str:
        """In words."""
        return f"median {self.median:.3f}, {self.lowest:.3f} to {self.highest:.3f} ({self.slides} slides)"


def scores_by_slide(rows: Sequence[PairedTile], score: StainScore) -> list[SlideScore]:
    """A stain's DAB-Dice on each slide, in the order of the tiles.

    Args:
        rows: the tiles.
        score: their score; its rows are those of ``rows``.
    """
    slides = dict.fromkeys(row.slide for row in rows)
    results = []
    for slide in slides:
        numbers = [number for number, row in enumerate(rows) if row.slide == slide]
        part = StainScore(rows=[score.rows[number] for number in numbers])
        dice = part.metrics()["dab_dice"]
        patient = rows[numbers[0]].patient
        results.append(SlideScore(slide=slide, patient=patient, tiles=len(numbers), dab_dice=dice))
    return results


def spread_of(slides: Sequence[SlideScore]) -> Spread | None:
    """How far slides differ; None if fewer than two have a DAB-Dice."""
    values = [slide.dab_dice for slide in slides if math.isfinite(slide.dab_dice)]
    if len(values) < 2:
        return None
    return Spread(
        slides=len(values),
        median=float(np.median(values)),
        lowest=min(values),
        highest=max(values),
        deviation=float(np.std(values, ddof=1)),
    )
