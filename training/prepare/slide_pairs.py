"""From an H&E slide and its IHC slides to paired tiles: register, refuse or cut, judge every tile, report."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from staindiffuser.files import write_json
from staindiffuser.imaging.glass import glass_percentile
from staindiffuser.training.errors import DataError
from staindiffuser.training.prepare.figures import registration_image, tiles_image
from staindiffuser.training.prepare.quality import Reason
from staindiffuser.training.prepare.records import Record, Records, check_settings
from staindiffuser.training.prepare.regions import FACTOR, Grid, RegionReader
from staindiffuser.training.prepare.registration.landmarks import Points, TargetError, read_pair, target_error
from staindiffuser.training.prepare.registration.overview import overviews
from staindiffuser.training.prepare.registration.register import LEAST_SCORE, Registration, register
from staindiffuser.training.prepare.request import PairRequest
from staindiffuser.training.prepare.sections import Section, SectionImage
from staindiffuser.training.tiles.description import check_described
from staindiffuser.training.tiles.paired_tiles import Split
from staindiffuser.training.tiles.writing import PairedTilesWriter

__all__ = ["PREPARE_JSON", "REPORTS", "PairResult", "StainResult", "prepare_pair"]

PREPARE_JSON = "prepare.json"
REPORTS = "pairs"
"""Folder of the reports and images, in the output."""
LARGEST_TARGET_ERROR = 0.02
"""Median landmark error, as a share of the diagonal, from which a registration is refused whatever its score."""
_COARSER = 1.05
"""Slides whose pixels are larger than the tiles' by more than this lack the detail."""

Progress = Callable[[str, int, int], None]
"""Called with the current activity, how much of it is done, and how much there is."""


@dataclass(frozen=True, kw_only=True)
class StainResult:
    """One IHC slide's registration."""

    file: str
    score: float
    """0.33 to 1 where it is right; see :class:`Registration` for this and the next."""
    correlation: float
    agreement: float
    overlap: float
    rotation: float
    """Degrees."""
    scale: float
    displacement_um: float
    target_error: TargetError | None
    """Where landmarks are given."""
    tile_fit: float | None
    """Median over the kept tiles, correlation of hematoxylin; None where no tile was cut."""
    image: str
    """Relative to the output."""
    refused: str | None
    """Why, or None where the registration is used."""


@dataclass(frozen=True, kw_only=True)
class PairResult:
    """What was done for a slide."""

    slide: str
    split: Split
    output: str
    mpp: float
    tile: int
    stains: Mapping[str, StainResult]
    tiles: int
    """Positions on the H&E's grid, kept or not."""
    kept: int
    dropped: Mapping[str, int]
    """Per reason."""
    written: int
    """Tiles written by this run."""
    seconds: float


def prepare_pair(request: PairRequest, progress: Progress = lambda what, done, total: None) -> PairResult:
    """Register a pair (or one H&E with several stains) and cut it into tiles; an interrupted run is continued.

    Args:
        request: what to do.
        progress: see :data:`Progress`.

    Raises:
        SlideError, MissingPixelSizeError: a slide cannot be read.
        DataError: a slide cannot be used, or a registration cannot be trusted; then no tile is written.
        UsageError: the output cannot be written, or holds other tiles.
    """
    begun = time.perf_counter()
    settings = request.settings()
    landmarks = {stain: read_pair(*files) for stain, files in request.landmarks.items()}
    with contextlib.ExitStack() as stack:
        he = stack.enter_context(Section(request.he, mpp=request.he_mpp, option="--he-mpp"))
        ihc = {
            stain: stack.enter_context(Section(path, mpp=request.ihc_mpp, option="--ihc-mpp"))
            for stain, path in request.ihc.items()
        }
        _check_pixel_sizes(request, {"he": he, **ihc})
        grid = Grid.over(he, mpp=request.mpp, tile=request.tile)
        if not grid.regions():
            raise DataError(
                f"{request.he} is smaller than one tile of {request.tile} pixels: use --tile, or check its mpp"
            )
        check_described(request.output, PREPARE_JSON, _description(request), what="other tiles")
        check_settings(_records_file(request), settings)
        he_plane, planes = overviews(he, ihc, side=request.working_side)
        found: dict[str, Registration] = {}
        for stain, plane in planes.items():
            progress("registering", len(found), len(planes))
            found[stain] = register(he_plane, plane)
        stains = {
            stain: _report(request, stain, he, ihc[stain], he_plane, planes[stain], found[stain], landmarks.get(stain))
            for stain in ihc
        }
        result = PairResult(
            slide=request.name,
            split=request.chosen_split,
            output=str(request.output),
            mpp=request.mpp,
            tile=request.tile,
            stains=stains,
            tiles=grid.columns * grid.rows,
            kept=0,
            dropped={},
            written=0,
            seconds=0.0,
        )
        refused = [stain for stain in stains if stains[stain].refused]
        if not refused and not request.dry_run:
            reader = RegionReader(
                he=he,
                ihc=ihc,
                warps={stain: registration.warp for stain, registration in found.items()},
                glass={name: glass_percentile(plane.rgb) for name, plane in {"he": he_plane, **planes}.items()},
                grid=grid,
                # A registration at about the tiles' own resolution leaves nothing to find.
                refine={stain: plane.mpp > 1.05 * FACTOR * request.mpp for stain, plane in planes.items()},
                least_tissue=request.least_tissue,
            )
            result = _cut(request, settings, reader, grid, he_plane, result, progress)
    result = dataclasses.replace(result, seconds=round(time.perf_counter() - begun, 2))
    write_json(request.output / REPORTS / f"{request.name}.json", {**dataclasses.asdict(result), "settings": settings})
    if refused:
        stain = refused[0]
        raise DataError(
            f"{request.he} and {request.ihc[stain]} ({stain}): {stains[stain].refused}. No tile was written. Look at "
            f"{request.output / stains[stain].image}: do both show the same block, the same way up, at the right mpp?"
        )
    return result


def _check_pixel_sizes(request: PairRequest, sections: Mapping[str, Section]) -> None:
    for name, section in sections.items():
        if max(section.mpp) > _COARSER * request.mpp:
            option = "--he-mpp" if name == "he" else "--ihc-mpp"
            raise DataError(
                f"{section.path} has {max(section.mpp):.4g} µm per pixel, coarser than the tiles' {request.mpp:g}: "
                f"scan it finer, or give {option} if the file is wrong"
            )


def _description(request: PairRequest) -> dict[str, Any]:
    """What must be equal for tiles to share a folder."""
    return {"tile": request.tile, "mpp": request.mpp, "stains": list(request.ihc)}


def _records_file(request: PairRequest) -> Path:
    return request.output / REPORTS / f"{request.name}.regions.jsonl"


def _report(
    request: PairRequest,
    stain: str,
    he: Section,
    ihc: Section,
    he_plane: SectionImage,
    plane: SectionImage,
    found: Registration,
    landmarks: tuple[Points, Points] | None,
) -> StainResult:
    """Judge a registration and draw its figure."""
    error = None
    if landmarks is not None:
        start, true = he.pixels_to_um(landmarks[0]), ihc.pixels_to_um(landmarks[1])
        error = target_error(found.warp.points(start), true, start, float(np.hypot(*ihc.size_um)))
    image = f"{REPORTS}/{request.name}-{stain}.jpg"
    registration_image(
        request.output / image,
        he_plane,
        plane,
        found,
        f"{request.name} {stain}: score {found.score:.2f}, agreement {found.agreement:.0%}",
    )
    return StainResult(
        file=ihc.path.name,
        score=found.score,
        correlation=found.correlation,
        agreement=found.agreement,
        overlap=found.overlap,
        rotation=found.rotation,
        scale=found.scale,
        displacement_um=found.displacement_um,
        target_error=error,
        tile_fit=None,
        image=image,
        refused=_refusal(found, error),
    )


def _refusal(found: Registration, error: TargetError | None) -> str | None:
    if not found.good:
        return f"registration score {found.score:.2f} is below {LEAST_SCORE:.2f}"
    if error is not None and error.median > LARGEST_TARGET_ERROR:
        return (
            f"registration score {found.score:.2f}, but its landmarks are {error.median:.1%} of the diagonal apart "
            f"(allowed: {LARGEST_TARGET_ERROR:.0%})"
        )
    return None


def _cut(
    request: PairRequest,
    settings: Mapping[str, Any],
    reader: RegionReader,
    grid: Grid,
    he_plane: SectionImage,
    result: PairResult,
    progress: Progress,
) -> PairResult:
    """Cut the tiles."""
    name = request.name
    regions = grid.regions()
    written = 0
    # Not before: a pair that was refused, or a dry run, must not decide what the folder is for.
    write_json(request.output / PREPARE_JSON, _description(request))
    patients = request.patient is not None
    with PairedTilesWriter(request.output, tuple(request.ihc), patients=patients, resume=True) as writer:
        records = Records(_records_file(request), settings)
        whole = [
            region
            for region in regions
            if region in records.done
            and all(writer.has(_tile_name(name, position)) for position in records.done[region].kept)
        ]
        missing = [region for region in regions if region not in set(whole)]

        def make(region: tuple[int, int]) -> Record:
            read = reader.read(region)
            for tile in read.tiles:
                if not writer.has(tile_name := _tile_name(name, (tile.column, tile.row))):
                    writer.write_images(tile_name, tile.he, tile.ihc, tile.masks)
            kept = [(tile.column, tile.row) for tile in read.tiles]
            return Record(region=region, kept=kept, dropped=read.dropped, fits=read.fits)

        progress("cutting", len(whole), len(regions))
        for done, record in enumerate(_in_order(make, missing, request.jobs), start=len(whole) + 1):
            for position in record.kept:
                if not writer.has(tile_name := _tile_name(name, position)):
                    writer.add_row(tile_name, slide=name, split=result.split, mpp=request.mpp, patient=request.patient)
                    written += 1
            records.add(record)
            progress("cutting", done, len(regions))
        made = [records.done[region] for region in regions]
        kept = [position for record in made for position in record.kept]
        dropped = {position: reason for record in made for position, reason in record.dropped.items()}
        counts = Counter(dropped.values())
        tiles_image(
            request.output / REPORTS / f"{name}-tiles.jpg",
            he_plane,
            side_um=grid.tile * grid.mpp,
            kept=kept,
            dropped=dropped,
            caption=f"{name}: {len(kept)} tiles kept (green)",
        )
        if not kept:
            reasons = ", ".join(f"{count} {reason.value}" for reason, count in counts.items())
            raise DataError(f"{request.he}: no tile can be used ({reasons}); look at {request.output / REPORTS}")
    fits = {stain: [fit for record in made for fit in record.fits[stain]] for stain in result.stains}
    return dataclasses.replace(
        result,
        stains={
            stain: dataclasses.replace(part, tile_fit=round(float(np.median(fits[stain])), 3))
            for stain, part in result.stains.items()
        },
        kept=len(kept),
        dropped={reason.value: counts[reason] for reason in Reason},
        written=written,
    )


def _tile_name(slide: str, position: tuple[int, int]) -> str:
    return f"{slide}-{position[1]:04d}-{position[0]:04d}"


def _in_order(
    make: Callable[[tuple[int, int]], Record], regions: Sequence[tuple[int, int]], jobs: int
) -> Iterator[Record]:
    """Regions in order, a few at a time: what is read and not yet written must fit in memory."""
    with ThreadPoolExecutor(max_workers=max(1, jobs)) as pool:
        waiting: deque[Future[Record]] = deque()
        try:
            for region in regions:
                waiting.append(pool.submit(make, region))
                if len(waiting) > jobs:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
