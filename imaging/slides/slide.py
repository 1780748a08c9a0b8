"""Slides and tiles as readers of RGB regions, whatever their format.

``open_slide`` chooses: OpenSlide for what it knows (with tifffile decoding the tiles where that gives the same pixels
several times faster), tifffile for OME-TIFF and other TIFFs, Pillow for PNG and JPEG.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import Self

from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.errors import MissingPixelSizeError, SlideError
from staindiffuser.imaging.pixel_size import PixelSize

__all__ = ["Slide", "open_slide"]

_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


class Slide(ABC):
    """An image that is read by regions; safe to read from many threads at once."""

    path: Path
    """The file."""
    format: str
    """What it is and who reads it, such as ``aperio (tifffile)``."""
    mpp: PixelSize | None
    """Width and height of a level-0 pixel, µm; None where the file does not say."""
    level_sizes: tuple[tuple[int, int], ...]
    """(width, height) per level, largest first."""
    exact_levels: tuple[int, ...]
    """Levels whose own pixels ``read`` gives; others may be shifted by part of a pixel."""
    chunk: tuple[int, int]
    """Width and height of what is decoded at once at level 0: aligned reads are cheaper."""

    @abstractmethod
    def read(self, level: int, x: int, y: int, width: int, height: int) -> UInt8Array:
        """A region of a level, uint8 [height, width, 3], in that level's own pixels; it must lie inside.

        Raises:
            SlideError: this part of the file is damaged or missing.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the file."""

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) at level 0."""
        return self.level_sizes[0]

    def pixel_size(self, override: float | None = None, *, option: str = "--mpp") -> PixelSize:
        """The pixel size to work with: ``override`` where given, else the file's own.

        Args:
            override: µm.
            option: name of the caller's option for it, for the error's text.

        Raises:
            MissingPixelSizeError: neither is there.
        """
        if override is not None:
            return (override, override)
        if self.mpp is None:
            raise MissingPixelSizeError(
                f"{self.path} does not say how large its pixels are: give µm per pixel as {option}"
            )
        return self.mpp

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def open_slide(path: Path) -> Slide:
    """Open a slide or a tile of any supported format.

    Raises:
        SlideError: it is missing, empty, damaged, or nothing here reads it.
    """
    from staindiffuser.imaging.slides import image_file, openslide_file, tiff_file

    magic = _first_bytes(path)
    vendor = openslide_file.detect(path)
    is_tiff = magic.startswith(_TIFF_MAGIC)
    if vendor is not None and not (is_tiff and vendor == "generic-tiff"):
        return openslide_file.OpenSlideSlide(path)
    if is_tiff:
        # tifffile sees the levels of an OME-TIFF that lie in SubIFDs, OpenSlide does not.
        return tiff_file.TiffSlide(path)
    if magic.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")):
        return image_file.ImageSlide(path)
    raise SlideError(
        f"{path} is no slide or image that can be read: it must be a whole slide that OpenSlide opens, "
        "an OME-TIFF, or a TIFF, PNG or JPEG in 8-bit RGB"
    )


def _first_bytes(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise SlideError(f"{path} is a folder, not a slide: name the slides themselves")
        with path.open("rb") as file:
            magic = file.read(16)
    except FileNotFoundError:
        raise SlideError(f"{path} does not exist") from None
    except OSError as error:
        raise SlideError(f"{path} cannot be read: {error.strerror}") from error
    if not magic:
        raise SlideError(f"{path} is empty")
    return magic
