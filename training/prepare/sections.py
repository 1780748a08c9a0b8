"""A section on a slide, read by physical position: any rectangle, at any pixel size, in bounded memory.

Positions are micrometres from the slide's upper left corner. Whole slides are read through OpenSlide, which takes the
nearest finer level of the pyramid; PNG, JPEG and small TIFF through Pillow.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import openslide
from PIL import Image, UnidentifiedImageError

from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.training.errors import DataError
from staindiffuser.training.prepare.registration.resampling import WHITE

__all__ = ["Section", "SectionImage"]


_BLOCK_PIXELS = 2**24
"""Source pixels decoded at once."""
_SMALLEST, _LARGEST = 0.05, 100.0
"""µm per pixel outside of which a file's own resolution is a screen's or a printer's, not a microscope's."""
_SHARP = 1.05
"""A level counts as fine enough when its pixels are at most this much larger than the wanted ones."""


@dataclass(frozen=True, kw_only=True)
class SectionImage:
    """An image and where it lies on its slide."""

    rgb: UInt8Array
    """uint8 [H, W, 3]."""
    origin: tuple[float, float]
    """(x, y) of its upper left corner, µm."""
    mpp: float
    """Pixel size, µm."""


class Section:
    """An open slide; safe to read from many threads.

    Args:
        path: a slide that OpenSlide opens, or an image.
        mpp: pixel size of level 0, µm, for files that do not say; it overrides what the file says.
        option: how the caller's option for ``mpp`` is called, for the error's text.

    Raises:
        DataError: it cannot be read, or its pixel size is not known.
    """

    def __init__(self, path: Path, *, mpp: float | None = None, option: str = "--mpp") -> None:
        self.path = path
        self._slide: openslide.OpenSlide | None = None
        self._image: UInt8Array | None = None
        own = self._open()
        size = own if mpp is None else (mpp, mpp)
        if size is None:
            self.close()
            raise DataError(f"{path} does not say how large its pixels are: give µm per pixel as {option}")
        if not all(math.isfinite(side) and _SMALLEST <= side <= _LARGEST for side in size):
            self.close()
            raise DataError(f"{path}: {option} is {mpp}; it must lie between {_SMALLEST} and {_LARGEST} µm per pixel")
        self.mpp: tuple[float, float] = size
        """Width and height of a level-0 pixel, µm."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._slide is not None:
            self._slide.close()

    @property
    def size_um(self) -> tuple[float, float]:
        """Width and height, µm."""
        width, height = self._levels[0]
        return width * self.mpp[0], height * self.mpp[1]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of level 0, pixels."""
        return self._levels[0]

    def pixels_to_um(self, pixels: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Level-0 pixel coordinates [n, 2] (x, y; 0 is the middle of the first pixel) to µm."""
        um: npt.NDArray[np.float64] = (pixels + 0.5) * np.asarray(self.mpp)
        return um

    def read(self, origin: tuple[float, float], size: tuple[int, int], mpp: float) -> SectionImage:
        """A rectangle at a pixel size of ``mpp``; what lies off the slide is white.

        Args:
            origin: (x, y) of its upper left corner, µm.
            size: (width, height) of the result, pixels.
            mpp: pixel size of the result, µm.

        Raises:
            DataError: this part of the slide is damaged.
        """
        width, height = size
        out = np.full((height, width, 3), WHITE, np.uint8)
        level = self._level(mpp)
        level_width, level_height = self._levels[level]
        step = (mpp * level_width / self.size_um[0], mpp * level_height / self.size_um[1])  # level px per result px
        start = (origin[0] / mpp * step[0], origin[1] / mpp * step[1])
        # Only result pixels whose middle lies on the slide.
        first = [max(0, math.ceil(-start[axis] / step[axis] - 0.5)) for axis in (0, 1)]
        last = [
            min(size[axis], math.floor((self._levels[level][axis] - start[axis]) / step[axis] - 0.5) + 1)
            for axis in (0, 1)
        ]
        side = max(1, int(math.sqrt(_BLOCK_PIXELS / (step[0] * step[1]))))
        for y in range(first[1], last[1], side):
            for x in range(first[0], last[0], side):
                x1, y1 = min(x + side, last[0]), min(y + side, last[1])
                box = (start[0] + x * step[0], start[1] + y * step[1], start[0] + x1 * step[0], start[1] + y1 * step[1])
                out[y:y1, x:x1] = self._resized(level, box, (x1 - x, y1 - y), step)
        return SectionImage(rgb=out, origin=origin, mpp=mpp)

    def _resized(
        self, level: int, box: tuple[float, float, float, float], size: tuple[int, int], step: tuple[float, float]
    ) -> UInt8Array:
        """A box of a level, in its pixels, at another size: bicubic, widened by the reduction, so without aliasing."""
        pad = [math.ceil(2 * max(1.0, side)) + 1 for side in step]
        width, height = self._levels[level]
        x0, y0 = max(0, math.floor(box[0]) - pad[0]), max(0, math.floor(box[1]) - pad[1])
        x1, y1 = min(width, math.ceil(box[2]) + pad[0]), min(height, math.ceil(box[3]) + pad[1])
        source = self._region(level, x0, y0, x1 - x0, y1 - y0)
        inside = (
            max(0.0, box[0] - x0),
            max(0.0, box[1] - y0),
            min(float(x1 - x0), box[2] - x0),
            min(float(y1 - y0), box[3] - y0),
        )
        if size == (round(inside[2] - inside[0]), round(inside[3] - inside[1])) and all(
            abs(edge - round(edge)) < 1e-3 for edge in inside
        ):
            x, y = round(inside[0]), round(inside[1])
            return source[y : y + size[1], x : x + size[0]]
        return np.asarray(Image.fromarray(source).resize(size, Image.Resampling.BICUBIC, box=inside))

    def _region(self, level: int, x: int, y: int, width: int, height: int) -> UInt8Array:
        if self._image is not None:
            return self._image[y : y + height, x : x + width]
        assert self._slide is not None
        scale = self._slide.level_downsamples[level]  # read_region takes level-0 coordinates
        try:
            rgba = self._slide.read_region((round(x * scale), round(y * scale)), level, (width, height))
        except openslide.OpenSlideError as error:
            raise DataError(f"{self.path} is damaged or incomplete: {error}") from error
        return _on_white(rgba)

    def _level(self, mpp: float) -> int:
        """The coarsest level whose pixels are not larger than wanted."""
        return max(
            (
                level
                for level, (width, _) in enumerate(self._levels)
                if self.size_um[0] / width <= mpp * _SHARP or level == 0
            ),
            key=lambda level: -self._levels[level][0],
        )

    def _open(self) -> tuple[float, float] | None:
        """Open the file; its own pixel size, where it gives one."""
        if not self.path.is_file():
            raise DataError(f"{self.path} does not exist" if not self.path.exists() else f"{self.path} is no file")
        try:
            known = openslide.OpenSlide.detect_format(self.path) is not None
        except openslide.OpenSlideError:
            known = False
        if not known:
            return self._open_image()
        try:
            self._slide = openslide.OpenSlide(self.path)
            self._levels = tuple((int(width), int(height)) for width, height in self._slide.level_dimensions)
            properties = dict(self._slide.properties)
        except openslide.OpenSlideError as error:
            raise DataError(f"{self.path} is a damaged or incomplete slide: {error}") from error
        try:
            size = (float(properties["openslide.mpp-x"]), float(properties["openslide.mpp-y"]))
        except (KeyError, ValueError):
            return None
        return _believed(size)

    def _open_image(self) -> tuple[float, float] | None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(self.path) as image:
                    dpi = image.info.get("dpi")
                    self._image = _on_white(image) if "A" in image.getbands() else np.asarray(image.convert("RGB"))
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise DataError(f"{self.path} is too large for a plain image ({error}): make it a tiled TIFF") from error
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
            raise DataError(f"{self.path} cannot be read as a slide or an image: {error}") from error
        self._levels = ((self._image.shape[1], self._image.shape[0]),)
        if not dpi or min(dpi) <= 0:
            return None
        return _believed((25400.0 / float(dpi[0]), 25400.0 / float(dpi[1])))


def _believed(size: tuple[float, float]) -> tuple[float, float] | None:
    """The pixel size that a file states, µm; None for that of a screen, which programs write that do not know it."""
    return size if all(_SMALLEST <= side <= 10.0 for side in size) else None


def _on_white(image: Image.Image) -> UInt8Array:
    """An image with transparency on white, as glass is: uint8 [H, W, 3]."""
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (WHITE, WHITE, WHITE, WHITE))
    return np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))
