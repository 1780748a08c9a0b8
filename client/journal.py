"""The journal of a slide's unfinished work: after each row it records what is on the disk, so that work can continue.

The first line describes the work, each further line a row that was written and synchronised before. A run that is
killed loses the row it was working on, and no more.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from pydantic.dataclasses import dataclass

from staindiffuser.client.quality import TileScores
from staindiffuser.client.run_record import Request
from staindiffuser.imaging.ome_tiff import RowState
from staindiffuser.imaging.slides import DamagedRegion
from staindiffuser.records import STRICT, RecordError, decode

__all__ = ["JOURNAL", "CellsState", "Journal", "Work", "WorkRow", "read_journal"]

JOURNAL = "journal.jsonl"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Work:
    """What is being computed: a run continues only work that equals its own."""

    input_sha256: str
    request: Request
    batch: int
    """Tiles per request: engines may round differently for other batches."""
    software: str
    """Version of this package."""
    size: tuple[int, int]
    """Of the result, pixels."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CellsState:
    """How far ``cells.geojson.gz`` is written."""

    end: int
    """Bytes of the file."""
    crc32: int
    """Of the uncompressed text."""
    length: int
    """Bytes of the uncompressed text."""
    counts: dict[str, int]
    """Cells per stain label."""
    positive_pixels: dict[str, int]
    """Pixels of the cell maps that reach the threshold, per stain label."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WorkRow:
    """A row of the result that is on the disk."""

    images: tuple[RowState, ...]
    """Per image file."""
    cells: CellsState | None
    damaged: tuple[DamagedRegion, ...]
    """Regions of the input found damaged so far."""
    nuclei: tuple[int, ...] = ()
    """Nuclei counted in the H&E up to here, and positive ones per stain."""
    quality: tuple[TileScores, ...] = ()
    """What the server said about the tiles that were stained since the row before."""


class Journal:
    """Appends rows to the journal in a folder; use it as a context manager."""

    def __init__(self, folder: Path) -> None:
        """Open the journal, which may hold rows already."""
        self._file: IO[str] = (folder / JOURNAL).open("a", encoding="utf-8")

    def start(self, work: Work) -> None:
        """Write the first line."""
        self._write(dataclasses.asdict(work))

    def add(self, row: WorkRow) -> None:
        """Record a row whose data are on the disk."""
        self._write(dataclasses.asdict(row))

    def _write(self, data: dict[str, object]) -> None:
        self._file.write(json.dumps(data, separators=(",", ":")) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()


def read_journal(folder: Path) -> tuple[Work, list[WorkRow]] | None:
    """The unfinished work in a folder; None if there is none that this version can continue.

    A last line that was cut off by a crash is removed from the file.
    """
    path = folder / JOURNAL
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    whole = content[: content.rfind(b"\n") + 1]
    try:
        lines = [json.loads(line) for line in whole.splitlines()]
        if not lines:
            return None
        work, rows = decode(Work, lines[0]), [decode(WorkRow, line) for line in lines[1:]]
    except (ValueError, RecordError):
        return None
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return work, rows
