"""What the server says about the quality of each tile: collected over a slide, summarised, and drawn as a map.

Nothing here changes a pixel of the result. A tile is *flagged* where a measure is above the limit that the model
states for it; tiles with next to no tissue are not judged.
"""

from __future__ import annotations

import csv
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydantic.dataclasses import dataclass

from staindiffuser.client.contract import QUALITY, QualityContract, ServedStain
from staindiffuser.client.tiling import GridTile, TileGrid
from staindiffuser.records import STRICT

__all__ = ["QUALITY_CSV", "QUALITY_MAP", "QualityMap", "QualityRecord", "TileScores"]

QUALITY_CSV = "quality.csv"
QUALITY_MAP = "quality.png"
LEAST_TISSUE = 0.05
"""Share of tissue from which a tile is judged."""
WARN_SHARE = 0.2
"""Share of the judged tiles that may be flagged for one reason before a warning is due (ours)."""
MAP_SIDE = 1024
"""Longer side of the map at most, pixels; a tile is a square of at least one."""
WHITE, FINE = (255, 255, 255), (196, 222, 196)
COLOURS = {"unlike": (178, 34, 52), "blur": (240, 160, 48), "clipped": (96, 96, 160), "colour": (150, 40, 140)}
"""Of flagged tiles, the first that applies."""
_ADVICE = {
    "unlike": "unlike the tissue that the model knows",
    "blur": "more blurred than that tissue",
    "clipped": "over- or underexposed",
    "colour": "of a colour that H&E does not have (pen, another stain)",
}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TileScores:
    """The measures of one tile."""

    row: int
    column: int
    values: dict[str, tuple[float, ...]]
    """By output tensor: ``QUALITY`` and ``QUALITY_<NAME>``, in the contract's order."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class QualityRecord:
    """The summary in ``run.json``."""

    reference: str
    """The tissue that ``unlike`` compares with."""
    limits: dict[str, float]
    """Values above which a tile is flagged, by measure."""
    judged: int
    """Tiles that hold tissue."""
    flagged: dict[str, int]
    """Of these the flagged ones, by measure."""
    tiles: dict[str, float]
    """Mean of each measure over the judged tiles."""
    stains: dict[str, dict[str, float]]
    """The same per stain label."""


class QualityMap:
    """The measures of a slide's tiles; thread-safe."""

    def __init__(self, contract: QualityContract, stains: tuple[ServedStain, ...], grid: TileGrid) -> None:
        """Collect nothing yet.

        Args:
            contract: what the model measures.
            stains: those that are stained.
            grid: the slide's tiles.
        """
        self._contract, self._stains, self._grid = contract, stains, grid
        self._scores: dict[tuple[int, int], TileScores] = {}
        self._new: list[TileScores] = []
        self._lock = threading.Lock()

    def add(self, tile: GridTile, outputs: Mapping[str, NDArray[Any]]) -> None:
        """Add a tile's measures from its outputs; other outputs are ignored."""
        values = {
            # Five digits are more than the measures are good for; NaN and infinity cannot be written to JSON.
            name: tuple(float(f"{value:.5g}") for value in np.nan_to_num(array, posinf=1e9, neginf=-1e9).tolist())
            for name, array in outputs.items()
            if name.startswith(QUALITY)
        }
        scores = TileScores(row=tile.row, column=tile.column, values=values)
        with self._lock:
            self._scores[tile.row, tile.column] = scores
            self._new.append(scores)

    def restore(self, scores: Iterable[TileScores]) -> None:
        """Add what an earlier run has measured."""
        with self._lock:
            self._scores |= {(tile.row, tile.column): tile for tile in scores}

    def take(self) -> tuple[TileScores, ...]:
        """What was added since the last call."""
        with self._lock:
            new, self._new = self._new, []
        return tuple(new)

    def record(self) -> QualityRecord:
        """The summary."""
        judged = self._judged()
        flags = self._flags()
        return QualityRecord(
            reference=self._contract.reference,
            limits=dict(self._contract.limits),
            judged=len(judged),
            flagged={
                name: sum(name in flags[tile.row, tile.column] for tile in judged) for name in self._contract.limits
            },
            tiles=_means(self._contract.tile, [tile.values[QUALITY] for tile in judged]),
            stains={
                stain.label: _means(
                    self._contract.stain,
                    [tile.values[stain.quality_tensor] for tile in judged if stain.quality_tensor in tile.values],
                )
                for stain in self._stains
                if self._contract.stain
            },
        )

    def warnings(self) -> tuple[str, ...]:
        """One line for each reason for which more than :data:`WARN_SHARE` of the judged tiles are flagged."""
        record = self.record()
        return tuple(
            f"{count} of {record.judged} tiles with tissue are {_ADVICE.get(name, f'above the limit of {name}')} "
            f"({record.reference}): do not rely on the result there; {QUALITY_MAP} shows where"
            for name, count in record.flagged.items()
            if record.judged and count > WARN_SHARE * record.judged
        )

    def write(self, folder: Path) -> list[str]:
        """Write :data:`QUALITY_CSV` and :data:`QUALITY_MAP`; returns their names."""
        flags = self._flags()
        names = [f"{stain.name}_{measure}" for stain in self._stains for measure in self._contract.stain]
        with (folder / QUALITY_CSV).open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(["row", "column", "x", "y", *self._contract.tile, *names, "flags"])
            for (row, column), scores in sorted(self._scores.items()):
                place = self._grid.at(row, column)
                empty = ("",) * len(self._contract.stain)
                of_stains = [scores.values.get(stain.quality_tensor, empty) for stain in self._stains]
                values = [value for part in (scores.values[QUALITY], *of_stains) for value in part]
                table.writerow([row, column, place.x, place.y, *values, " ".join(flags[row, column])])
        pixels = np.full((self._grid.rows, self._grid.columns, 3), WHITE, np.uint8)
        for tile in self._judged():
            reasons = flags[tile.row, tile.column]
            pixels[tile.row, tile.column] = next((COLOURS[name] for name in COLOURS if name in reasons), FINE)
        factor = max(1, MAP_SIDE // max(pixels.shape[:2]))
        about = PngInfo()
        about.add_text("Description", self._legend())
        image = Image.fromarray(np.repeat(np.repeat(pixels, factor, axis=0), factor, axis=1))
        image.save(folder / QUALITY_MAP, pnginfo=about)
        return [QUALITY_CSV, QUALITY_MAP]

    def _legend(self) -> str:
        limits = "; ".join(f"{name}: above {value:g}" for name, value in self._contract.limits.items())
        colours = (
            "red: unlike the tissue that the model knows; orange: blurred; blue: badly exposed; purple: not H&E's "
            "colours; green: none of these"
        )
        return f"Flags of tiles, {self._grid.stride} px each. {colours}. Limits: {limits}. {self._contract.reference}"

    def _judged(self) -> list[TileScores]:
        tissue = self._contract.tile.index("tissue")
        scores = sorted(self._scores.items())
        return [tile for _, tile in scores if tile.values[QUALITY][tissue] >= LEAST_TISSUE]

    def _flags(self) -> dict[tuple[int, int], list[str]]:
        """Per tile, the measures that are above their limits; none for a tile that is not judged."""
        flags: dict[tuple[int, int], list[str]] = {key: [] for key in self._scores}
        for tile in self._judged():
            values = dict(zip(self._contract.tile, tile.values[QUALITY], strict=True))
            flags[tile.row, tile.column] = [
                name for name, limit in self._contract.limits.items() if values.get(name, 0.0) > limit
            ]
        return flags


def _means(names: tuple[str, ...], rows: list[tuple[float, ...]]) -> dict[str, float]:
    if not rows:
        return {}
    return {name: round(float(mean), 4) for name, mean in zip(names, np.mean(rows, axis=0), strict=True)}
