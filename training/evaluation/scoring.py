"""Stain tiles by any method and score each stain; checkpoints and baselines are evaluated by the same code."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.instances import HALF
from staindiffuser.training.data.targets import load_tile
from staindiffuser.training.errors import DataError
from staindiffuser.training.evaluation.feature_distances import Features, Networks
from staindiffuser.training.evaluation.metrics import StainScore
from staindiffuser.training.evaluation.tile_metrics import Reference, Row, measure_cells, measure_image
from staindiffuser.training.tiles.paired_tiles import PairedTile

__all__ = ["KID_TILES", "ScoredTile", "Stainer", "inner", "score_tiles"]

Stainer = Callable[[UInt8Array, NDArray[np.int64]], Sequence[Mapping[str, UInt8Array]]]
"""H&E uint8 [B, H, W, 3] and seeds [B, 1] → the results of each sampler, named and shaped as ``stain_tiles`` does; cell
maps may be missing."""
KID_TILES = 256
"""KID on our own encoder, the slowest metric, uses at most this many tiles, evenly spread."""
TILE_MULTIPLE = 16
LARGEST_POOL = 8


@dataclass(frozen=True, kw_only=True)
class ScoredTile:
    """A tile with its real and virtual stains."""

    row: PairedTile
    number: int
    """Index in the list of tiles."""
    data: dict[str, UInt8Array]
    """The arrays of ``load_tile``."""
    results: list[dict[str, UInt8Array]]
    """Per sampler ``STAIN_<NAME>`` [H, W, 3] and, if there is one, ``CELLS_<NAME>`` [H, W, 1]."""


def score_tiles(
    stainer: Stainer,
    rows: Sequence[PairedTile],
    *,
    stains: tuple[str, ...],
    samplers: int = 1,
    seed: int = 0,
    batch: int = 4,
    detail: bool = False,
    networks: Networks | None = None,
    margin: int = 0,
    thresholds: Mapping[str, float] | None = None,
    seen: Callable[[ScoredTile], None] | None = None,
) -> list[dict[str, StainScore]]:
    """Stain ``rows`` and score each stain, the tiles of a batch in threads.

    Args:
        samplers: number of results that ``stainer`` returns.
        seed: tile n of the list gets the noise seed ``seed`` + n.
        detail: also compute the slower metrics of edges and cells.
        networks: feature networks for KID, FID and LPIPS.
        margin: width of the border that is stained but not scored, pixels; serving crops it likewise.
        thresholds: by stain, probabilities from which on its map shows a cell; else one half.
        seen: called with each tile, in order, without its margin.

    Returns:
        The scores, per sampler and stain.

    Raises:
        DataError: a tile cannot be read, or has a size that cannot be stained.
    """
    networks, thresholds = networks or Networks(), thresholds or {}
    scores = [{stain: StainScore(detail=detail) for stain in stains} for _ in range(samplers)]
    sampled = {round(index) for index in np.linspace(0, len(rows) - 1, min(len(rows), KID_TILES))}
    # The first set is the real one.
    features = {stain: [Features(networks.features) for _ in range(1 + samplers)] for stain in stains}
    with ThreadPoolExecutor(min(LARGEST_POOL, os.cpu_count() or 1)) as pool:
        for tiles in _batches(stainer, rows, stains, seed, batch, margin, pool):
            jobs = [(tile, stain) for tile in tiles for stain in stains]
            done = pool.map(lambda job: _measure(job[0], job[1], detail, thresholds.get(job[1], HALF)), jobs)
            for (_, stain), measured in zip(jobs, done, strict=True):
                for score, row in zip(scores, measured, strict=True):
                    score[stain].rows.append(row)
            for stain in stains:
                images = [_images(tiles, stain, sampler) for sampler in (None, *range(samplers))]
                for collected, of_set in zip(features[stain], images, strict=True):
                    collected.add(of_set, [tile.number in sampled for tile in tiles])
                if networks.lpips is not None:
                    for score, virtual in zip(scores, images[1:], strict=True):
                        values = networks.lpips(virtual, images[0])
                        for row, value in zip(score[stain].rows[-len(tiles) :], values, strict=True):
                            row |= {"lpips": value, "lpips_tiles": 1.0}
            if seen is not None:
                for tile in tiles:
                    seen(tile)
    for stain, (real, *virtuals) in features.items():
        for score, collected in zip(scores, virtuals, strict=True):
            score[stain].whole |= collected.distances(real)
    return scores


def _batches(
    stainer: Stainer,
    rows: Sequence[PairedTile],
    stains: tuple[str, ...],
    seed: int,
    batch: int,
    margin: int,
    pool: Any,
) -> Iterator[list[ScoredTile]]:
    """The stained tiles in order, without their margin; the tiles of a batch have one size."""
    for start in range(0, len(rows), batch):
        loaded = pool.map(lambda row: _load(row, stains, margin), rows[start : start + batch])
        for _, same_size in groupby(enumerate(loaded, start), key=lambda item: item[1]["he"].shape):
            numbers, data = zip(*same_size, strict=True)
            results = stainer(np.stack([d["he"] for d in data]), np.array(numbers, np.int64)[:, None] + seed)
            yield [
                ScoredTile(
                    row=rows[number],
                    number=number,
                    data=inner(data[i], margin),
                    results=[inner({name: a[i] for name, a in result.items()}, margin) for result in results],
                )
                for i, number in enumerate(numbers)
            ]


def inner(images: Mapping[str, UInt8Array], margin: int) -> dict[str, UInt8Array]:
    """Images [H, W, ...] without ``margin`` pixels of each side."""
    return {name: a[margin : a.shape[0] - margin, margin : a.shape[1] - margin] for name, a in images.items()}


def _load(row: PairedTile, stains: tuple[str, ...], margin: int) -> dict[str, UInt8Array]:
    data = load_tile(row, stains)
    height, width = data["he"].shape[:2]
    if 2 * margin >= min(height, width):
        raise DataError(f"{row.he} has {width} x {height} pixels: a margin of {margin} leaves nothing")
    if height % TILE_MULTIPLE or width % TILE_MULTIPLE:
        raise DataError(
            f"{row.he} has {width} x {height} pixels: width and height must be multiples of {TILE_MULTIPLE}; crop it"
        )
    return data


def _measure(tile: ScoredTile, stain: str, detail: bool, threshold: float) -> list[Row]:
    """What is measured on one stain of a tile, per sampler."""
    reference = Reference(tile.data[stain], tile.data[f"{stain}_mask"], tile.row.mpp, tile.data["he"])
    rows, last, cells_row = [], None, Row()
    for result in tile.results:
        virtual, cells = result[f"STAIN_{stain.upper()}"], result.get(f"CELLS_{stain.upper()}")
        if cells is not None and (last is None or not np.array_equal(cells, last)):
            cells_row, last = measure_cells(cells[..., 0], reference, detail=detail, threshold=threshold), cells
        rows.append(measure_image(virtual, reference, detail=detail) | cells_row)
    return rows


def _images(tiles: Sequence[ScoredTile], stain: str, sampler: int | None) -> UInt8Array:
    """The real images of a batch (sampler None), or those of a sampler, [B, H, W, 3]."""
    if sampler is None:
        return np.stack([tile.data[stain] for tile in tiles])
    return np.stack([tile.results[sampler][f"STAIN_{stain.upper()}"] for tile in tiles])
