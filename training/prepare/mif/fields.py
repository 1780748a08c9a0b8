"""Fields of view of H&E and fluorescence on one grid, from folders of tiles or from a pair of registered slides.

Shapes: H and W a field's height and width in pixels, C channels.
"""

from __future__ import annotations

import csv
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray

from staindiffuser.imaging.arrays import FloatArray, UInt8Array
from staindiffuser.imaging.image_files import read_image
from staindiffuser.training.errors import DataError

__all__ = ["Field", "Fields", "Pixels", "TileFolders"]

IMAGES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")


@dataclass(frozen=True, kw_only=True)
class Field:
    """A place, before its pixels are read."""

    name: str
    """Of the tile that it becomes."""
    region: str
    """What thresholds are chosen for as a whole, and what belongs to one split as a whole."""


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """A field's pixels on one grid."""

    he: UInt8Array
    """[H, W, 3]"""
    channels: FloatArray
    """[H, W, C], fluorescence with any stretch undone."""
    inner: tuple[slice, slice]
    """Rows and columns of the tile; what lies around it is context."""


class Fields(ABC):
    """Where fields come from; safe to read from many threads."""

    channels: tuple[str, ...]
    """Names of the fluorescence's channels, in order."""
    fields: Sequence[Field]

    @abstractmethod
    def read(self, field: Field) -> Pixels:
        """A field's pixels.

        Raises:
            DataError: a file is damaged or does not fit its partner.
        """

    def close(self) -> None:  # noqa: B027 - nothing to close by default
        """Close what is open."""


class TileFolders(Fields):
    """A folder of H&E tiles and one of fluorescence, partners having equal names (but for the suffix).

    Args:
        he, mif: the folders. Fluorescence is PNG or TIFF with as many channels as ``channels`` names; a PNG's alpha is
            a channel like the others.
        channels: names of the channels, in order.
        mpp: pixel size of the H&E tiles, µm.
        target_mpp: pixel size to resample to, µm.
        region_pattern: its first group, in a tile's name, is the region; by default a tile is a region of its own.
        gains: CSV with a column ``name`` and columns ``gain_<channel>``: by how much the publisher stretched that
            channel of that tile; it is divided by before anything else, and an empty cell says that the channel is
            dark.

    Raises:
        DataError: folders, partners or gains that cannot be used.
    """

    def __init__(
        self,
        he: Path,
        mif: Path,
        *,
        channels: Sequence[str],
        mpp: float,
        target_mpp: float,
        region_pattern: re.Pattern[str] | None = None,
        gains: Path | None = None,
    ) -> None:
        self.channels = tuple(channels)
        self._scale = mpp / target_mpp
        self._he, self._mif = _images(he), _images(mif)
        for one, other, folder in ((self._he, self._mif, mif), (self._mif, self._he, he)):
            if alone := sorted(set(one) - set(other)):
                raise DataError(f"{one[alone[0]]} has no partner in {folder}")
        self._gains = _read_gains(gains, self.channels, self._he) if gains else {}
        self.fields = tuple(
            Field(name=name, region=_region(self._he[name], region_pattern)) for name in sorted(self._he)
        )

    def read(self, field: Field) -> Pixels:
        """See :meth:`Fields.read`."""
        he = read_image(self._he[field.name])
        raw = _read_channels(self._mif[field.name], len(self.channels))
        gains = self._gains.get(field.name, (1.0,) * len(self.channels))
        restored = raw / np.array([gain or np.inf for gain in gains], np.float32)
        if abs(raw.shape[0] * he.shape[1] / (raw.shape[1] * he.shape[0]) - 1) > 0.02:
            raise DataError(f"{self._mif[field.name]} has another shape than {self._he[field.name]}")
        height, width = (round(side * self._scale) for side in he.shape[:2])
        inner = (slice(0, height // 16 * 16), slice(0, width // 16 * 16))
        if min(height, width) < 16:
            raise DataError(f"{self._he[field.name]} is smaller than 16 pixels of the tiles: check --he-mpp")
        return Pixels(
            he=np.asarray(_resized(he, (width, height)), np.uint8),
            channels=np.asarray(_resized(restored, (width, height)), np.float32),
            inner=inner,
        )


def _resized(image: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """Areas averaged where it shrinks, linear where it grows."""
    if (image.shape[1], image.shape[0]) == size:
        return image
    method = cv2.INTER_AREA if size[0] < image.shape[1] else cv2.INTER_LINEAR
    planes = [
        cv2.resize(np.ascontiguousarray(image[..., c]), size, interpolation=method) for c in range(image.shape[2])
    ]
    return np.stack(planes, axis=-1)


def _images(folder: Path) -> dict[str, Path]:
    """Image files of a folder by name without suffix."""
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder: --he and --mif are two folders of tiles, or two slides")
    files = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in IMAGES}
    if not files:
        raise DataError(f"{folder} holds no images ({', '.join(IMAGES)})")
    return files


def _region(path: Path, pattern: re.Pattern[str] | None) -> str:
    if pattern is None:
        return path.stem
    found = pattern.search(path.stem)
    if not found or not found.group(1):
        raise DataError(f"{path}: --region-pattern {pattern.pattern} finds no region in its name")
    return found.group(1)


def _read_channels(path: Path, count: int) -> FloatArray:
    """Fluorescence as data, float32 [H, W, C]; a PNG's alpha is not transparency here."""
    try:
        if path.suffix.lower() == ".png":
            raw = np.asarray(imagecodecs.png_decode(path.read_bytes()))
        elif path.suffix.lower() in (".tif", ".tiff"):
            raw = np.asarray(tifffile.imread(path))
        else:
            raw = read_image(path)
    except DataError:
        raise
    except Exception as error:  # every codec has exceptions of its own
        raise DataError(f"{path} cannot be read: {' '.join(str(error).split())[:120]}") from error
    if raw.ndim == 2:
        raw = raw[..., None]
    if raw.ndim == 3 and raw.shape[-1] != count and raw.shape[0] == count:
        raw = np.moveaxis(raw, 0, -1)
    if raw.ndim != 3 or raw.shape[-1] != count:
        raise DataError(f"{path} has the shape {raw.shape}, but --channels names {count} channels")
    return raw.astype(np.float32)


def _read_gains(path: Path, channels: Sequence[str], tiles: Mapping[str, Path]) -> dict[str, tuple[float, ...]]:
    """Per tile the gain of each channel; 0 where it is dark."""
    columns = [f"gain_{channel.lower()}" for channel in channels]
    gains: dict[str, tuple[float, ...]] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file):
                gains[row["name"]] = tuple(float(row[column] or 0.0) for column in columns)
    except KeyError as error:
        raise DataError(f"{path} has no column {error}; needed are name, {', '.join(columns)}") from None
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if missing := sorted(set(tiles) - set(gains)):
        raise DataError(f"{path} has no row for the tile {missing[0]}")
    return gains
