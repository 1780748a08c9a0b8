"""``combined.ome.tiff``: all stains of a result as channels of one image, as multiplex immunofluorescence is kept.

The first channel is the hematoxylin of the first stain's image, for nuclei; then comes one per stain, its DAB. A value
is 100 × the optical density that colour deconvolution gives the pixel, up to 255; glass is 0. Viewers (QuPath, napari,
Fiji) show each channel in its colour and take names and colours from the OME-XML.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import numpy as np

from staindiffuser.client.cells import BlockRow
from staindiffuser.client.contract import ServedStain
from staindiffuser.imaging.arrays import FloatArray, UInt8Array
from staindiffuser.imaging.ome_tiff import SIDE, Channel, ImageInfo, PyramidWriter, RowState, write_channels
from staindiffuser.imaging.optical_density import dab_density, hematoxylin_density
from staindiffuser.imaging.palette import NUCLEI_COLOUR, colours_of

__all__ = ["COMBINED_FILE", "CombinedFile", "combined_channels"]

COMBINED_FILE = "combined.ome.tiff"
SCALE = 100.0
"""Value of optical density 1."""


class _Density(Protocol):
    def __call__(self, rgb: UInt8Array) -> FloatArray: ...


def _dab(rgb: UInt8Array) -> FloatArray:
    return dab_density(rgb, smoothed=False)  # a Gaussian would show where the file's tiles meet


def combined_channels(stains: Sequence[ServedStain]) -> tuple[Channel, ...]:
    """Names and colours of the channels."""
    dab = [Channel(f"{stain.label} (virtual)", colours_of(number)[0]) for number, stain in enumerate(stains)]
    return Channel("Hematoxylin", NUCLEI_COLOUR), *dab


class CombinedFile:
    """The file, written row by row; use it as a context manager."""

    def __init__(self, folder: Path, size: tuple[int, int], stains: Sequence[ServedStain]) -> None:
        """Open a spool per channel.

        Args:
            folder: where to write.
            size: width and height, pixels.
            stains: in the order in which :meth:`write_row` gets their rows.
        """
        self._folder, self._open = folder, ExitStack()
        self._sources: list[tuple[int, _Density]] = [(0, hematoxylin_density)]
        self._sources += [(number, _dab) for number in range(len(stains))]
        names = ["hematoxylin", *(stain.name for stain in stains)]
        self._planes = [
            self._open.enter_context(PyramidWriter(folder, *size, channels=1, glass=0, name=f"combined.{name}"))
            for name in names
        ]

    def write_row(self, row: int, images: Sequence[BlockRow], workers: Executor) -> None:
        """Take a row of every stain's image, as it was composed."""
        for plane, (number, density) in zip(self._planes, self._sources, strict=True):
            blocks = images[number]

            def compose(
                x: int, y: int, width: int, height: int, blocks: BlockRow = blocks, density: _Density = density
            ) -> UInt8Array | None:
                block = blocks[x // SIDE]
                if block is None:
                    return None
                scaled: UInt8Array = np.clip(np.rint(density(block) * SCALE), 0, 255).astype(np.uint8)[..., None]
                return scaled

            plane.write_row(row, compose, workers)

    def commit(self) -> tuple[RowState, ...]:
        """See :meth:`~staindiffuser.imaging.ome_tiff.PyramidWriter.commit`: a state per channel."""
        return tuple(plane.commit() for plane in self._planes)

    def restore(self, states: Sequence[tuple[RowState, ...]]) -> None:
        """Continue after these rows; raises ValueError if the spools are not those that were committed."""
        for number, plane in enumerate(self._planes):
            plane.restore([row[number] for row in states])

    def finish(self, info: ImageInfo) -> str:
        """Write the file and return its name; ``info`` is what it says of itself."""
        write_channels(self._folder / COMBINED_FILE, self._planes, info)
        return COMBINED_FILE

    def __enter__(self) -> CombinedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
