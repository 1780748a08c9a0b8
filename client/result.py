"""The files of a slide's result, written row by row."""

from __future__ import annotations

import math
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from staindiffuser.client.blending import Mosaic, OutputImage
from staindiffuser.client.cells import BlockCells, CellsFile
from staindiffuser.client.contract import ModelContract, ServedStain
from staindiffuser.client.progress import Stopwatch
from staindiffuser.client.resample import ModelView
from staindiffuser.client.run import SYNTHETIC, description
from staindiffuser.imaging.ome_tiff import ImageInfo, PyramidWriter

__all__ = ["CELLS_FILE", "PREVIEW_FILE", "ResultWriter", "cell_map_file", "image_file", "planes_of"]

CELLS_FILE = "cells.geojson.gz"
PREVIEW_FILE = "preview.png"


def image_file(stain: ServedStain) -> str:
    """Name of a stain's image."""
    return f"{stain.name}.ome.tiff"


def cell_map_file(stain: ServedStain) -> str:
    """Name of a stain's cell map."""
    return f"{stain.name}.cells.ome.tiff"


def planes_of(stains: tuple[ServedStain, ...], *, cells: bool) -> tuple[OutputImage, ...]:
    """What is put together for these stains."""
    images = [OutputImage(tensor=stain.image_tensor, channels=3, background=255) for stain in stains]
    maps = [OutputImage(tensor=stain.cells_tensor, channels=1, background=0) for stain in stains]
    return tuple(images + maps * cells)


@dataclass(frozen=True, kw_only=True)
class _File:
    """One image file on its way."""

    name: str
    plane: OutputImage
    writer: PyramidWriter
    info: ImageInfo
    search: BlockCells | None
    """Looks for the cells of a cell map."""


class ResultWriter:
    """Writes all files of a result but ``run.json`` and ``preview.png`` into a folder."""

    def __init__(
        self,
        folder: Path,
        source: Path,
        view: ModelView,
        contract: ModelContract,
        stains: tuple[ServedStain, ...],
        *,
        seed: int,
        cells: bool,
        watch: Stopwatch,
    ) -> None:
        """Open the files.

        Args:
            folder: where they go.
            source: the input slide, to be named in them.
            view: the slide at the model's resolution.
            contract: of the model that stains.
            stains: which.
            seed: to be named in the files.
            cells: also cell maps and cells.
            watch: counts the stages ``compose and encode``, ``cells`` and ``assemble``.
        """
        self._folder, self._watch = folder, watch
        self._open = ExitStack()
        self._cells: CellsFile | None = None
        planes = planes_of(stains, cells=cells)
        self._files = [
            self._file(plane, number % len(stains), stains, source, view, description(contract, seed, source))
            for number, plane in enumerate(planes)
        ]
        if cells:
            about = {
                "notice": f"{SYNTHETIC} {contract.notice}",
                "model": f"{contract.model_name} {contract.model_version}",
                "steps": contract.steps,
                "seed": seed,
                "source": source.name,
                "coordinates": "level-0 pixels of the source",
            }
            self._cells = self._open.enter_context(CellsFile(folder / CELLS_FILE, about))

    def _file(
        self,
        plane: OutputImage,
        number: int,
        stains: tuple[ServedStain, ...],
        source: Path,
        view: ModelView,
        about: str,
    ) -> _File:
        stain, is_map = stains[number], plane.channels == 1
        width, height = view.size
        writer = PyramidWriter(self._folder, width, height, channels=plane.channels, background=plane.background)
        self._open.enter_context(writer)
        mpp = math.sqrt(view.mpp[0] * view.mpp[1])
        what = "probability of stained cells, 0 to 255" if is_map else "virtual immunohistochemistry"
        return _File(
            name=cell_map_file(stain) if is_map else image_file(stain),
            plane=plane,
            writer=writer,
            info=ImageInfo(
                name=f"{stain.label} {'cell map' if is_map else 'virtual stain'} of {source.name}",
                description=f"{about} stain: {stain.label}; content: {what}",
                mpp=view.mpp,
                channel=stain.label,
            ),
            search=BlockCells(stain, number, mpp, view.scale, writer.rows) if is_map else None,
        )

    @property
    def cell_counts(self) -> dict[str, int]:
        """Cells found, per stain's label."""
        return dict(self._cells.counts) if self._cells else {}

    def write_row(self, row: int, mosaic: Mosaic, workers: Executor) -> None:
        """Compose, encode and search one row of file tiles of every image."""
        for file in self._files:

            def compose(x: int, y: int, width: int, height: int, plane: OutputImage = file.plane) -> Any:
                return mosaic.compose(plane, x, y, width, height)

            with self._watch.stage("compose and encode"):
                blocks = file.writer.write_row(row, compose, workers)
            if file.search is not None and self._cells is not None:
                with self._watch.stage("cells"):
                    self._cells.write(file.search.add_row(blocks, workers))

    def finish(self) -> list[str]:
        """Complete the files; give their names."""
        with self._watch.stage("assemble"):
            for file in self._files:
                file.writer.finish(self._folder / file.name, file.info)
            if self._cells is not None:
                self._cells.finish()
        return [file.name for file in self._files] + ([CELLS_FILE] if self._cells else [])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._open.close()
