"""What every command of ``staindiffuser bench`` does with its report."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from staindiffuser.files import check_file, write_json

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["JsonFile", "hand_over"]

JsonFile = Annotated[
    Path | None,
    typer.Option("--json", callback=check_file, help="Write the report here as JSON; - for the screen."),
]


def hand_over(report: DataclassInstance | dict[str, Any], file: Path | None) -> bool:
    """Write a report where ``--json`` says; whether that was the screen, where nothing else may follow.

    Raises:
        UsageError: the file cannot be written.
    """
    data = report if isinstance(report, dict) else dataclasses.asdict(report)
    if file is not None and str(file) == "-":
        typer.echo(json.dumps(data, indent=1))
        return True
    if file is not None:
        write_json(file, data)
    return False
