"""Write simulated slides as tiled pyramidal OME-TIFF, in bounded memory.

The levels of the pyramid are SubIFDs, as OME asks, and also chained by the next-pointers, so that OpenSlide, which does
not look into SubIFDs, sees them too. Level 0 is spooled as encoded tiles and the levels below as raw files, both beside
the output and deleted after.
"""

from __future__ import annotations

import contextlib
import io
import math
import multiprocessing
import struct
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import tifffile
from PIL import Image

from staindiffuser.errors import UsageError
from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.training.errors import ConfigError
from staindiffuser.training.simulate.config import CHUNK, MPP, STAINS, SimulatorConfig
from staindiffuser.training.simulate.folder import one_thread_each
from staindiffuser.training.simulate.slide import SimulatedSlide

__all__ = ["SlideRequest", "ihc_path", "write_slide"]

_QUALITY = 90
_SUFFIXES = (".ome.tiff", ".ome.tif", ".tiff", ".tif")


@dataclass(frozen=True, kw_only=True)
class SlideRequest:
    """What ``simulate slide`` is asked for."""

    output: Path
    """Ends in ``.ome.tiff``, ``.ome.tif``, ``.tiff`` or ``.tif``."""
    width: int
    """Pixels of 0.5 µm."""
    height: int
    seed: int = 0
    ihc: bool = False
    """Also write the true IHC slides, ``<stem>.<stain>.ome.tiff``."""
    jobs: int = 1
    config: SimulatorConfig = field(default_factory=SimulatorConfig)

    def __post_init__(self) -> None:
        if not self.output.name.lower().endswith(_SUFFIXES):
            raise ConfigError(
                f"{self.output.name} cannot be written: a slide's name must end in {', '.join(_SUFFIXES)}"
            )
        if min(self.width, self.height) < 1 or max(self.width, self.height) > 400_000:
            raise ConfigError(f"width {self.width} and height {self.height} must lie between 1 and 400000 pixels")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; it must not be negative")
        if self.jobs < 1:
            raise ConfigError(f"jobs is {self.jobs}; it must be at least 1")


def ihc_path(output: Path, stain: str) -> Path:
    """Where the true IHC of a slide is written."""
    stem = output.name
    for suffix in _SUFFIXES:
        if stem.lower().endswith(suffix):
            return output.with_name(f"{stem[: -len(suffix)]}.{stain}{stem[-len(suffix) :]}")
    raise ConfigError(f"{output.name} must end in {', '.join(_SUFFIXES)}")


def write_slide(request: SlideRequest, progress: Callable[[int, int], None] = lambda done, total: None) -> list[Path]:
    """Render and write a slide; gives the files, the H&E first.

    Raises:
        UsageError: a file cannot be written.
    """
    files = {"he": request.output}
    if request.ihc:
        files |= {stain: ihc_path(request.output, stain) for stain in STAINS}
    columns, rows = -(-request.width // CHUNK), -(-request.height // CHUNK)
    try:
        request.output.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            folder = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix=".simulate-", dir=request.output.parent))
            )
            spools = {
                layer: stack.enter_context(_Spool(folder / layer, request.width, request.height)) for layer in files
            }
            for done, encoded in enumerate(_rendered(request, tuple(files), columns, rows)):
                for layer, (jpeg, small) in encoded.items():
                    spools[layer].append(jpeg, small)
                progress(done + 1, columns * rows)
            for layer, file in files.items():
                temporary = folder / f"{layer}.tiff"
                _write_pyramid(temporary, spools[layer], f"simulated tissue, {layer}, seed {request.seed}")
                temporary.replace(file)
    except OSError as error:
        raise UsageError(f"{request.output} cannot be written: {error.strerror or error}") from error
    return list(files.values())


class _Spool:
    """One layer of a slide on its way into a file: encoded tiles of level 0, raw level 1."""

    def __init__(self, path: Path, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._columns = -(-width // CHUNK)
        self._rows = -(-height // CHUNK)
        self._path = path
        self._file: IO[bytes] = path.with_suffix(".jpegs").open("w+b")
        self._sizes: list[int] = []
        half = CHUNK // 2
        shape = (self._rows * half, self._columns * half, 3)
        self.half: UInt8Array = np.memmap(path.with_suffix(".1"), np.uint8, "w+", shape=shape)

    def __enter__(self) -> _Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, jpeg: bytes, small: UInt8Array) -> None:
        """Take the next square, in reading order."""
        row, column = divmod(len(self._sizes), self._columns)
        half = CHUNK // 2
        self.half[row * half : (row + 1) * half, column * half : (column + 1) * half] = small
        self._file.write(jpeg)
        self._sizes.append(len(jpeg))

    def tiles(self) -> Iterator[bytes]:
        """The encoded tiles of level 0."""
        self._file.seek(0)
        for size in self._sizes:
            yield self._file.read(size)

    def level(self, number: int) -> UInt8Array:
        """Level 1 or deeper, raw, padded to whole tiles."""
        level = self.half
        for depth in range(2, number + 1):
            path = self._path.with_suffix(f".{depth}")
            shape = (level.shape[0] // 2, level.shape[1] // 2, 3)
            if path.exists():
                level = np.memmap(path, np.uint8, "r", shape=shape)
                continue
            smaller = np.memmap(path, np.uint8, "w+", shape=shape)
            band = 2 * CHUNK
            for top in range(0, 2 * shape[0], band):
                smaller[top // 2 : (top + band) // 2] = _halved(
                    level[top : min(top + band, 2 * shape[0]), : 2 * shape[1]]
                )
            level = smaller
        return level


def _halved(image: UInt8Array) -> UInt8Array:
    h, w = image.shape[0] // 2, image.shape[1] // 2
    pooled = image[: 2 * h, : 2 * w].reshape(h, 2, w, 2, 3).astype(np.uint16).sum(axis=(1, 3))
    halved: UInt8Array = ((pooled + 2) >> 2).astype(np.uint8)
    return halved


def _jpeg(image: UInt8Array) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=_QUALITY, subsampling=0)
    return buffer.getvalue()


def _render_row(
    request: SlideRequest, layers: tuple[str, ...], row: int, columns: range
) -> list[dict[str, tuple[bytes, UInt8Array]]]:
    slide = SimulatedSlide(request.seed, request.width, request.height, config=request.config)
    squares = []
    for column in columns:
        encoded = {}
        for layer in reversed(layers):  # the IHC first: the H&E then comes with it
            place = (column * CHUNK, row * CHUNK, CHUNK, CHUNK)
            image = slide.read(*place) if layer == "he" else slide.read_ihc(layer, *place)
            encoded[layer] = (_jpeg(image), _halved(image))
        squares.append(encoded)
    return squares


def _rendered(
    request: SlideRequest, layers: tuple[str, ...], columns: int, rows: int
) -> Iterator[dict[str, tuple[bytes, UInt8Array]]]:
    parts = [(row, range(c, min(c + 16, columns))) for row in range(rows) for c in range(0, columns, 16)]
    if request.jobs == 1 or len(parts) == 1:
        for row, part in parts:
            yield from _render_row(request, layers, row, part)
        return
    with one_thread_each(), ProcessPoolExecutor(request.jobs, multiprocessing.get_context("spawn")) as pool:
        waiting: list[Future[list[dict[str, tuple[bytes, UInt8Array]]]]] = []
        try:
            for row, part in parts:
                waiting.append(pool.submit(_render_row, request, layers, row, part))
                if len(waiting) > 2 * request.jobs:
                    yield from waiting.pop(0).result()
            while waiting:
                yield from waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()


def _write_pyramid(path: Path, spool: _Spool, description: str) -> None:
    # Down to 512 px; three levels at least, unless that would be a postage stamp.
    longer, shorter = max(spool.width, spool.height), min(spool.width, spool.height)
    levels = 1 + max(0, math.ceil(math.log2(longer / 512)))
    levels = max(levels, 3 if shorter >= 256 else 1)
    with tifffile.TiffWriter(path, bigtiff=True, ome=True) as tiff:
        for number in range(levels):
            width, height = max(1, spool.width >> number), max(1, spool.height >> number)
            per_cm = 1e4 / (MPP * (spool.width / width))
            common: dict[str, Any] = {
                "shape": (height, width, 3), "dtype": np.uint8, "tile": (CHUNK, CHUNK), "photometric": "ycbcr",
                "compression": "jpeg", "subsampling": (1, 1),
                "resolution": (per_cm, per_cm), "resolutionunit": "CENTIMETER",
            }  # fmt: skip
            if number == 0:
                metadata = {
                    "axes": "YXS", "Name": description, "PhysicalSizeX": MPP, "PhysicalSizeXUnit": "µm",
                    "PhysicalSizeY": MPP, "PhysicalSizeYUnit": "µm",
                }  # fmt: skip
                tiff.write(spool.tiles(), subifds=levels - 1, metadata=metadata, **common)
            else:
                tiff.write(_tiles(spool.level(number), width, height), subfiletype=1, metadata=None, **common)
    _chain(path)


def _tiles(level: UInt8Array, width: int, height: int) -> Iterator[bytes]:
    for y in range(0, height, CHUNK):
        for x in range(0, width, CHUNK):
            part = level[y : y + CHUNK, x : x + CHUNK]
            part = np.pad(part, ((0, CHUNK - part.shape[0]), (0, CHUNK - part.shape[1]), (0, 0)), mode="edge")
            yield _jpeg(np.ascontiguousarray(part))


def _chain(path: Path) -> None:
    """Point the next-pointer of every directory of a one-image BigTIFF at the following level."""
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        assert isinstance(page, tifffile.TiffPage)
        offsets = [page.offset, *(page.subifds or ())]
    with path.open("r+b") as file:
        for offset, following in zip(offsets, [*offsets[1:], 0], strict=True):
            file.seek(offset)
            (entries,) = struct.unpack("<Q", file.read(8))
            file.seek(offset + 8 + 20 * entries)
            file.write(struct.pack("<Q", following))
