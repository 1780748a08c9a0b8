"""One pair of an import: its images resampled to the model's pixel size, cut into tiles and written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from staindiffuser.imaging.arrays import BoolArray, UInt8Array
from staindiffuser.imaging.image_files import read_image, write_png
from staindiffuser.imaging.optical_density import STAIN_MATRIX, coarse_mask, dab_mask, image_of_density
from staindiffuser.training.prepare.layouts import Pair, Panel
from staindiffuser.training.tiles.mask_codes import MaskCode, is_positive

__all__ = ["ImportJob", "brightfield", "convert", "grid", "read_mask"]

MARKER_DENSITY, NUCLEI_DENSITY = 1.0, 0.5
"""Optical densities with which full-scale fluorescence is drawn (ours)."""


@dataclass(frozen=True, kw_only=True)
class ImportJob:
    """One pair with all that a process needs to convert it."""

    pair: Pair
    stem: str
    output: Path
    size: tuple[int, int]
    """Of the images after resampling, pixels."""
    tile: int
    mask_codes: Mapping[str, MaskCode]
    """Per stain with masks in the source, what their values mean; missing for DeepLIIF's classes."""

    def tiles(self) -> Iterator[tuple[str, int, int]]:
        """Name, left and top of each tile."""
        width, height = self.size
        for row, top in enumerate(grid(height, self.tile)):
            for column, left in enumerate(grid(width, self.tile)):
                yield f"{self.stem}-{row}-{column}", left, top


def grid(length: int, tile: int) -> list[int]:
    """Start of each tile along an edge: evenly spread from end to end, with as little overlap or gap as possible."""
    count = max(1, round(length / tile))
    if count == 1:
        return [(length - tile) // 2]
    return [round(index * (length - tile) / (count - 1)) for index in range(count)]


def convert(job: ImportJob) -> ImportJob:
    """Read a pair and write its tiles; the rows are the caller's."""
    pair = job.pair
    files = {path: read_image(path) for path in {panel.path for panel in (pair.he, *pair.stains.values())}}
    images = {"he": _image(_cut(files[pair.he.path], pair.he), pair.he, job.size)}
    for stain, panel in pair.stains.items():
        images[stain] = _image(_cut(files[panel.path], panel), panel, job.size)
        mask = pair.masks.get(stain)
        positive = _positive(mask, job.mask_codes.get(stain), job.size) if mask else dab_mask(images[stain])
        images[f"{stain}_mask"] = coarse_mask(positive)
    for name, left, top in job.tiles():
        for column, image in images.items():
            window = image[top : top + job.tile, left : left + job.tile]
            write_png(job.output / column / f"{name}.png", np.ascontiguousarray(window))
    return job


def read_mask(panel: Panel) -> UInt8Array:
    """A panel of form ``mask``: uint8 [H, W].

    Raises:
        ImageError: it cannot be read.
    """
    return _cut(read_image(panel.path, mode="L"), panel)


def _cut(pixels: UInt8Array, panel: Panel) -> UInt8Array:
    """A panel's part of its file: uint8 [H, W, 3] or [H, W]."""
    width = pixels.shape[1] // panel.of
    return pixels[:, panel.index * width : (panel.index + 1) * width]


def _image(pixels: UInt8Array, panel: Panel, size: tuple[int, int]) -> UInt8Array:
    """A panel as a brightfield image of ``size``: uint8 [H, W, 3]."""
    if panel.form == "fluorescence":
        pixels = brightfield(pixels[..., panel.channels[0]], pixels[..., panel.channels[1]])
    return _resized(pixels, size, Image.Resampling.LANCZOS)


def _positive(panel: Panel, code: MaskCode | None, size: tuple[int, int]) -> BoolArray:
    """Where a mask is positive: bool [H, W]."""
    if code is None:  # DeepLIIF's classes
        red, green, blue = (_cut(read_image(panel.path), panel)[..., channel] for channel in range(3))
        positive: BoolArray = (red > 127) & (red > blue) & (red > green)
    else:
        positive = is_positive(read_mask(panel), code)
    share = _resized(np.where(positive, 255, 0).astype(np.uint8), size, Image.Resampling.BOX)
    result: BoolArray = share >= 128
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
    return image_of_density(density)
