"""The journal of a slide's tiles: with it an interrupted run goes on where it stopped.

One JSON object per line: first the settings, then one per region.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from staindiffuser.errors import UsageError
from staindiffuser.training.prepare.quality import Reason

__all__ = ["Record", "Records"]

Position = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Record:
    """The outcome of a region; positions are (column, row) on the grid of tiles."""

    region: Position
    kept: Sequence[Position]
    dropped: Mapping[Position, Reason]
    fits: Mapping[str, Sequence[float]]
    """Per stain, each kept tile's correlation of hematoxylin."""

    def line(self) -> str:
        """As JSON."""
        return json.dumps(
            {
                "region": self.region,
                "kept": self.kept,
                "dropped": [[*position, reason.value] for position, reason in self.dropped.items()],
                "fits": {stain: [round(value, 3) for value in values] for stain, values in self.fits.items()},
            }
        )

    @classmethod
    def parse(cls, line: str) -> Record:
        """From JSON.

        Raises:
            ValueError: the line is not whole.
        """
        try:
            data: dict[str, Any] = json.loads(line)
            return cls(
                region=_position(data["region"]),
                kept=[_position(position) for position in data["kept"]],
                dropped={_position(position): Reason(reason) for *position, reason in data["dropped"]},
                fits=data["fits"],
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"no record: {line!r}") from error


def check_settings(path: Path, settings: Mapping[str, Any]) -> list[str]:
    """The lines of the records that an earlier run left.

    Raises:
        UsageError: it had other settings, or the file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}): delete it, or choose another --output") from error
    if lines and lines[0] != _first_line(settings):
        raise UsageError(
            f"{path} was made from other slides or with other settings: choose another --output or --slide"
        )
    return lines[1:]


def _first_line(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


class Records:
    """The file.

    Args:
        path: made if it does not exist.
        settings: of this run; those of the file must be the same.

    Raises:
        UsageError: they are not, or the file cannot be written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.done: dict[Position, Record] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for line in check_settings(path, settings):
                try:
                    record = Record.parse(line)
                except ValueError:  # the last line of a run that was killed
                    continue
                self.done[record.region] = record
            first = _first_line(settings)
            path.write_text("\n".join([first, *(record.line() for record in self.done.values()), ""]), encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error

    def add(self, record: Record) -> None:
        """Append a region."""
        self.done[record.region] = record
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(record.line() + "\n")
        except OSError as error:
            raise UsageError(f"{self.path} cannot be written: {error.strerror or error}") from error


def _position(values: Sequence[int]) -> Position:
    column, row = values
    return int(column), int(row)
