"""From H&E and fluorescence to paired tiles: thresholds per region first, then tile by tile, in bounded memory."""

from __future__ import annotations

import csv
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import numpy as np

from staindiffuser.files import write_json
from staindiffuser.imaging.arrays import FloatArray
from staindiffuser.imaging.nuclei import find_nuclei
from staindiffuser.imaging.optical_density import he_densities
from staindiffuser.parallel import in_order
from staindiffuser.training.errors import DataError
from staindiffuser.training.prepare.mif.alignment import align, shifted
from staindiffuser.training.prepare.mif.brightfield import brightfield
from staindiffuser.training.prepare.mif.cells import cell_mask
from staindiffuser.training.prepare.mif.fields import Field, Fields, Pixels, TileFolders
from staindiffuser.training.prepare.mif.markers import FAINT, MarkerHistogram, MarkerRule
from staindiffuser.training.prepare.mif.request import MifRequest
from staindiffuser.training.prepare.mif.slides import RegisteredSlides
from staindiffuser.training.prepare.request import split_of
from staindiffuser.training.tiles.description import check_described
from staindiffuser.training.tiles.tile import SPLITS, Split
from staindiffuser.training.tiles.writing import PairedTilesWriter

__all__ = ["MIF_JSON", "REPORTS", "MifResult", "RegionRules", "prepare_mif"]

MIF_JSON = "mif.json"
REPORTS = "mif"
"""Folder of the reports, in the output."""
FIELDS_FOR_RULES = 400
"""At most this many fields of a region are read for its thresholds, evenly spread."""
BRIGHT_NUCLEI = 99.0
"""Percentile of the nuclei's channel that counts as a bright nucleus, over a region."""
NO_NUCLEI = 1.0
"""Level of the nuclei's channel below which even a bright nucleus is none."""

Progress = Callable[[str, int, int], None]
"""Told what is done now, how much of it is done, and how much there is."""


@dataclass(frozen=True, kw_only=True)
class RegionRules:
    """What was decided for a region before its tiles were made."""

    split: Split
    bright_nuclei: float
    """Level of a bright nucleus."""
    markers: Mapping[str, MarkerRule]
    """Per stain."""

    @property
    def left_out(self) -> tuple[str, ...]:
        """Stains that the region's tiles go without; only where they would be learned from, so that a test stays
        whole."""
        return tuple(s for s, rule in self.markers.items() if rule.faint) if self.split == "train" else ()

    @property
    def untold(self) -> bool:
        """Whether that is all of them, so that a tile would say nothing."""
        return len(self.left_out) == len(self.markers)


@dataclass(frozen=True, kw_only=True)
class MifResult:
    """What was done."""

    output: str
    stains: tuple[str, ...]
    fields: int
    kept: int
    misaligned: int
    """Fields dropped, since hematoxylin and nuclei do not agree."""
    empty: int
    """Fields dropped, since there are no nuclei to compare."""
    untold: int
    """Training fields dropped, since every marker is faint there."""
    moved: int
    """Kept fields whose fluorescence was moved by some pixels to fit."""
    written: int
    """Tiles written by this run."""
    correlation: float
    """Median over the kept fields."""
    regions: Mapping[str, RegionRules]
    tiles_per_split: Mapping[str, int]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class _Made:
    """What came of a field."""

    field: Field
    kept: bool
    correlation: float
    shift: tuple[int, int]


def prepare_mif(request: MifRequest, progress: Progress = lambda what, done, total: None) -> MifResult:
    """Make the tiles that are not there yet.

    Raises:
        DataError: the source cannot be used, or nothing of it can be kept.
        UsageError: the output cannot be written, or holds other tiles.
    """
    begun = time.perf_counter()
    splits = _read_splits(request.splits) if request.splits else {}
    check_described(request.output, MIF_JSON, _description(request), what="other tiles")
    source = _open(request)
    try:
        indices = _channel_indices(request, source)
        with ThreadPoolExecutor(request.jobs) as pool:
            regions = _rules(request, source, indices, splits, pool, progress)
            made, written = _cut(request, source, indices, regions, pool, progress)
    finally:
        source.close()
    result = _result(request, regions, made, written, time.perf_counter() - begun)
    _report(request, result, made)
    return result


def _open(request: MifRequest) -> Fields:
    """Folders of tiles, or two slides."""
    if request.he.is_dir() != request.mif.is_dir():
        raise DataError(f"{request.he} and {request.mif}: give two folders of tiles, or two slides")
    if not request.he.is_dir():
        return RegisteredSlides(
            request.he,
            request.mif,
            name=_slide_name(request),
            mpp=request.mpp,
            tile=request.tile,
            he_mpp=request.he_mpp,
            mif_mpp=request.mif_mpp,
            channels=request.channels,
        )
    if not request.channels:
        raise DataError(f"{request.mif}: name the channels of its images in order, as --channels DAPI,CD3")
    if request.he_mpp is None:
        raise DataError(f"{request.he}: give the tiles' pixel size, µm, as --he-mpp")
    return TileFolders(
        request.he,
        request.mif,
        channels=request.channels,
        mpp=request.he_mpp,
        target_mpp=request.mpp,
        region_pattern=request.region_pattern,
        gains=request.gains,
    )


def _slide_name(request: MifRequest) -> str:
    return request.slide or re.sub(r"[^A-Za-z0-9+-]+", "_", request.he.name.split(".")[0]).strip("_-") or "slide"


def _channel_indices(request: MifRequest, source: Fields) -> dict[str, int]:
    """Index of the nuclei's channel (``""``) and of each stain's."""
    indices = {}
    for stain, channel in {"": request.nuclei, **request.markers}.items():
        if channel not in source.channels:
            raise DataError(f"{request.mif} has no channel {channel!r}; it has {', '.join(source.channels)}")
        indices[stain] = source.channels.index(channel)
    return indices


def _rules(
    request: MifRequest,
    source: Fields,
    indices: Mapping[str, int],
    splits: Mapping[str, Split],
    pool: ThreadPoolExecutor,
    progress: Progress,
) -> dict[str, RegionRules]:
    """Read every region once and decide on its thresholds."""
    by_region: dict[str, list[Field]] = {}
    for field in source.fields:
        by_region.setdefault(field.region, []).append(field)
    if missing := sorted(set(by_region) - set(splits)) if splits else []:
        raise DataError(f"{request.splits} has no row for the region {missing[0]}")
    rules: dict[str, RegionRules] = {}
    for done, (region, fields) in enumerate(by_region.items(), start=1):
        step = -(-len(fields) // FIELDS_FOR_RULES)
        histograms = {stain: MarkerHistogram(request.floor) for stain in request.markers}
        nuclei = MarkerHistogram()
        for pixels in in_order(pool, source.read, fields[::step], ahead=request.jobs + 1):
            inner = pixels.channels[pixels.inner]
            nuclei.add(inner[..., indices[""]])
            for stain, histogram in histograms.items():
                histogram.add(inner[..., indices[stain]])
        rules[region] = RegionRules(
            split=splits.get(region) or split_of(region, val_share=request.val_share, test_share=request.test_share),
            bright_nuclei=nuclei.percentile(BRIGHT_NUCLEI),
            markers={stain: histogram.rule() for stain, histogram in histograms.items()},
        )
        progress("measuring", done, len(by_region))
    return rules


def _cut(
    request: MifRequest,
    source: Fields,
    indices: Mapping[str, int],
    regions: Mapping[str, RegionRules],
    pool: ThreadPoolExecutor,
    progress: Progress,
) -> tuple[list[_Made], int]:
    """Make every field that is not there yet; what came of all of them, and how many were written."""
    made: list[_Made] = []
    written = 0
    with PairedTilesWriter(request.output, tuple(request.markers), resume=True) as writer:
        write_json(request.output / MIF_JSON, _description(request))

        def make(field: Field) -> _Made:
            return _make(request, source, indices, regions[field.region], writer, field)

        for done, one in enumerate(in_order(pool, make, source.fields, ahead=request.jobs + 1), start=1):
            made.append(one)
            if one.kept and not writer.has(one.field.name):
                rules = regions[one.field.region]
                writer.add_row(
                    one.field.name,
                    slide=one.field.region,
                    split=rules.split,
                    mpp=request.mpp,
                    without=rules.left_out,
                )
                written += 1
            progress("cutting", done, len(source.fields))
        if all(rules.untold for rules in regions.values()):
            raise DataError(
                f"{request.mif}: no tile can be used; {', '.join(request.markers.values())} was removed with the "
                "background: give channels whose background was not removed, or a lower --floor-removed"
            )
        if not any(one.kept for one in made):
            best = max(one.correlation for one in made)
            raise DataError(
                f"{request.he} and {request.mif}: no tile can be used; hematoxylin and {request.nuclei} correlate by "
                f"at most {best:.2f}: are they the same section, registered, at the right pixel size?"
            )
    return made, written


def _make(
    request: MifRequest,
    source: Fields,
    indices: Mapping[str, int],
    rules: RegionRules,
    writer: PairedTilesWriter,
    field: Field,
) -> _Made:
    """Judge a field and write its images; the row is the caller's."""
    pixels = source.read(field)
    hematoxylin = he_densities(pixels.he)[..., 0]
    dapi = pixels.channels[..., indices[""]]
    if rules.bright_nuclei < NO_NUCLEI:
        return _Made(field=field, kept=False, correlation=0.0, shift=(0, 0))
    found = align(hematoxylin, dapi, request.mpp)
    kept = found.correlation >= request.least_correlation and not rules.untold
    if kept and not writer.has(field.name):
        pixels = Pixels(he=pixels.he, channels=shifted(pixels.channels, found.shift), inner=pixels.inner)
        _write(request, indices, rules, writer, field, pixels)
    return _Made(field=field, kept=kept, correlation=found.correlation, shift=found.shift)


def _write(
    request: MifRequest,
    indices: Mapping[str, int],
    rules: RegionRules,
    writer: PairedTilesWriter,
    field: Field,
    pixels: Pixels,
) -> None:
    nuclei = find_nuclei(pixels.channels[..., indices[""]], request.mpp, bright=rules.bright_nuclei)
    stains, masks = {}, {}
    for stain, rule in rules.markers.items():
        if stain in rules.left_out:
            continue
        marker: FloatArray = pixels.channels[..., indices[stain]]
        stains[stain] = brightfield(pixels.he, rule.dab(marker))[pixels.inner]
        mask = cell_mask(nuclei, rule.positive(marker), request.mpp, cytoplasmic=request.is_cytoplasmic(stain))
        masks[stain] = mask[pixels.inner]
    he = np.ascontiguousarray(pixels.he[pixels.inner])
    writer.write_images(field.name, he, stains, masks, without=rules.left_out)


def _read_splits(path: Path) -> dict[str, Split]:
    """Each region's split."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = {row["region"]: row["split"] for row in csv.DictReader(file)}
    except KeyError as error:
        raise DataError(f"{path} has no column {error}; needed are region and split") from None
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    for region, split in rows.items():
        if split not in SPLITS:
            raise DataError(f"{path}: the split of {region} is {split!r}; it must be one of {', '.join(SPLITS)}")
    return cast("dict[str, Split]", rows)


def _description(request: MifRequest) -> dict[str, object]:
    """What must be equal for tiles to belong into one folder."""
    return {
        "mpp": request.mpp,
        "tile": request.tile,
        "markers": dict(request.markers),
        "nuclei": request.nuclei,
        "cytoplasmic": sorted(filter(request.is_cytoplasmic, request.markers)),
        "floor": asdict(request.floor),
        "faint": FAINT,
        "least_correlation": request.least_correlation,
    }


def _result(
    request: MifRequest, regions: Mapping[str, RegionRules], made: Sequence[_Made], written: int, seconds: float
) -> MifResult:
    kept = [one for one in made if one.kept]
    told = [one for one in made if not regions[one.field.region].untold]
    empty = sum(one.correlation == 0.0 for one in told if not one.kept)
    per_split = Counter(regions[one.field.region].split for one in kept)
    return MifResult(
        output=str(request.output),
        stains=tuple(request.markers),
        fields=len(made),
        kept=len(kept),
        misaligned=len(told) - len(kept) - empty,
        empty=empty,
        untold=len(made) - len(told),
        moved=sum(one.shift != (0, 0) for one in kept),
        written=written,
        correlation=round(float(np.median([one.correlation for one in kept])), 3),
        regions=regions,
        tiles_per_split={split: per_split[split] for split in SPLITS},
        seconds=round(seconds, 1),
    )


def _report(request: MifRequest, result: MifResult, made: Sequence[_Made]) -> None:
    """Write down what was decided: thresholds per region, and each field's alignment."""
    name = request.mif.name if request.mif.is_dir() else _slide_name(request)
    fields = {
        one.field.name: {"kept": one.kept, "correlation": round(one.correlation, 3), "shift": one.shift} for one in made
    }
    write_json(request.output / REPORTS / f"{name}.json", {**asdict(result), "per_field": fields})
