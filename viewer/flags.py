"""Tiles that the server flagged, where a result has them: what is painted there should not be believed."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from staindiffuser.client.quality import QUALITY_CSV
from staindiffuser.client.run_record import RunRecord

__all__ = ["REASONS", "Flag", "Flags", "read_flags"]

REASONS = {
    "unlike": "unlike the tissue that the model knows",
    "blur": "blurred",
    "clipped": "over- or underexposed",
    "colour": "of a colour that H&E does not have (pen, another stain)",
}
"""What the flags mean; others are shown by their own name."""
_MOST = 0.5


@dataclass(frozen=True, kw_only=True)
class Flag:
    """A flagged tile, in level-0 pixels of the slide."""

    x: float
    y: float
    width: float
    height: float
    reasons: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Flags:
    """The flagged tiles of a result."""

    tiles: tuple[Flag, ...]
    judged: int
    """Tiles with tissue that were looked at."""

    @property
    def share(self) -> float:
        """Share of the tiles that is flagged."""
        return len(self.tiles) / self.judged if self.judged else 0.0

    def summary(self) -> str | None:
        """One line about the slide; None if nothing is flagged."""
        if not self.tiles:
            return None
        counts: dict[str, int] = {}
        for tile in self.tiles:
            for reason in tile.reasons:
                counts[reason] = counts.get(reason, 0) + 1
        parts = ", ".join(f"{count} {REASONS.get(reason, reason)}" for reason, count in counts.items())
        most = "Most of this slide is flagged: do not rely on its scores. " if self.share > _MOST else ""
        return f"{most}{len(self.tiles)} of {self.judged} tiles are flagged ({parts})."


def read_flags(folder: Path, run: RunRecord) -> Flags | None:
    """The flags of a result; None if it has none to read, or they cannot be read."""
    tiles, size = run.tiles, run.result.size
    scale = (run.input.size[0] / size[0], run.input.size[1] / size[1])
    margin = (tiles.side - tiles.stride) // 2
    found = []
    judged = 0
    try:
        with (folder / QUALITY_CSV).open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                judged += 1
                if not (reasons := tuple((row["flags"] or "").split())):
                    continue
                # The part of the tile that shows: its margin belongs to its neighbours.
                left, top = int(row["x"]) + margin, int(row["y"]) + margin
                x0, y0 = max(0, left), max(0, top)
                x1, y1 = min(size[0], left + tiles.stride), min(size[1], top + tiles.stride)
                found.append(
                    Flag(
                        x=x0 * scale[0],
                        y=y0 * scale[1],
                        width=(x1 - x0) * scale[0],
                        height=(y1 - y0) * scale[1],
                        reasons=reasons,
                    )
                )
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        return None
    # Tiles with next to no tissue are in the table, but not judged.
    return Flags(tiles=tuple(found), judged=run.quality.judged if run.quality is not None else judged)
