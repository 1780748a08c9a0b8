"""Import a public data set: read its pairs, resample them to the model's pixel size, cut them into paired tiles."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from staindiffuser.files import write_json
from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.image_files import image_size, read_image, write_png
from staindiffuser.imaging.optical_density import STAIN_MATRIX, coarse_mask, dab_mask
from staindiffuser.imaging.pixel_size import check_given
from staindiffuser.parallel import in_order, process_pool
from staindiffuser.training.errors import ConfigError, DataError
from staindiffuser.training.prepare.layouts import LAYOUTS, Asked, Pair, Panel, find_pairs
from staindiffuser.training.tiles.description import check_described
from staindiffuser.training.tiles.paired_tiles import Split
from staindiffuser.training.tiles.tile import MODEL_MPP, MPP_TOLERANCE, SPLITS
from staindiffuser.training.tiles.writing import PairedTilesWriter

__all__ = ["IMPORT_JSON", "ImportRequest", "ImportResult", "brightfield", "deal_splits", "grid", "import_tiles"]

IMPORT_JSON = "import.json"
MARKER_DENSITY, NUCLEI_DENSITY = 1.0, 0.5
"""Optical densities that full-scale fluorescence is drawn with (ours)."""


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
    """What was done, or, in a dry run, would be."""

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


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One pair with all that a process needs to convert it."""

    pair: Pair
    stem: str
    output: Path
    size: tuple[int, int]
    """Of the images after resampling, pixels."""
    tile: int

    def tiles(self) -> Iterator[tuple[str, int, int]]:
        """Name, left and top of each tile."""
        width, height = self.size
        for row, top in enumerate(grid(height, self.tile)):
            for column, left in enumerate(grid(width, self.tile)):
                yield f"{self.stem}-{row}-{column}", left, top


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
    jobs = [_job(pair, splits[pair.slide], request, scale if resampled else 1.0) for pair in pairs]
    _check_names(jobs)
    stains = tuple(pairs[0].stains)
    mpp = request.target_mpp if resampled else source_mpp
    written, rows = 0, Counter[str]()
    for job in jobs:
        rows[splits[job.pair.slide]] += sum(1 for _ in job.tiles())
    tiles = sum(rows.values())
    description = _description(request, source_mpp, stains, jobs)
    check_described(request.output, IMPORT_JSON, description, what="another import")
    if not dry_run:
        with PairedTilesWriter(request.output, stains, resume=True) as writer:
            write_json(request.output / IMPORT_JSON, description)
            missing = [job for job in jobs if not all(writer.has(name) for name, _, _ in job.tiles())]
            progress(len(jobs) - len(missing), len(jobs))
            for done, job in enumerate(_converted(missing, request.jobs), start=len(jobs) - len(missing) + 1):
                for name, _, _ in job.tiles():
                    if not writer.has(name):
                        writer.add_row(name, slide=job.pair.slide, split=splits[job.pair.slide], mpp=mpp)
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
        notes=_notes(request, pairs, splits, scale if resampled else 1.0),
        seconds=round(time.perf_counter() - begun, 3),
    )


def deal_splits(
    pairs: Sequence[Pair], *, val_share: float, test_share: float, resplit: bool = False
) -> dict[str, Split]:
    """Each slide's split: the source's, and where it has no val (or test), a share of its training slides.

    Slides are dealt by the hash of their name: the same slides on every machine.

    Raises:
        DataError: a slide is in two splits, or there are too few slides to deal.
    """
    splits: dict[str, Split] = {}
    first: dict[str, Pair] = {}
    for pair in pairs:
        split: Split = "train" if resplit or pair.split is None else pair.split
        other = first.setdefault(pair.slide, pair)
        if splits.setdefault(pair.slide, split) != split:
            raise DataError(
                f"{pair.he.path}: slide {pair.slide!r} is in split {split!r} here and in {splits[pair.slide]!r} with "
                f"{other.he.path}; use --resplit to deal whole slides anew, or --slide-pattern if it is another slide"
            )
    train = [slide for slide, split in splits.items() if split == "train"]
    train.sort(key=lambda slide: hashlib.sha256(slide.encode()).digest())
    count = len(train)
    wanted: tuple[tuple[Split, float], ...] = (("val", val_share), ("test", test_share))
    for split, share in wanted:
        if share > 0 and split not in splits.values():
            take = max(1, round(share * count))
            if take >= len(train):
                raise DataError(
                    f"{pairs[0].he.path.parent}: too few slides ({count}) to take {split!r} from: all tiles of a slide "
                    f"belong to one split; add slides, or use --{split}-share 0"
                )
            splits.update(dict.fromkeys(train[:take], split))
            del train[:take]
    return splits


def grid(length: int, tile: int) -> list[int]:
    """Where tiles start along an edge: evenly spread from end to end, with as little overlap or gap as it takes."""
    count = max(1, round(length / tile))
    if count == 1:
        return [(length - tile) // 2]
    return [round(index * (length - tile) / (count - 1)) for index in range(count)]


def _job(pair: Pair, split: Split, request: ImportRequest, scale: float) -> _Job:
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
    return _Job(pair=pair, stem=stem, output=request.output, size=scaled, tile=request.tile)


def _panel_size(panel: Panel) -> tuple[int, int]:
    width, height = image_size(panel.path)
    if panel.of > 1 and (width % panel.of or width <= height):
        raise DataError(f"{panel.path} is {width} x {height} pixels, which {panel.of} images side by side cannot be")
    return width // panel.of, height


def _check_names(jobs: Sequence[_Job]) -> None:
    first: dict[str, _Job] = {}
    for job in jobs:
        other = first.setdefault(job.stem, job)
        if other is not job:
            raise DataError(f"{job.pair.he.path} and {other.pair.he.path} get the same name {job.stem!r}: rename one")


def _converted(jobs: Sequence[_Job], processes: int) -> Iterator[_Job]:
    """Convert pairs, in order, on several processes."""
    if processes == 1 or len(jobs) < 4:
        for job in jobs:
            yield _convert(job)
        return
    with process_pool(processes) as pool:
        yield from in_order(pool, _convert, jobs, ahead=4 * processes)


def _convert(job: _Job) -> _Job:
    """Read a pair and write its tiles; the rows are the caller's."""
    pair = job.pair
    panels = (pair.he, *pair.stains.values(), *pair.masks.values())
    files = {path: read_image(path) for path in {panel.path for panel in panels}}
    images = {"he": _image(files, pair.he, job.size)}
    for stain, panel in pair.stains.items():
        images[stain] = _image(files, panel, job.size)
        mask = pair.masks.get(stain)
        positive = _positive(files, mask, job.size) if mask else dab_mask(images[stain])
        images[f"{stain}_mask"] = coarse_mask(positive)
    for name, left, top in job.tiles():
        for column, image in images.items():
            window = image[top : top + job.tile, left : left + job.tile]
            write_png(job.output / column / f"{name}.png", np.ascontiguousarray(window))
    return job


def _cut(files: Mapping[Path, UInt8Array], panel: Panel) -> UInt8Array:
    """A panel's pixels: uint8 [H, W, 3]."""
    pixels = files[panel.path]
    width = pixels.shape[1] // panel.of
    return pixels[:, panel.place * width : (panel.place + 1) * width]


def _image(files: Mapping[Path, UInt8Array], panel: Panel, size: tuple[int, int]) -> UInt8Array:
    """A panel as a brightfield image of ``size``: uint8 [H, W, 3]."""
    pixels = _cut(files, panel)
    if panel.form == "fluorescence":
        pixels = brightfield(pixels[..., panel.channels[0]], pixels[..., panel.channels[1]])
    return _resized(pixels, size, Image.Resampling.LANCZOS)


def _positive(files: Mapping[Path, UInt8Array], panel: Panel, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Where a mask's panel is positive: bool [H, W]."""
    pixels = _cut(files, panel).astype(np.int16)
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    if panel.form == "classes":
        positive = (red > 127) & (red > blue) & (red > green)
    else:
        positive = red >= (128 if red.max() > 1 else 1)  # masks of 0 and 1 are common
    share = _resized(np.where(positive, 255, 0).astype(np.uint8), size, Image.Resampling.BOX)
    result: NDArray[np.bool_] = share >= 128
    return result


def _resized(pixels: UInt8Array, size: tuple[int, int], how: Image.Resampling) -> UInt8Array:
    """Pillow's filters widen when they shrink an image, so nothing aliases."""
    if (pixels.shape[1], pixels.shape[0]) == size:
        return pixels
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize(size, how))


def brightfield(marker: UInt8Array, nuclei: UInt8Array) -> UInt8Array:
    """Fluorescence as an IHC image would show it, by Beer–Lambert: the marker as DAB, the nuclei as hematoxylin.

    Args:
        marker, nuclei: uint8 [H, W]; full scale is drawn with an optical density of 1 and 0.5 (ours).

    Returns:
        uint8 [H, W, 3].
    """
    hematoxylin, dab = STAIN_MATRIX[:2]
    density = (MARKER_DENSITY / 255) * marker[..., None] * dab + (NUCLEI_DENSITY / 255) * nuclei[
        ..., None
    ] * hematoxylin
    image: UInt8Array = np.clip(np.rint(256 * 10.0**-density - 1), 0, 255).astype(np.uint8)
    return image


def _notes(request: ImportRequest, pairs: Sequence[Pair], splits: Mapping[str, Split], scale: float) -> tuple[str, ...]:
    notes = list(LAYOUTS[request.layout].notes)
    unknown = sum(not pair.slide_known for pair in pairs)
    if unknown:
        notes.append(
            f"{unknown} of {len(pairs)} images do not say which slide they are from, and each counts as a slide of "
            "its own: the same patient may be on both sides of a split (--slide-pattern tells, if names do)"
        )
    source = set() if request.resplit else {pair.split for pair in pairs}
    for split in ("val", "test"):
        if split not in source and split in splits.values():
            notes.append(f"split {split!r} was taken from the training slides")
        elif split not in splits.values():
            notes.append(f"there is no split {split!r}: --{split}-share takes it from the training slides")
    if scale > 1:
        notes.append(f"images were enlarged {scale:.2f} times: they hold no detail finer than before")
    return tuple(notes)


def _description(
    request: ImportRequest, source_mpp: float, stains: Sequence[str], jobs: Sequence[_Job]
) -> dict[str, Any]:
    """What must be equal for tiles to belong into one folder."""
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
        "swap": asked.swap,
        "channels": list(asked.channels),
        "val_share": request.val_share,
        "test_share": request.test_share,
        "resplit": request.resplit,
    }
