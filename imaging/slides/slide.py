"""The interface of slide readers, and the choice of the reader for a file.

OpenSlide reads the formats it knows, with tifffile decoding the tiles if that gives the same pixels several times
faster; tifffile reads OME-TIFF and other TIFFs, wsidicom DICOM, zarr OME-Zarr, Pillow PNG and JPEG. A reader refuses
what it cannot read faithfully, and says why.
"""

from __future__ import annotations

import functools
import os
import stat
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.errors import MissingPixelSizeError, PixelSizeError, SlideError
from staindiffuser.imaging.image_files import WHITE
from staindiffuser.imaging.pixel_size import SAME_PIXEL_SIZE, PixelSize
from staindiffuser.imaging.slides.kinds import is_dicom, is_slide_folder, is_zarr

__all__ = ["DamagedRegion", "Slide", "open_slide"]

_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_FLAT_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
_SPOTS, _SPOT = 12, 8
"""Regions per axis, and their side in pixels of the reduced level, that are compared with the level above."""
_STEEPEST = 64
"""Steps between levels are 2 or 4, in some files 16 or 32."""
_THREADS = 4
"""Threads that compare levels: what takes the time is decoding."""
_DIFFERENT, _SPOTS_WRONG = 40.0, 2
"""Mean colours this many grey levels apart, in this many regions, are not the same image (ours)."""


@dataclass(frozen=True, order=True)
class DamagedRegion:
    """A part of a slide that could not be decoded and was replaced by white."""

    level: int
    x: int
    """Left edge, pixels of that level."""
    y: int
    """Upper edge, pixels of that level."""
    width: int
    height: int


class Slide(ABC):
    """An image that is read by regions; thread-safe."""

    path: Path
    """The file that was opened."""
    format: str
    """Its format and the library that reads it, such as ``aperio (tifffile)``."""
    mpp: PixelSize | None
    """Width and height of a pixel at level 0, µm; None if the file does not state them."""
    level_sizes: tuple[tuple[int, int], ...]
    """(width, height) per level, largest first."""
    exact_levels: tuple[int, ...]
    """Levels whose own pixels :meth:`read` returns; others may be shifted by part of a pixel."""
    chunk: tuple[int, int]
    """Width and height of the unit of decoding at level 0: aligned reads are cheaper."""
    icc_profile: bytes | None = None
    """The ICC profile of its colours, as the file holds it; :meth:`read` does not apply it."""
    notes: tuple[str, ...] = ()
    """Warnings about the file, one line each."""

    def __init__(self, path: Path, *, allow_damaged: bool = False) -> None:
        """Start reading ``path``; with ``allow_damaged``, parts that cannot be decoded are white and listed."""
        self.path = path
        self._allow_damaged = allow_damaged
        self._damaged: set[DamagedRegion] = set()
        self._lock = threading.Lock()

    @abstractmethod
    def read(self, level: int, x: int, y: int, width: int, height: int) -> UInt8Array:
        """A region of a level, uint8 [height, width, 3], in that level's own pixels; it must lie inside.

        Raises:
            SlideError: this part of the file is damaged or missing.
        """

    def jpeg_side(self, level: int) -> int | None:
        """Side of the square tiles, pixels, that the file holds of a level as JPEG; None if it holds others."""
        return None

    def jpeg(self, level: int, column: int, row: int) -> bytes | None:
        """A tile of a level that has a :meth:`jpeg_side`, as it lies in the file: a JPEG that any decoder reads, of the
        whole tile, also where the image's edge cuts it. None if it is damaged or not stored: :meth:`read` knows more.

        Raises:
            SlideReadError: the disk or network failed.
        """
        return None

    @abstractmethod
    def close(self) -> None:
        """Close the file."""

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) at level 0."""
        return self.level_sizes[0]

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that belongs to the slide."""
        return (self.path,)

    @property
    def damaged(self) -> tuple[DamagedRegion, ...]:
        """The regions that were read so far and could not be decoded; empty unless damage is allowed."""
        with self._lock:
            return tuple(sorted(self._damaged))

    def pixel_size(
        self, override: float | None = None, *, option: str = "--mpp", force: str | None = None
    ) -> PixelSize:
        """The pixel size to work with: ``override`` if given, else the file's own.

        Args:
            override: µm per pixel.
            option: the caller's option for it, named in the error.
            force: the option that would be needed to override a different size in the file; None to always override.

        Raises:
            MissingPixelSizeError: there is neither.
            PixelSizeError: ``override`` differs from the file's own by more than 2 % and ``force`` is needed.
        """
        if override is not None:
            if force is None or self.mpp is None:
                return (override, override)
            if max(abs(own / override - 1) for own in self.mpp) > SAME_PIXEL_SIZE:
                raise PixelSizeError(
                    f"{self.path} states a pixel size of {self.mpp[0]:.4g} µm, not {override:.4g}: "
                    f"omit {option}, or add {force} to override the file"
                )
            return self.mpp
        if self.mpp is None:
            raise MissingPixelSizeError(
                f"{self.path} does not state its pixel size: give it in µm per pixel as {option}"
            )
        return self.mpp

    def add_damaged(self, regions: Iterable[DamagedRegion]) -> None:
        """Remember regions that were found damaged earlier."""
        with self._lock:
            self._damaged.update(regions)

    def _white_if_allowed(self, region: DamagedRegion, error: SlideError) -> UInt8Array:
        """White for a damaged region, which is remembered; raises ``error`` unless damage is allowed."""
        if not self._allow_damaged:
            raise error
        with self._lock:
            self._damaged.add(region)
        return np.full((region.height, region.width, 3), WHITE, dtype=np.uint8)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def open_slide(path: Path, *, allow_damaged: bool = False) -> Slide:
    """Open a slide or a tile of any supported format.

    Args:
        path: the file; for OME-Zarr the folder, for DICOM the folder or any file of the series.
        allow_damaged: read what can be decoded, and list the rest in :attr:`Slide.damaged`.

    Raises:
        SlideError: the file is missing, damaged, unsupported, or cannot be read faithfully.
    """
    slide = _reader(path, allow_damaged=allow_damaged)
    try:
        ignore_wrong_levels(slide)
    except BaseException:
        slide.close()
        raise
    return slide


def ignore_wrong_levels(slide: Slide) -> None:
    """Drop reduced levels that do not show the same image as the level above: some files hold blank ones.

    Compares the mean colours of small regions all over the slide.

    Raises:
        SlideError: a region is damaged.
    """
    for level in range(1, len(slide.level_sizes)):
        (width, height), (reduced_width, reduced_height) = slide.level_sizes[level - 1 : level + 1]
        if abs(height * reduced_width / width - reduced_height) > max(2.0, 0.05 * reduced_height):
            _drop_levels(slide, level, "has another shape than the one above")
            return
        if width > _STEEPEST * reduced_width:  # comparing would read most of the level above; nothing reads this one
            _drop_levels(slide, level, f"is more than {_STEEPEST} times smaller than the one above")
            return
        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
            wrong = sum(pool.map(functools.partial(_differs, slide, level), np.ndindex(_SPOTS, _SPOTS)))
        if wrong >= _SPOTS_WRONG:
            _drop_levels(slide, level, "does not show the same image as the one above")
            return


def _differs(slide: Slide, level: int, spot: tuple[int, ...]) -> bool:
    """Whether a spot of a level has another colour than the same place on the level above."""
    (width, height), (reduced_width, reduced_height) = slide.level_sizes[level - 1 : level + 1]
    side_x, side_y = min(_SPOT, reduced_width), min(_SPOT, reduced_height)
    scale_x, scale_y = width / reduced_width, height / reduced_height
    row, column = spot
    x, y = (reduced_width - side_x) * column // (_SPOTS - 1), (reduced_height - side_y) * row // (_SPOTS - 1)
    left, top = int(x * scale_x), int(y * scale_y)
    right, bottom = min(width, int((x + side_x) * scale_x)), min(height, int((y + side_y) * scale_y))
    reduced = slide.read(level, x, y, side_x, side_y).mean(axis=(0, 1))
    full = slide.read(level - 1, left, top, max(1, right - left), max(1, bottom - top)).mean(axis=(0, 1))
    return bool(np.abs(reduced - full).max() > _DIFFERENT)


def _drop_levels(slide: Slide, first: int, why: str) -> None:
    slide.notes += (f"{slide.path.name}: level {first} {why}: ignored",)
    slide.level_sizes = slide.level_sizes[:first]
    slide.exact_levels = tuple(exact for exact in slide.exact_levels if exact < first)


def _reader(path: Path, *, allow_damaged: bool) -> Slide:
    from staindiffuser.imaging.slides import image_file, openslide_file, tiff_file

    folder = _is_folder(path)
    if folder and is_zarr(path):
        from staindiffuser.imaging.slides.zarr_folder import ZarrSlide

        return ZarrSlide(path, allow_damaged=allow_damaged)
    magic = b"" if folder else _first_bytes(path)
    if folder or is_dicom(path):
        from staindiffuser.imaging.slides.dicom_file import DicomSlide

        return DicomSlide(path, allow_damaged=allow_damaged)
    vendor = openslide_file.detect(path)
    is_tiff = magic.startswith(_TIFF_MAGIC)
    if vendor is not None and not (is_tiff and vendor == "generic-tiff"):
        return openslide_file.OpenSlideSlide(path, allow_damaged=allow_damaged)
    if is_tiff:
        # OpenSlide does not see the levels of an OME-TIFF that lie in SubIFDs.
        return tiff_file.TiffSlide(path, allow_damaged=allow_damaged)
    if magic.startswith(_FLAT_MAGIC):
        return image_file.ImageSlide(path)
    raise SlideError(
        f"{path} is not a supported slide or image: it must be a whole slide that OpenSlide reads, DICOM, OME-Zarr, "
        "OME-TIFF, or a TIFF, PNG or JPEG in 8-bit RGB"
    )


def _is_folder(path: Path) -> bool:
    """Whether the path is a folder that is a slide; raises SlideError for another folder."""
    try:
        if not path.is_dir():
            return False
        if is_slide_folder(path):
            return True
    except OSError as error:
        raise SlideError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError:  # a null byte in the name
        return False
    raise SlideError(f"{path} is a folder, not a slide: name the slides in it")


def _first_bytes(path: Path) -> bytes:
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):  # opening a FIFO would wait for ever
            raise SlideError(f"{path} is not a regular file: slides are read at random positions, copy it to a disk")
        with path.open("rb") as file:
            magic = file.read(16)
    except FileNotFoundError:
        raise SlideError(f"{path} does not exist") from None
    except OSError as error:
        raise SlideError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # a null byte in the name
        raise SlideError(f"{str(path)!r} is not a file name: {error}") from error
    if not magic:
        raise SlideError(f"{path} is empty")
    return magic
