"""The image and cell files of a slide's result, written row by row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from staindiffuser.client.blending import Mosaic, OutputImage
from staindiffuser.client.cells import BlockRow, MapCells, Search
from staindiffuser.client.cells_file import CellsFile
from staindiffuser.client.combined import CombinedFile, combined_channels
from staindiffuser.client.contract import ModelContract, ServedStain
from staindiffuser.client.journal import WorkRow
from staindiffuser.client.model_view import ModelView
from staindiffuser.client.progress import Stopwatch
from staindiffuser.client.run_record import SYNTHETIC, description, facts, gate_text, printable
from staindiffuser.files import remove
from staindiffuser.imaging.instances import lowest_grey
from staindiffuser.imaging.ome_tiff import Channel, ImageInfo, PyramidWriter
from staindiffuser.imaging.slides import DamagedRegion

if TYPE_CHECKING:
    from staindiffuser.imaging.dicom_image import DicomSource

__all__ = [
    "CELLS_FILE",
    "MASK_FILE",
    "PREVIEW_FILE",
    "ResultFiles",
    "WrittenImage",
    "cell_map_file",
    "image_file",
    "output_images",
]

CELLS_FILE = "cells.geojson.gz"
PREVIEW_FILE = "preview.png"
MASK_FILE = "tissue.png"
THREADS = 2
"""Threads that compose, encode and find cells."""


def image_file(stain: ServedStain) -> str:
    """File name of a stain's image."""
    return f"{stain.name}.ome.tiff"


def cell_map_file(stain: ServedStain) -> str:
    """File name of a stain's cell map."""
    return f"{stain.name}.cells.ome.tiff"


def output_images(stains: tuple[ServedStain, ...], *, cells: bool) -> tuple[OutputImage, ...]:
    """The images to compose for these stains: first the stains, then the cell maps."""
    images = [OutputImage(tensor=stain.image_tensor, channels=3, glass=255) for stain in stains]
    maps = [OutputImage(tensor=stain.cells_tensor, channels=1, glass=0) for stain in stains]
    return tuple(images + maps * cells)


@dataclass(frozen=True, kw_only=True)
class _ImageFile:
    """An image file being written."""

    name: str
    image: OutputImage
    writer: PyramidWriter
    info: ImageInfo
    cells: MapCells | None
    """Finds the cells, if the image is a cell map."""
    stain: ServedStain


@dataclass(frozen=True, kw_only=True)
class WrittenImage:
    """A finished image of a result."""

    name: str
    """Of the OME-TIFF."""
    info: ImageInfo
    channels: int
    glass: int
    """Value of glass."""


class ResultFiles:
    """Writes every file of a result except ``run.json`` and ``preview.png``; use it as a context manager."""

    def __init__(
        self,
        folder: Path,
        source: str,
        view: ModelView,
        contract: ModelContract,
        stains: tuple[ServedStain, ...],
        *,
        seed: int,
        cells: bool,
        combined: bool = False,
        formats: Sequence[str] = (),
        dicom_source: DicomSource | None = None,
        watch: Stopwatch,
        done: Sequence[WorkRow] = (),
    ) -> None:
        """Open the files.

        Args:
            folder: where to write.
            source: the input slide's name, as the files give it.
            view: the slide at the model's pixel size.
            contract: of the model that stains.
            stains: the stains to write.
            seed: named in the files.
            cells: also write cell maps and cells.
            combined: also write all stains as channels of one image.
            formats: see :class:`~staindiffuser.client.options.StainingOptions`.
            dicom_source: what DICOM refers to, if the slide is DICOM.
            watch: times the stages ``compose and encode``, ``cells`` and ``assemble``.
            done: rows that an earlier run has written to ``folder``; the files are continued after them.

        Raises:
            ValueError: the files in ``folder`` are not those of ``done``.
        """
        self._folder, self._watch = folder, watch
        self._identity = f"{source} {contract.model_version} {seed}"
        self._open = ExitStack()
        self._workers: Executor = self._open.enter_context(ThreadPoolExecutor(THREADS, thread_name_prefix="code"))
        self._cells: CellsFile | None = None
        self.written: list[WrittenImage] = []
        """The images, once they are complete."""
        self._formats, self._dicom_source = tuple(formats), dicom_source
        self._combined = self._open.enter_context(CombinedFile(folder, view.size, stains)) if combined else None
        self._source, self._view, self._contract, self._stains, self._seed = source, view, contract, stains, seed
        self._files = [
            self._file(image, number % len(stains)) for number, image in enumerate(output_images(stains, cells=cells))
        ]
        if cells:
            collection = {
                "notice": f"{SYNTHETIC} {contract.notice}",
                "model": f"{contract.model_name} {contract.model_version}",
                "gate": gate_text(contract.gate, stains),
                "thresholds": {stain.label: stain.threshold for stain in stains},
                "steps": contract.steps,
                "seed": seed,
                "source": printable(source),
                "coordinates": "level-0 pixels of the source",
            }
            state = done[-1].cells if done else None
            self._cells = self._open.enter_context(CellsFile(folder / CELLS_FILE, collection, state))
        if done:
            self._restore(done)

    def _file(self, image: OutputImage, number: int) -> _ImageFile:
        view, stain, is_map = self._view, self._stains[number], image.channels == 1
        name = cell_map_file(stain) if is_map else image_file(stain)
        width, height = view.size
        writer = PyramidWriter(self._folder, width, height, channels=image.channels, glass=image.glass, name=name)
        self._open.enter_context(writer)
        mpp = math.sqrt(view.mpp[0] * view.mpp[1])
        content = "probability of stained cells, 0 to 255" if is_map else "virtual immunohistochemistry"
        kind = "cell map" if is_map else "virtual stain"
        return _ImageFile(
            name=name,
            image=image,
            writer=writer,
            info=self._info(f"{stain.label} {kind}", [stain], [Channel(stain.label)], content),
            cells=MapCells(stain, number, mpp, view.scale, writer.rows, self._identity) if is_map else None,
            stain=stain,
        )

    def _info(self, kind: str, stains: Sequence[ServedStain], channels: Sequence[Channel], content: str) -> ImageInfo:
        """What an image of these stains says of itself."""
        known = facts(self._contract, self._seed, self._source, stains)
        labels = ", ".join(stain.label for stain in stains)
        about = description(self._contract, self._seed, self._source, stains)
        notice = {"notice": f"{SYNTHETIC} {self._contract.notice}"}
        return ImageInfo(
            name=f"{kind} of {printable(self._source)}",
            description=f"{about} stain: {labels}; content: {content}",
            mpp=self._view.mpp,
            channels=tuple(channels),
            creator=known["software"],
            about=notice | known | {"stain": labels, "content": content},
        )

    @property
    def cell_counts(self) -> dict[str, int]:
        """Number of cells written so far, per stain label."""
        return dict(self._cells.counts) if self._cells else {}

    @property
    def positive_pixels(self) -> dict[str, int]:
        """Pixels of the cell maps so far that reach the threshold, per stain label."""
        return dict(self._cells.positive_pixels) if self._cells else {}

    def write_row(self, row: int, mosaic: Mosaic) -> None:
        """Compose and encode one row of every image, and find its cells."""
        searches: list[Search] = []
        images: list[BlockRow] = []
        for file in self._files:

            def compose(x: int, y: int, width: int, height: int, image: OutputImage = file.image) -> Any:
                return mosaic.compose(image, x, y, width, height)

            with self._watch.stage("compose and encode"):
                workers = self._watch.workers("compose and encode", self._workers)
                blocks = file.writer.write_row(row, compose, workers)
            if file.cells is not None and self._cells is not None:
                searches += file.cells.add_row(blocks)
                lowest = lowest_grey(file.stain.threshold)
                pixels = sum(int(np.count_nonzero(block >= lowest)) for block in blocks if block is not None)
                self._cells.add_area(file.stain.label, pixels)
            elif self._combined is not None:
                images.append(blocks)
        if self._combined is not None:
            with self._watch.stage("combined"):
                self._combined.write_row(row, images, self._workers)
        if self._cells is not None:
            with self._watch.stage("cells"):
                workers = self._watch.workers("cells", self._workers)
                self._cells.write(list(workers.map(lambda search: search(), searches)))

    def commit(self, damaged: tuple[DamagedRegion, ...], nuclei: tuple[int, ...] = ()) -> WorkRow:
        """Put the row that was just written on the disk; return what is needed to continue after it.

        Args:
            damaged: see :class:`~staindiffuser.client.journal.WorkRow`.
            nuclei: likewise.
        """
        with self._watch.stage("commit"):
            combined = self._combined.commit() if self._combined is not None else ()
            return WorkRow(
                images=(*(file.writer.commit() for file in self._files), *combined),
                cells=self._cells.commit() if self._cells else None,
                damaged=damaged,
                nuclei=nuclei,
            )

    def _restore(self, done: Sequence[WorkRow]) -> None:
        try:
            for number, file in enumerate(self._files):
                file.writer.restore([row.images[number] for row in done])
                if file.cells is not None:
                    file.cells.restore(len(done), file.writer.read_row)
            if self._combined is not None:
                self._combined.restore([row.images[len(self._files) :] for row in done])
        except BaseException:
            self._open.close()
            raise

    def finish(self) -> list[str]:
        """Complete the files and return their names. Every row must have been written."""
        names = [file.name for file in self._files]
        with self._watch.stage("assemble"):
            for file in self._files:
                file.writer.finish(self._folder / file.name, file.info)
                kind = file.image
                self.written.append(
                    WrittenImage(name=file.name, info=file.info, channels=kind.channels, glass=kind.glass)
                )
            if self._combined is not None:
                content = "hematoxylin of the first stain, and DAB of each: 100 × optical density"
                channels = combined_channels(self._stains)
                info = self._info("Virtual stains", self._stains, channels, content)
                names.append(self._combined.finish(info))
                self.written.append(WrittenImage(name=names[-1], info=info, channels=1, glass=0))
            if self._cells is not None:
                self._cells.finish()
                names.append(CELLS_FILE)
        return names + self._convert()

    def _convert(self) -> list[str]:
        """Write the images in the other formats; return their names."""
        suffixes = [suffix for suffix in self._formats if suffix in ("ome-zarr", "dicom")]
        if not suffixes:
            return []
        from staindiffuser.client.cells_dicom import write_annotations
        from staindiffuser.imaging.dicom_image import new_uid, write_dicom
        from staindiffuser.imaging.ome_zarr import write_ome_zarr

        names = []
        study = new_uid()
        for image in self.written:
            for suffix in suffixes:
                if suffix == "dicom" and image.channels != 3:
                    continue
                names.append(image.name.replace(".ome.tiff", f".{suffix.replace('-', '.')}"))
                made = self._folder / names[-1]
                remove(made)  # of a run that was killed here
                with self._watch.stage(suffix):
                    if suffix == "dicom":
                        write_dicom(self._folder / image.name, made, image.info, study=study, source=self._dicom_source)
                        if self._cells is not None:
                            (channel,) = image.info.channels
                            write_annotations(self._folder / CELLS_FILE, made, channel.name, self._view.scale)
                    else:
                        write_ome_zarr(self._folder / image.name, made, image.info, glass=image.glass)
        return names

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._open.close()
