"""The folder of a slide's result: complete under its final names, or not there at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from staindiffuser.client.errors import OutputError

__all__ = ["RUN_JSON", "ResultFolder", "read_run"]

RUN_JSON = "run.json"


class ResultFolder:
    """Gives a staging folder inside the output; publishes its files together, ``run.json`` last.

    Leaving the context without :meth:`publish` removes everything this object made.
    """

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        """Remember.

        Args:
            path: the output folder.
            overwrite: replace a result that is there.
        """
        self.path = path
        self._overwrite = overwrite
        self._made: list[Path] = []

    def __enter__(self) -> Self:
        """Make the folders.

        Raises:
            OutputError: the output cannot be written, or holds a result already.
        """
        if (self.path / RUN_JSON).exists() and not self._overwrite:
            raise OutputError(
                f"{self.path} holds a result already: replace it with --overwrite, keep it with --resume, "
                "or name another --output"
            )
        try:
            missing = [p for p in (self.path, *self.path.parents) if not p.exists()]
            for folder in reversed(missing):
                folder.mkdir(exist_ok=True)
                self._made.append(folder)
            self.staging = Path(tempfile.mkdtemp(prefix=".partial-", dir=self.path))
        except OSError as error:
            self._remove_made()
            raise OutputError(f"the output {self.path} cannot be written: {error.strerror or error}") from error
        return self

    def publish(self, names: Sequence[str]) -> None:
        """Move these files of the staging folder to their final names; ``run.json`` marks the result complete.

        Raises:
            OutputError: an existing result was not to be overwritten, or a file cannot be moved.
        """
        try:
            old = read_run(self.path)
            if old is not None:
                if not self._overwrite:
                    raise OutputError(f"{self.path} was filled by someone else meanwhile: name another --output")
                (self.path / RUN_JSON).unlink()
                for name in old.get("outputs", {}):
                    # Only plain names: a run.json that was edited must not delete elsewhere.
                    if Path(name).name == name:
                        (self.path / name).unlink(missing_ok=True)
            for name in sorted(names, key=lambda name: name == RUN_JSON):
                os.replace(self.staging / name, self.path / name)  # noqa: PTH105 - replaces atomically, as meant here
        except OSError as error:
            raise OutputError(f"the result cannot be moved to {self.path}: {error.strerror or error}") from error
        self._made.clear()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        shutil.rmtree(self.staging, ignore_errors=True)
        self._remove_made()

    def _remove_made(self) -> None:
        for folder in reversed(self._made):
            try:
                folder.rmdir()
            except OSError:
                return  # someone else put something there


def read_run(folder: Path) -> dict[str, Any] | None:
    """A result's ``run.json``, or None where there is no complete result."""
    try:
        run = json.loads((folder / RUN_JSON).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return run if isinstance(run, dict) else None
