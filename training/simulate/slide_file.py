"""Write simulated slides as pyramidal OME-TIFF, in the memory of a row of tiles."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

from staindiffuser.errors import UsageError
from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.ome_tiff import SIDE, Channel, Compose, ImageInfo, PyramidWriter
from staindiffuser.parallel import in_order, process_pool
from staindiffuser.training.errors import ConfigError
from staindiffuser.training.simulate.config import MPP, STAINS, SimulatorConfig
from staindiffuser.training.simulate.slide import SimulatedSlide
from staindiffuser.training.tiles.stain_names import stain_label

__all__ = ["SlideRequest", "ihc_path", "write_slide"]

_SUFFIXES = (".ome.tiff", ".ome.tif", ".tiff", ".tif")
_GLASS = 255
"""Only fills what lies below and to the right of the slide in its last tiles."""

Square = Mapping[str, UInt8Array]
"""Per layer (``he`` or a stain) uint8 [h, w, 3]."""


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
    """Render and write a slide; returns the files, the H&E first.

    Raises:
        UsageError: a file cannot be written.
    """
    files = {"he": request.output}
    if request.ihc:
        files |= {stain: ihc_path(request.output, stain) for stain in STAINS}
    try:
        request.output.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            folder = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix=".simulate-", dir=request.output.parent))
            )
            writers = {
                layer: stack.enter_context(
                    PyramidWriter(folder, request.width, request.height, channels=3, glass=_GLASS)
                )
                for layer in files
            }
            _write_rows(request, writers, progress)
            for layer, file in files.items():
                temporary = folder / f"{layer}.tiff"
                writers[layer].finish(temporary, _info(request, layer))
                temporary.replace(file)
    except OSError as error:
        raise UsageError(f"{request.output} cannot be written: {error.strerror or error}") from error
    return list(files.values())


def _write_rows(
    request: SlideRequest, writers: Mapping[str, PyramidWriter], progress: Callable[[int, int], None]
) -> None:
    rows, columns = writers["he"].rows, writers["he"].columns
    layers = tuple(writers)
    with contextlib.closing(_rendered(request, layers, rows, columns)) as squares, ThreadPoolExecutor() as threads:
        for row in range(rows):
            made: list[Square] = []
            for square in islice(squares, columns):
                made.append(square)
                progress(row * columns + len(made), rows * columns)
            for layer, writer in writers.items():
                writer.write_row(row, _composing([square[layer] for square in made]), threads)


def _composing(tiles: list[UInt8Array]) -> Compose:
    """A row's tiles, asked for by their x."""
    return lambda x, y, width, height: tiles[x // SIDE]


def _rendered(request: SlideRequest, layers: tuple[str, ...], rows: int, columns: int) -> Generator[Square, None, None]:
    """The slide's tiles in reading order."""
    corners = [(column * SIDE, row * SIDE) for row in range(rows) for column in range(columns)]
    render = partial(_render, request, layers)
    if request.jobs == 1 or len(corners) == 1:
        yield from map(render, corners)
        return
    with process_pool(request.jobs) as pool:
        yield from in_order(pool, render, corners, ahead=4 * request.jobs)


def _render(request: SlideRequest, layers: tuple[str, ...], corner: tuple[int, int]) -> Square:
    x, y = corner
    slide = SimulatedSlide(request.seed, request.width, request.height, config=request.config)
    region = (x, y, min(SIDE, request.width - x), min(SIDE, request.height - y))
    # The IHC first: the H&E then comes with it.
    return {
        layer: slide.read(*region) if layer == "he" else slide.read_ihc(layer, *region) for layer in reversed(layers)
    }


def _info(request: SlideRequest, layer: str) -> ImageInfo:
    name = "H&E" if layer == "he" else stain_label(layer)
    return ImageInfo(
        name=f"simulated tissue, {layer}, seed {request.seed}",
        description=f"Simulated tissue, {name}, seed {request.seed}: it means nothing medically.",
        mpp=(MPP, MPP),
        channels=(Channel(name),),
    )
