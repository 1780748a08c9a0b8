"""The colours in which stains are drawn: as light on black, and as lines on white or on tissue."""

from __future__ import annotations

__all__ = ["NUCLEI_COLOUR", "STAIN_COLOURS", "colours_of"]

NUCLEI_COLOUR = "#4b6bff"
STAIN_COLOURS = (
    ("#00e05a", "#00702d"),
    ("#ff4fd8", "#a3007c"),
    ("#ffb000", "#8a5a00"),
    ("#00d8e8", "#00697a"),
    ("#ff5a4f", "#b3261e"),
    ("#c0a0ff", "#5b2ec9"),
)
"""Per stain: on black, and for outlines on white or on tissue (contrast with white at least 4.5)."""


def colours_of(number: int) -> tuple[str, str]:
    """The two colours of a result's stain, by its number."""
    return STAIN_COLOURS[number % len(STAIN_COLOURS)]
