"""Import a public data set: read its pairs, resample them to the model's pixel size, cut them into paired tiles."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from staindiffuser.files import write_json
from staindiffuser.imaging.image_files import image_size
from staindiffuser.imaging.pixel_size import check_given
from staindiffuser.parallel import in_order, process_pool
from staindiffuser.training.errors import ConfigError, DataError
from staindiffuser.training.prepare.convert import ImportJob, convert, read_mask
from staindiffuser.training.prepare.layouts import LAYOUTS, Asked, Pair, Panel, find_pairs
from staindiffuser.training.prepare.splits import deal_splits
from staindiffuser.training.tiles.copies import Located, check_no_leak, copies_of_files
from staindiffuser.training.tiles.description import check_described
from staindiffuser.training.tiles.mask_codes import MaskCode, MaskSurvey
from staindiffuser.training.tiles.paired_tiles import Split
from staindiffuser.training.tiles.tile import MODEL_MPP, MPP_TOLERANCE, SPLITS
from staindiffuser.training.tiles.writing import PairedTilesWriter

__all__ = ["IMPORT_JSON", "ImportRequest", "ImportResult", "import_tiles"]

IMPORT_JSON = "import.json"
_CODE_IN_WORDS: dict[MaskCode, str] = {
    "grey": "0 is negative, 255 positive",
    "ones": "0 is negative, 1 positive",
    "labels": "labels, each cell with a value of its own; all of them are positive",
}


@dataclass(frozen=True, kw_only=True)
class ImportRequest:
    """What ``prepare import`` is asked for."""

    layout: str
    source: Path
    output: Path
    asked: Asked = dataclasses.field(default_factory=Asked)
    mpp: float | None = None
    """The source's pixel size, µm; by default its publication's."""
    target_mpp: float = MODEL_MPP
    tile: int = 256
    """Edge of a tile, pixels."""
    val_share: float = 0.1
    """Share of the training slides that become the val split, where the source has none."""
    test_share: float = 0.0
    mask_code: MaskCode | None = None
    """What the values of the source's masks mean; by default told from all of them."""
    resplit: bool = False
    """Forget the source's splits and deal whole slides anew."""
    jobs: int = 1

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ConfigError(f"layout is {self.layout!r}; it must be one of {', '.join(LAYOUTS)}")
        if self.tile < 16 or self.tile % 16:
            raise ConfigError(f"tile is {self.tile}; it must be a positive multiple of 16 pixels")
        if self.jobs < 1:
            raise ConfigError(f"jobs is {self.jobs}; it must be at least 1, or 0 on the command line for one per core")
        if min(self.val_share, self.test_share) < 0 or self.val_share + self.test_share > 0.6:
            raise ConfigError(
                f"val-share {self.val_share} and test-share {self.test_share} must be at least 0 and sum to at most 0.6"
            )
        for name in ("mpp", "target_mpp"):
            check_given(getattr(self, name), name)


@dataclass(frozen=True, kw_only=True)
class ImportResult:
    """What was done, or would be in a dry run."""

    layout: str
    output: str
    stains: tuple[str, ...]
    pairs: int
    tiles: int
    written: int
    """Tiles written by this run."""
    slides: Mapping[str, int]
    """Per split."""
    tiles_per_split: Mapping[str, int]
    source_mpp: float
    mpp: float
    """Of the tiles."""
    notes: tuple[str, ...]
    """What a user should know."""
    seconds: float


def import_tiles(
    request: ImportRequest,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    dry_run: bool = False,
) -> ImportResult:
    """Import what is not there yet.

    Args:
        progress: told the pairs done and to be done.
        dry_run: find the pairs, check sizes and splits, write nothing.

    Raises:
        DataError: a source that cannot be used; the message names the file.
        UsageError: the output cannot be written, or holds other tiles.
    """
    begun = time.perf_counter()
    pairs = find_pairs(request.layout, request.source, request.asked)
    splits = deal_splits(pairs, val_share=request.val_share, test_share=request.test_share, resplit=request.resplit)
    source_mpp = request.mpp or LAYOUTS[request.layout].mpp
    if source_mpp is None:
        raise DataError(
            f"{request.source}: layout {request.layout!r} does not state its pixel size; give --mpp "
            "(scanned at 20x it is about 0.5, at 40x about 0.25)"
        )
    scale = source_mpp / request.target_mpp
    resampled = abs(scale - 1) > MPP_TOLERANCE
    check_no_leak(
        copies_of_files(
            Located(image=pair.he.path, where="", slide=pair.slide, split=splits[pair.slide]) for pair in pairs
        )
    )
    codes = _mask_codes(request, pairs)
    jobs = [_job(pair, splits[pair.slide], request, scale if resampled else 1.0, codes) for pair in pairs]
    _check_names(jobs)
    stains = tuple(pairs[0].stains)
    mpp = request.target_mpp if resampled else source_mpp
    written, rows = 0, Counter[str]()
    for job in jobs:
        rows[splits[job.pair.slide]] += sum(1 for _ in job.tiles())
    tiles = sum(rows.values())
    description = _description(request, source_mpp, stains, jobs, codes)
    check_described(request.output, IMPORT_JSON, description, what="another import")
    if not dry_run:
        patients = request.asked.patient_pattern is not None
        with PairedTilesWriter(request.output, stains, patients=patients, resume=True) as writer:
            write_json(request.output / IMPORT_JSON, description)
            missing = [job for job in jobs if not all(writer.has(name) for name, _, _ in job.tiles())]
            progress(len(jobs) - len(missing), len(jobs))
            for done, job in enumerate(_converted(missing, request.jobs), start=len(jobs) - len(missing) + 1):
                for name, _, _ in job.tiles():
                    if not writer.has(name):
                        writer.add_row(
                            name,
                            slide=job.pair.slide,
                            split=splits[job.pair.slide],
                            mpp=mpp,
                            patient=job.pair.patient,
                        )
                        written += 1
                progress(done, len(jobs))
            tiles = writer.count
    return ImportResult(
        layout=request.layout,
        output=str(request.output),
        stains=stains,
        pairs=len(pairs),
        tiles=tiles,
        written=written,
        slides={split: sum(1 for value in splits.values() if value == split) for split in SPLITS},
        tiles_per_split={split: rows[split] for split in SPLITS},
        source_mpp=source_mpp,
        mpp=mpp,
        notes=_notes(request, pairs, splits, scale if resampled else 1.0, codes),
        seconds=round(time.perf_counter() - begun, 3),
    )


def _job(pair: Pair, split: Split, request: ImportRequest, scale: float, codes: Mapping[str, MaskCode]) -> ImportJob:
    width, height = size = _panel_size(pair.he)
    for column, panel in (*pair.stains.items(), *((f"{stain}_mask", mask) for stain, mask in pair.masks.items())):
        other = _panel_size(panel)
        if other != size:
            raise DataError(
                f"{panel.path}: {column} is {other[0]} x {other[1]} pixels, but its H&E ({pair.he.path}) is "
                f"{width} x {height}"
            )
    scaled = (round(width * scale), round(height * scale))
    if min(scaled) < request.tile:
        raise DataError(
            f"{pair.he.path} is {scaled[0]} x {scaled[1]} pixels of {request.target_mpp:g} µm, smaller than a tile of "
            f"{request.tile}: use --tile, or check --mpp"
        )
    # The split stands in the name: data sets count each split from 0.
    stem = f"{pair.split or split}_{re.sub(r'[^A-Za-z0-9.+]+', '_', pair.name).strip('_')}"
    return ImportJob(pair=pair, stem=stem, output=request.output, size=scaled, tile=request.tile, mask_codes=codes)


def _mask_codes(request: ImportRequest, pairs: Sequence[Pair]) -> dict[str, MaskCode]:
    """What the values of each stain's masks mean, told from all of them."""
    codes: dict[str, MaskCode] = {}
    for stain in pairs[0].masks:
        panels = [pair.masks[stain] for pair in pairs]
        if panels[0].form != "mask":
            continue
        if request.mask_code is not None:
            codes[stain] = request.mask_code
            continue
        survey = MaskSurvey()
        with ThreadPoolExecutor(request.jobs) as threads:
            for mask in threads.map(read_mask, panels):
                survey.add(mask)
        try:
            codes[stain] = survey.code(f"{request.source}: the masks of {stain}")
        except DataError as error:
            raise DataError(f"{error}, or say what they are with --mask-code") from error
    return codes


def _panel_size(panel: Panel) -> tuple[int, int]:
    width, height = image_size(panel.path)
    if panel.of > 1 and (width % panel.of or width <= height):
        raise DataError(f"{panel.path} is {width} x {height} pixels, which cannot be {panel.of} images side by side")
    return width // panel.of, height


def _check_names(jobs: Sequence[ImportJob]) -> None:
    first: dict[str, ImportJob] = {}
    for job in jobs:
        other = first.setdefault(job.stem, job)
        if other is not job:
            raise DataError(f"{job.pair.he.path} and {other.pair.he.path} get the same name {job.stem!r}: rename one")


def _converted(jobs: Sequence[ImportJob], processes: int) -> Iterator[ImportJob]:
    """Convert pairs, in order, on several processes."""
    if processes == 1 or len(jobs) < 4:
        for job in jobs:
            yield convert(job)
        return
    with process_pool(processes) as pool:
        yield from in_order(pool, convert, jobs, ahead=4 * processes)


def _notes(
    request: ImportRequest,
    pairs: Sequence[Pair],
    splits: Mapping[str, Split],
    scale: float,
    codes: Mapping[str, MaskCode],
) -> tuple[str, ...]:
    notes = list(LAYOUTS[request.layout].notes)
    unknown = sum(not pair.slide_known for pair in pairs)
    if unknown:
        notes.append(
            f"{unknown} of {len(pairs)} images do not tell which slide they are from, and each counts as a slide of "
            "its own: the same patient may be on both sides of a split (use --slide-pattern if the names tell)"
        )
    source = set() if request.resplit else {pair.split for pair in pairs}
    for split in ("val", "test"):
        if split not in source and split in splits.values():
            notes.append(f"split {split!r} was taken from the training slides")
        elif split not in splits.values():
            notes.append(f"there is no split {split!r}: --{split}-share takes it from the training slides")
    notes += [f"masks of {stain}: {_CODE_IN_WORDS[code]}" for stain, code in codes.items()]
    if scale > 1:
        notes.append(f"images were enlarged {scale:.2f} times: they hold no detail finer than before")
    return tuple(notes)


def _description(
    request: ImportRequest,
    source_mpp: float,
    stains: Sequence[str],
    jobs: Sequence[ImportJob],
    codes: Mapping[str, MaskCode],
) -> dict[str, Any]:
    """What must be equal for tiles to share a folder."""
    asked = request.asked
    # Where images were added or taken away, slides could be dealt to other splits than before.
    images = sorted([job.stem, job.pair.slide] for job in jobs)
    return {
        "layout": request.layout,
        "source": str(request.source.resolve()),
        "source_mpp": source_mpp,
        "mpp": request.target_mpp,
        "tile": request.tile,
        "stains": list(stains),
        "images": hashlib.sha256(json.dumps(images).encode()).hexdigest(),
        "slide_pattern": asked.slide_pattern.pattern if asked.slide_pattern else None,
        "patient_pattern": asked.patient_pattern.pattern if asked.patient_pattern else None,
        "swap": asked.swap,
        "channels": list(asked.channels),
        "mask_codes": dict(codes),
        "val_share": request.val_share,
        "test_share": request.test_share,
        "resplit": request.resplit,
    }
