"""The numbers of a result, per stain: ``scores.csv``, and ``scores`` in ``run.json``.

Stained cells come from the cell maps. What share of all cells they are needs those that are not stained as well: nuclei
found in the H&E, as evaluation finds them, of which a nucleus is positive if the map's mean over it reaches the
stain's threshold.
Nuclei are counted on all tiles of a small slide and on a random sample of a large one.
"""

from __future__ import annotations

import csv
import io
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from pydantic.dataclasses import dataclass

from staindiffuser.client.contract import ServedStain
from staindiffuser.client.tiling import GridTile, TileGrid
from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.nuclei import label_means, nuclei_of_he
from staindiffuser.imaging.ome_tiff import SIDE
from staindiffuser.imaging.optical_density import he_densities
from staindiffuser.imaging.tissue import TissueMask
from staindiffuser.records import STRICT

__all__ = ["SCORES_FILE", "NucleusCounter", "Scores", "StainScore", "score_stains", "write_scores"]

SCORES_FILE = "scores.csv"
SAMPLE = 400
"""Tiles on which nuclei are counted, if there are more: some ten thousand nuclei, at a bounded cost."""
CONTEXT = 32
"""Of a tile, beyond what it shows, that nuclei are searched with, pixels: more than a nucleus."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StainScore:
    """The numbers of one stain."""

    stain: str
    """Its label."""
    cells: int
    """Stained cells found in the cell map."""
    cells_per_mm2: float | None
    """Of tissue; None without any."""
    positive_area_mm2: float
    """Where the cell map reaches the stain's threshold."""
    positive_area_share: float | None
    """Of the tissue."""
    nuclei: int
    """Found in the H&E of the sampled tiles; with ``--cells-from``, the user's own cells."""
    positive_nuclei: int
    """Of them, those that the cell map calls stained."""
    positive_share: float | None
    """Positive nuclei among all; None if there are none, or they were not counted."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Scores:
    """The numbers of a slide."""

    tissue_area_mm2: float
    nuclei_tiles: int
    """Tiles on which nuclei were counted; 0 if they were not, or are the user's own cells."""
    stains: tuple[StainScore, ...]


class NucleusCounter:
    """Counts nuclei and positive ones as tiles come in, by the row of the result in which they lie; thread-safe."""

    def __init__(
        self,
        grid: TileGrid,
        tiles: Sequence[GridTile],
        stains: Sequence[ServedStain],
        mask: TissueMask,
        mpp: float,
        *,
        saved: Sequence[int] = (),
        first_row: int = 0,
    ) -> None:
        """Choose the tiles.

        Args:
            grid: of the tiles.
            tiles: all that are stained.
            stains: whose maps decide.
            mask: nuclei outside the tissue do not count.
            mpp: pixel size of the tiles, µm.
            saved: counts of the rows before ``first_row``.
            first_row: the row of the result to begin with.
        """
        self._grid, self._stains, self._mask, self._mpp = grid, tuple(stains), mask, mpp
        order = np.random.default_rng(0).permutation(len(tiles))[:SAMPLE].tolist()
        self._chosen = {tiles[number] for number in order}
        self._first_row = first_row
        self._before = np.array(saved or (0,) * (1 + len(self._stains)), np.int64)
        self._rows: dict[int, np.ndarray[tuple[int], np.dtype[np.int64]]] = {}
        self._lock = threading.Lock()

    @property
    def tiles(self) -> int:
        """Tiles on which nuclei are counted."""
        return len(self._chosen)

    def wants(self, tile: GridTile) -> bool:
        """Whether the tile is in the sample."""
        return tile in self._chosen

    def add(self, tile: GridTile, he_TT3: UInt8Array, maps: Mapping[str, UInt8Array]) -> None:
        """Count the nuclei that lie in the central part of a tile.

        Args:
            tile: one of the sample, see :meth:`wants`.
            he_TT3: its H&E.
            maps: its cell maps: per tensor, uint8 [T, T, 1].
        """
        cut = max(0, self._grid.margin - CONTEXT)
        part = np.s_[cut : self._grid.tile - cut, cut : self._grid.tile - cut]
        labels = nuclei_of_he(he_densities(he_TT3[part])[..., 0], self._mpp)
        count = int(labels.max(initial=0))
        if not count:
            return
        y, x = np.mgrid[: labels.shape[0], : labels.shape[1]]
        across = label_means(labels, x) + 0.5 + tile.x + cut
        down = label_means(labels, y) + 0.5 + tile.y + cut
        means = [label_means(labels, maps[stain.cells_tensor][part][..., 0]) for stain in self._stains]
        positive = (mean >= 255 * stain.threshold for mean, stain in zip(means, self._stains, strict=True))
        columns = np.stack([np.ones(count), *positive], axis=-1).astype(np.int64)
        left, top = tile.x + self._grid.margin, tile.y + self._grid.margin
        stride, grid = self._grid.stride, self._grid
        own = (across >= max(0, left)) & (across < min(grid.width, left + stride))
        own &= (down >= max(0, top)) & (down < min(grid.height, top + stride))
        shown = self._mask.shown
        row = np.minimum((down / self._mask.cell[1]).astype(np.intp).clip(0), shown.shape[0] - 1)
        column = np.minimum((across / self._mask.cell[0]).astype(np.intp).clip(0), shown.shape[1] - 1)
        own &= shown[row, column] >= 0.5
        band = (down // SIDE).astype(np.int64)
        with self._lock:
            for number in np.unique(band[own]).tolist():
                if number >= self._first_row:
                    total = columns[own & (band == number)].sum(axis=0)
                    self._rows[number] = self._rows.get(number, np.zeros_like(total)) + total

    def until(self, row: int) -> tuple[int, ...]:
        """Nuclei, and positive ones per stain, of all rows up to this one, which must be complete."""
        with self._lock:
            total = self._before + sum(
                (counts for number, counts in self._rows.items() if number <= row), np.zeros_like(self._before)
            )
        return tuple(total.tolist())


def score_stains(
    stains: Sequence[ServedStain],
    *,
    cells: Mapping[str, int],
    positive_pixels: Mapping[str, int],
    nuclei: Sequence[int],
    nuclei_tiles: int,
    mask: TissueMask,
    mpp: tuple[float, float],
) -> Scores:
    """Put the numbers of a slide together.

    Args:
        stains: the stains.
        cells: per label, cells in the map.
        positive_pixels: per label, pixels of the map that reach the threshold.
        nuclei: all, and positive ones per stain; empty if they were not counted.
        nuclei_tiles: on how many tiles.
        mask: the tissue.
        mpp: pixel size of the maps, µm.
    """
    pixel_mm2 = mpp[0] * mpp[1] / 1e6
    tissue_mm2 = float(mask.tissue.sum()) * mask.cell[0] * mask.cell[1] * pixel_mm2
    rows = []
    for number, stain in enumerate(stains):
        area = positive_pixels.get(stain.label, 0) * pixel_mm2
        count = cells.get(stain.label, 0)
        every, positive = (nuclei[0], nuclei[number + 1]) if nuclei else (0, 0)
        rows.append(
            StainScore(
                stain=stain.label,
                cells=count,
                cells_per_mm2=round(count / tissue_mm2, 2) if tissue_mm2 else None,
                positive_area_mm2=round(area, 6),
                positive_area_share=round(area / tissue_mm2, 6) if tissue_mm2 else None,
                nuclei=every,
                positive_nuclei=positive,
                positive_share=round(positive / every, 6) if every else None,
            )
        )
    return Scores(tissue_area_mm2=round(tissue_mm2, 6), nuclei_tiles=nuclei_tiles, stains=tuple(rows))


def write_scores(folder: Path, slide: str, scores: Scores) -> None:
    """Write ``scores.csv`` into ``folder``: a row per stain; what is unknown is empty."""
    text = io.StringIO()
    rows = [
        {"slide": slide, **vars(score), "tissue_area_mm2": scores.tissue_area_mm2, "nuclei_tiles": scores.nuclei_tiles}
        for score in scores.stains
    ]
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    (folder / SCORES_FILE).write_text(text.getvalue(), encoding="utf-8")
