"""Check a folder of paired tiles: everything wrong with it at once, not the first thing only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from staindiffuser.parallel import in_order, process_pool
from staindiffuser.training.check.measure import TileMeasures, measure
from staindiffuser.training.check.suspicions import LEAST_TISSUE, Suspicion, find_suspicions
from staindiffuser.training.errors import DataError
from staindiffuser.training.tiles.copies import check_no_leak, group_copies
from staindiffuser.training.tiles.mask_codes import MaskCode
from staindiffuser.training.tiles.reading import (
    check_mpp,
    check_one_split,
    check_rows_differ,
    located,
    mask_code,
    read_rows,
)
from staindiffuser.training.tiles.tile import SPLITS, TILES_CSV, PairedTile

__all__ = ["CheckReport", "SlideSummary", "StainSummary", "check_tiles"]

Result = TypeVar("Result")
Progress = Callable[[int, int], None]
"""Called with the number of tiles measured and the number of all."""


@dataclass(frozen=True, kw_only=True)
class StainSummary:
    """One stain over the folder."""

    masks: MaskCode | None
    """What the values of its masks mean; None without masks, or where that cannot be told."""
    with_mask: int
    """Tiles that have a mask."""
    with_image: int
    """Tiles that have an image."""
    positive: Mapping[str, float]
    """Per split with tiles, the share of positive pixels."""
    tiles_with_positive: Mapping[str, int]
    """Per split, the number of tiles in which at least 1 % is positive."""
    correlation: float
    """Median over the tiles with tissue and an image, of hematoxylin in H&E and IHC."""


@dataclass(frozen=True, kw_only=True)
class SlideSummary:
    """One slide."""

    slide: str
    patient: str | None
    split: str
    tiles: int
    blank: int
    rgb: tuple[float, float, float]
    """Mean colour of the H&E, grey levels."""
    positive: Mapping[str, float]
    """Per stain of which something is known, the share of positive pixels."""


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What was found."""

    folder: Path
    errors: tuple[str, ...]
    """For these reasons the folder cannot be trained on."""
    tiles: Mapping[str, int]
    """Per split."""
    slides_per_split: Mapping[str, int]
    patients: int
    """0 where the table names none."""
    sizes: Mapping[str, int]
    """Width x height in pixels to the number of tiles."""
    mpp: tuple[float, float]
    """Smallest and largest, µm."""
    blank: int
    stains: Mapping[str, StainSummary]
    slides: tuple[SlideSummary, ...]
    suspicions: tuple[Suspicion, ...]
    """The worst first; a tile may have several."""

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "folder": str(self.folder),
            "errors": list(self.errors),
            "tiles": dict(self.tiles),
            "slides_per_split": dict(self.slides_per_split),
            "patients": self.patients,
            "sizes": dict(self.sizes),
            "mpp": list(self.mpp),
            "blank": self.blank,
            "stains": {stain: _as_dict(part) for stain, part in self.stains.items()},
            "slides": [_as_dict(part) for part in self.slides],
            "suspicions": [
                {
                    "row": part.tile.row,
                    "he": str(part.tile.he.relative_to(self.folder)),
                    "kind": part.kind,
                    "stain": part.stain,
                    "words": part.words,
                    "weight": round(part.weight, 3),
                }
                for part in self.suspicions
            ],
        }


def check_tiles(folder: Path, *, jobs: int = 1, progress: Progress = lambda done, total: None) -> CheckReport:
    """Measure every tile of a folder.

    Args:
        folder: holds ``tiles.csv``.
        jobs: processes.
        progress: see :data:`Progress`.

    Raises:
        DataError: the table cannot be read, or an image that it names.
        ImageError: an image is damaged.
    """
    path = folder / TILES_CSV
    stains, tiles = read_rows(path, check="headers")
    errors: list[str] = []
    _collect(errors, lambda: check_mpp(path, tiles, None))
    _collect(errors, lambda: check_rows_differ(path, tiles))
    _collect(errors, lambda: check_one_split(tiles))
    codes: dict[str, MaskCode] = {}
    for stain in stains:
        code = _collect(errors, partial(mask_code, path, tiles, stain, "pixels"))
        if code is not None:
            codes[stain] = code
    tiles = tuple(replace(tile, mask_codes=codes) for tile in tiles)
    measures = _measured(tiles, jobs, progress)
    hashed = zip((measured.hash for measured in measures), located(tiles), strict=True)
    _collect(errors, lambda: check_no_leak(group_copies(hashed)))
    return CheckReport(
        folder=folder,
        errors=tuple(errors),
        tiles=_per_split(tile.split for tile in tiles),
        slides_per_split=_per_split(split for _, split in {(tile.slide, tile.split) for tile in tiles}),
        patients=len({tile.patient for tile in tiles if tile.patient is not None}),
        sizes=Counter(f"{tile.size[0]} x {tile.size[1]}" for tile in tiles),
        mpp=(min(tile.mpp for tile in tiles), max(tile.mpp for tile in tiles)),
        blank=sum(measured.tissue < LEAST_TISSUE for measured in measures),
        stains={stain: _stain_summary(stain, tiles, measures, codes.get(stain)) for stain in stains},
        slides=_slide_summaries(tiles, measures),
        suspicions=tuple(find_suspicions(tiles, measures)),
    )


def _collect(errors: list[str], check: Callable[[], Result]) -> Result | None:
    try:
        return check()
    except DataError as error:
        errors.append(str(error))
        return None


def _measured(tiles: Sequence[PairedTile], jobs: int, progress: Progress) -> list[TileMeasures]:
    found: list[TileMeasures] = []

    def take(results: Iterable[TileMeasures]) -> None:
        for measured in results:
            found.append(measured)
            progress(len(found), len(tiles))

    if jobs == 1 or len(tiles) < 16:
        take(map(measure, tiles))
    else:
        with process_pool(jobs) as pool:
            take(in_order(pool, measure, tiles, ahead=8 * jobs))
    return found


def _per_split(splits: Iterable[str]) -> dict[str, int]:
    counts = Counter(splits)
    return {split: counts[split] for split in SPLITS}


def _stain_summary(
    stain: str, tiles: Sequence[PairedTile], measures: Sequence[TileMeasures], code: MaskCode | None
) -> StainSummary:
    shares: dict[str, list[float]] = {split: [] for split in SPLITS}
    for tile, measured in zip(tiles, measures, strict=True):
        if (share := measured.stains[stain].positive) is not None:
            shares[tile.split].append(share)
    images = [(part.tissue, image) for part in measures if (image := part.stains[stain].image) is not None]
    fits = [image.correlation for tissue, image in images if tissue >= LEAST_TISSUE]
    return StainSummary(
        masks=code,
        with_mask=sum(tile.masks[stain] is not None for tile in tiles),
        with_image=len(images),
        positive={split: round(float(np.mean(values)), 5) for split, values in shares.items() if values},
        tiles_with_positive={
            split: sum(value >= 0.01 for value in values) for split, values in shares.items() if values
        },
        correlation=round(float(np.median(fits)), 3) if fits else 0.0,
    )


def _slide_summaries(tiles: Sequence[PairedTile], measures: Sequence[TileMeasures]) -> tuple[SlideSummary, ...]:
    by_slide: dict[str, list[int]] = {}
    for number, tile in enumerate(tiles):
        by_slide.setdefault(tile.slide, []).append(number)
    summaries = []
    for slide, numbers in by_slide.items():
        first, own = tiles[numbers[0]], [measures[number] for number in numbers]
        red, green, blue = np.mean([part.rgb for part in own], axis=0).round(1).tolist()
        summaries.append(
            SlideSummary(
                slide=slide,
                patient=first.patient,
                split=first.split,
                tiles=len(own),
                blank=sum(part.tissue < LEAST_TISSUE for part in own),
                rgb=(red, green, blue),
                positive={
                    stain: round(float(np.mean(known)), 5)
                    for stain in first.stains
                    if (known := [share for part in own if (share := part.stains[stain].positive) is not None])
                },
            )
        )
    return tuple(summaries)


def _as_dict(record: StainSummary | SlideSummary) -> dict[str, Any]:
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in vars(record).items()}
