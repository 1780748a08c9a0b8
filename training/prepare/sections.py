"""A section on a slide, read by physical position: any rectangle, at any pixel size, in bounded memory.

Positions are micrometres from the slide's top left corner.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
from PIL import Image

from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.pixel_size import check_given
from staindiffuser.imaging.slides import open_slide
from staindiffuser.training.prepare.registration.resampling import WHITE

__all__ = ["Section", "SectionImage"]


_BLOCK_PIXELS = 2**24
"""Source pixels decoded at once."""
_FINE_ENOUGH = 1.05
"""A level counts as fine enough when its pixels are at most this much larger than the wanted ones."""


@dataclass(frozen=True, kw_only=True)
class SectionImage:
    """An image and where it lies on its slide."""

    rgb: UInt8Array
    """uint8 [H, W, 3]."""
    origin: tuple[float, float]
    """(x, y) of its top left corner, µm."""
    mpp: float
    """Pixel size, µm."""


class Section:
    """An open slide; safe to read from many threads.

    Args:
        path: whatever :func:`~staindiffuser.imaging.slides.open_slide` opens.
        mpp: pixel size of level 0, µm; it overrides what the file says.
        option: name of the caller's option for ``mpp``, for the error's text.

    Raises:
        SlideError: it cannot be read.
        MissingPixelSizeError: neither the file nor the caller gives a pixel size.
        UsageError: ``mpp`` is out of range.
    """

    def __init__(self, path: Path, *, mpp: float | None = None, option: str = "--mpp") -> None:
        check_given(mpp, option)
        self.path = path
        self._slide = open_slide(path)
        try:
            self.mpp = self._slide.pixel_size(mpp, option=option)
        except BaseException:
            self._slide.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._slide.close()

    @property
    def size_um(self) -> tuple[float, float]:
        """Width and height, µm."""
        width, height = self._slide.size
        return width * self.mpp[0], height * self.mpp[1]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of level 0, pixels."""
        return self._slide.size

    def pixels_to_um(self, pixels: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Level-0 pixel coordinates [n, 2] (x, y; 0 is the centre of the first pixel) to µm."""
        um: npt.NDArray[np.float64] = (pixels + 0.5) * np.asarray(self.mpp)
        return um

    def read(self, origin: tuple[float, float], size: tuple[int, int], mpp: float) -> SectionImage:
        """Read a rectangle at a pixel size of ``mpp``; what lies off the slide is white.

        Args:
            origin: (x, y) of its top left corner, µm.
            size: (width, height) of the result, pixels.
            mpp: pixel size of the result, µm.

        Raises:
            SlideError: this part of the slide is damaged.
        """
        width, height = size
        out = np.full((height, width, 3), WHITE, np.uint8)
        level = self._level(mpp)
        level_width, level_height = self._slide.level_sizes[level]
        step = (mpp * level_width / self.size_um[0], mpp * level_height / self.size_um[1])  # level px per result px
        start = (origin[0] / mpp * step[0], origin[1] / mpp * step[1])
        # Only result pixels whose centre lies on the slide.
        first = [max(0, math.ceil(-start[axis] / step[axis] - 0.5)) for axis in (0, 1)]
        last = [
            min(size[axis], math.floor((self._slide.level_sizes[level][axis] - start[axis]) / step[axis] - 0.5) + 1)
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
        """A box of a level, in its pixels, resized: bicubic, widened by the reduction, so without aliasing."""
        pad = [math.ceil(2 * max(1.0, side)) + 1 for side in step]
        width, height = self._slide.level_sizes[level]
        x0, y0 = max(0, math.floor(box[0]) - pad[0]), max(0, math.floor(box[1]) - pad[1])
        x1, y1 = min(width, math.ceil(box[2]) + pad[0]), min(height, math.ceil(box[3]) + pad[1])
        source = self._slide.read(level, x0, y0, x1 - x0, y1 - y0)
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

    def _level(self, mpp: float) -> int:
        """The coarsest level whose pixels are not larger than wanted."""
        return max(
            (
                level
                for level, (width, _) in enumerate(self._slide.level_sizes)
                if self.size_um[0] / width <= mpp * _FINE_ENOUGH or level == 0
            ),
            key=lambda level: -self._slide.level_sizes[level][0],
        )
