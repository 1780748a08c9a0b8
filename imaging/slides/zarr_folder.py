"""OME-Zarr (NGFF 0.1 to 0.5): a folder of chunks, read with zarr.

A chunk that is not stored has the array's fill value, usually black. It was not scanned, or it was lost: nobody can
tell, so it is read as glass and counted.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.errors import SlideError, SlideReadError
from staindiffuser.imaging.image_files import WHITE
from staindiffuser.imaging.pixel_size import PixelSize, plausible
from staindiffuser.imaging.slides.slide import DamagedRegion, Slide

__all__ = ["ZarrSlide"]

MAX_CHUNK_PIXELS = 2**26
"""A larger chunk is an image that was not cut into chunks: reading a region would decode all of it each time."""
LEAST_STORED = 0.001
"""Share of the chunks below which a folder was not copied whole, or claims a size that it does not have."""
CACHE_BYTES = 2**24
"""Of decoded chunks that are kept: a chunk is often larger than what is read at once."""
_UNITS = {"meter": 1e6, "centimeter": 1e4, "millimeter": 1e3, "micrometer": 1.0, "nanometer": 1e-3, "inch": 25400.0}
_NOT_THE_SLIDE = {"label", "macro", "thumbnail", "barcode"}
_RGB = ["FF0000", "00FF00", "0000FF"]


@dataclass(frozen=True)
class _Image:
    """A multiscale image of the folder."""

    group: Any
    multiscale: dict[str, Any]
    omero: dict[str, Any]

    @property
    def axes(self) -> str:
        """Such as ``tczyx``."""
        axes = self.multiscale.get("axes") or list("tczyx")
        return "".join(str(axis["name"] if isinstance(axis, dict) else axis) for axis in axes)

    @property
    def arrays(self) -> list[Any]:
        """Largest first."""
        return [self.group[dataset["path"]] for dataset in self.multiscale["datasets"]]


class ZarrSlide(Slide):
    """An OME-Zarr image of three 8-bit channels."""

    def __init__(self, path: Path, *, allow_damaged: bool = False) -> None:
        """Choose the largest image that is not a label or macro.

        Raises:
            SlideError: the folder is damaged, or holds no 8-bit RGB image.
        """
        super().__init__(path, allow_damaged=allow_damaged)
        self._cache: OrderedDict[tuple[int, int, int], UInt8Array] = OrderedDict()
        try:
            image = _choose(path)
            self._axes = image.axes
            self._arrays = [self._checked(array) for array in image.arrays]
            self._require_rgb(image)
            self.mpp = _pixel_size(image)
            self._note_missing()
        except SlideError:
            raise
        except Exception as error:  # zarr raises nearly anything for damaged metadata
            raise SlideError(f"{path} is damaged or no OME-Zarr: {_one_line(error)}") from error
        x, y = self._axes.index("x"), self._axes.index("y")
        self.level_sizes = tuple((int(array.shape[x]), int(array.shape[y])) for array in self._arrays)
        if list(self.level_sizes) != sorted(self.level_sizes, reverse=True):
            raise SlideError(f"{path} is damaged: its levels are not in order")
        self.exact_levels = tuple(range(len(self.level_sizes)))
        self.chunk = self._chunk(0)
        self.format = "ome-zarr (zarr)"

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file of the folder."""
        return tuple(sorted(path for path in self.path.rglob("*") if path.is_file()))

    def read(self, level: int, x: int, y: int, width: int, height: int) -> UInt8Array:
        """See :meth:`Slide.read`."""
        (chunk_width, chunk_height), size = self._chunk(level), self.level_sizes[level]
        region = np.empty((height, width, 3), dtype=np.uint8)
        for top in range(y // chunk_height * chunk_height, y + height, chunk_height):
            for left in range(x // chunk_width * chunk_width, x + width, chunk_width):
                right, bottom = min(left + chunk_width, size[0]), min(top + chunk_height, size[1])
                pixels = self._read_chunk(level, left, top, right, bottom)
                x0, x1, y0, y1 = max(x, left), min(x + width, right), max(y, top), min(y + height, bottom)
                region[y0 - y : y1 - y, x0 - x : x1 - x] = pixels[y0 - top : y1 - top, x0 - left : x1 - left]
        return region

    def close(self) -> None:
        """Do nothing: chunks are opened and closed as they are read."""

    def _chunk(self, level: int) -> tuple[int, int]:
        chunks = self._arrays[level].chunks
        return int(chunks[self._axes.index("x")]), int(chunks[self._axes.index("y")])

    def _read_chunk(self, level: int, left: int, top: int, right: int, bottom: int) -> UInt8Array:
        key = (level, left, top)
        with self._lock:
            if (cached := self._cache.get(key)) is not None:
                self._cache.move_to_end(key)
                return cached
        pixels = self._decode(level, left, top, right, bottom)
        with self._lock:
            self._cache[key] = pixels
            if sum(chunk.nbytes for chunk in self._cache.values()) > CACHE_BYTES:
                self._cache.popitem(last=False)
        return pixels

    def _decode(self, level: int, left: int, top: int, right: int, bottom: int) -> UInt8Array:
        array = self._arrays[level]
        part = {"x": slice(left, right), "y": slice(top, bottom), "c": slice(None)}
        try:
            pixels = np.asarray(array[tuple(part.get(axis, 0) for axis in self._axes)])
        except PermissionError as error:
            raise SlideReadError(f"{self.path} cannot be read: {error.strerror or error}") from error
        except Exception as error:  # every codec has its own exception class
            message = SlideError(
                f"{self.path} is damaged: the chunk at ({left}, {top}) of level {level} cannot be decoded: "
                f"{_one_line(error)} (--allow-damaged leaves out such chunks)"
            )
            message.__cause__ = error
            return self._white_if_allowed(DamagedRegion(level, left, top, right - left, bottom - top), message)
        if (pixels == (array.fill_value or 0)).all():
            pixels = np.full_like(pixels, WHITE)
        order = [axis for axis in self._axes if axis in "cyx"]
        return np.ascontiguousarray(pixels.transpose([order.index(axis) for axis in "yxc"]))

    def _checked(self, array: Any) -> Any:
        sizes = dict(zip(self._axes, array.shape, strict=True))
        stack = [f"{size} {axis}" for axis, size in sizes.items() if axis not in "cyx" and size != 1]
        if stack or not {"c", "y", "x"} <= sizes.keys() or sizes["c"] != 3 or array.dtype != np.uint8:
            shape = " × ".join(f"{size} {axis}" for axis, size in sizes.items())
            raise SlideError(f"{self.path} holds {array.dtype}, {shape}: H&E must be one 8-bit RGB image")
        chunks = dict(zip(self._axes, array.chunks, strict=True))
        if chunks["x"] * chunks["y"] > MAX_CHUNK_PIXELS or not sizes["x"] * sizes["y"]:
            raise SlideError(
                f"{self.path} has chunks of {chunks['x']} × {chunks['y']} pixels: cut it into smaller ones"
            )
        return array

    def _require_rgb(self, image: _Image) -> None:
        channels = image.omero.get("channels") or []
        colours = [str(channel.get("color", "")).upper() for channel in channels]
        if colours and "" not in colours and colours != _RGB:
            names = ", ".join(str(channel.get("label", "?")) for channel in channels)
            raise SlideError(
                f"{self.path} holds the channels {names} and not red, green and blue: H&E must be 8-bit RGB"
            )

    def _note_missing(self) -> None:
        array = self._arrays[0]
        if getattr(array, "shards", None) is not None:
            return
        # Not by zarr, which looks for every chunk that there could be.
        files = (path.name for path in (self.path / array.path).rglob("*") if path.is_file())
        stored = sum(not name.startswith(".z") and name != "zarr.json" for name in files)
        if stored < LEAST_STORED * array.nchunks:
            raise SlideError(f"{self.path} is damaged or incomplete: {stored} of {array.nchunks} chunks are stored")
        if (missing := array.nchunks - stored) > 0:
            self.notes += (f"{self.path.name}: {missing} of {array.nchunks} chunks are not stored: taken for glass",)


def _choose(path: Path) -> _Image:
    root = zarr.open_group(path, mode="r")
    images = [image for image in map(_image, [root, *(group for _, group in root.groups())]) if image is not None]
    slides = [
        image
        for image in images
        if not _NOT_THE_SLIDE & set(re.split(r"[\W_]+", str(image.multiscale.get("name", "")).lower()))
    ]
    if not slides:
        raise SlideError(f"{path} holds {'only label or macro images' if images else 'no OME-Zarr image'}")

    def area(image: _Image) -> int:
        shape = dict(zip(image.axes, image.arrays[0].shape, strict=True))
        return int(shape["x"]) * int(shape["y"])

    return max(slides, key=area)


def _image(group: Any) -> _Image | None:
    attributes = dict(group.attrs)
    attributes = attributes.get("ome", attributes)
    multiscales = attributes.get("multiscales")
    return _Image(group, multiscales[0], attributes.get("omero") or {}) if multiscales else None


def _pixel_size(image: _Image) -> PixelSize | None:
    axes = image.multiscale.get("axes") or []
    units = {str(axis["name"]): str(axis.get("unit")) for axis in axes if isinstance(axis, dict)}
    scale = dict.fromkeys(image.axes, 1.0)
    of_level = image.multiscale["datasets"][0].get("coordinateTransformations") or []
    of_all = image.multiscale.get("coordinateTransformations") or []
    stated = [transformation for transformation in [*of_level, *of_all] if "scale" in transformation]
    for transformation in stated:
        for axis, factor in zip(image.axes, transformation["scale"], strict=True):
            scale[axis] *= float(factor)
    if not stated or units.get("x") not in _UNITS or units.get("y") not in _UNITS:
        return None
    return plausible(scale["x"] * _UNITS[units["x"]], scale["y"] * _UNITS[units["y"]])


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
