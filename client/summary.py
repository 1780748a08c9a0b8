"""What became of each slide of a batch: the lines of ``--json``, ``summary.csv`` and the closing table."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from staindiffuser.client.inputs import SlideInput
from staindiffuser.client.names import SlideNames
from staindiffuser.client.run_record import RunRecord
from staindiffuser.errors import StainDiffuserError
from staindiffuser.files import replacing

__all__ = ["SUMMARY_FILE", "Outcome", "Status", "write_summary"]

SUMMARY_FILE = "summary.csv"
Status = Literal["stained", "kept", "failed", "planned", "interrupted", "not started"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One slide of a batch."""

    slide: SlideInput
    names: SlideNames
    status: Status
    run: RunRecord | None = None
    """Of a slide that is stained or kept."""
    error: StainDiffuserError | None = None
    """Of a slide that failed."""

    plan: dict[str, int] | None = None
    """Of a slide that is only planned: tiles and estimates."""

    def to_dict(self) -> dict[str, Any]:
        """A line of ``--json``: the run record, or the error with its exit code."""
        place = {"slide": self._called, "status": self.status, "output": self._output}
        if self.run is not None:
            return {**self.run.to_dict(), **place}
        failure = {} if self.error is None else {"error": self._error_text, "exit_code": self.error.exit_code}
        path = str(self.slide.path.absolute()) if self.names.keep else None
        return {"input": {"path": path}, **place, **(self.plan or {}), **failure}

    @property
    def _called(self) -> str:
        """The slide's path, or what it is called instead. One that was not begun is not read for that."""
        if self.names.keep:
            return str(self.slide.path)
        return self.names.number_text if self.status == "not started" else self.names.shown

    @property
    def _output(self) -> str | None:
        """The result folder; None where its name is made of the slide's."""
        return str(self.slide.output) if self.names.keep or self.slide.named else None

    @property
    def _error_text(self) -> str:
        return "" if self.error is None else " ".join(self.names.hidden(str(self.error)).split())

    def row(self) -> dict[str, object]:
        """A row of ``summary.csv``."""
        run, error = self.run, self.error
        return {
            "slide": self._called,
            "output": self._output or "",
            "status": self.status,
            "exit_code": error.exit_code if error else 0 if run else "",
            "error": self._error_text,
            "tiles": run.tiles.stained if run else "",
            "tissue_fraction": run.tissue_fraction if run else "",
            "seconds": run.seconds.total if run else "",
            "model_version": run.model.version if run else "",
            **({f"cells {label}": number for label, number in run.cells.items()} if run else {}),
            **(
                {f"positive share {score.stain}": score.positive_share for score in run.scores.stains}
                if run and run.scores
                else {}
            ),
        }


def write_summary(folder: Path, outcomes: Sequence[Outcome]) -> Path:
    """Write ``summary.csv`` into ``folder``, one row per slide; returns its path.

    Raises:
        UsageError: the file cannot be written.
    """
    rows = [outcome.row() for outcome in outcomes]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path = folder / SUMMARY_FILE
    with replacing(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")
    return path
