"""The folder of a slide's result: its files appear under their final names together, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from staindiffuser.client.errors import OutputError, RunRecordError
from staindiffuser.client.run_record import RUN_JSON, find_run

__all__ = ["ResultFolder"]


class ResultFolder:
    """Provides a staging folder inside the output and publishes its files together, ``run.json`` last.

    Leaving the context without :meth:`publish` removes every file and folder that this object made.
    """

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        """Describe the folder; entering the context creates it.

        Args:
            path: the output folder.
            overwrite: replace an existing result.
        """
        self.path = path
        self._overwrite = overwrite
        self._made: list[Path] = []

    def __enter__(self) -> Self:
        """Create the output folder, its parents and the staging folder.

        Raises:
            OutputError: the output cannot be written, or already holds a result.
        """
        try:
            if (self.path / RUN_JSON).exists() and not self._overwrite:
                raise OutputError(
                    f"{self.path} already holds a result: use --overwrite to replace it, --resume to keep it, "
                    "or another --output"
                )
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
        """Move these files from the staging folder to their final names, and remove the result they replace.

        ``run.json`` is removed first and moved last: wherever it is, the result is complete.

        Raises:
            OutputError: another run has completed this result meanwhile, or a file cannot be moved.
        """
        try:
            if (self.path / RUN_JSON).exists():
                if not self._overwrite:
                    raise OutputError(
                        f"another run has written a result to {self.path} meanwhile: use another --output"
                    )
                replaced = self._old_names()
                (self.path / RUN_JSON).unlink()
                for name in replaced:
                    (self.path / name).unlink(missing_ok=True)
            for name in sorted(names, key=lambda name: name == RUN_JSON):
                os.replace(self.staging / name, self.path / name)  # noqa: PTH105 - atomic replacement is intended
        except OSError as error:
            raise OutputError(f"the result cannot be moved to {self.path}: {error.strerror or error}") from error
        self._made.clear()

    def _old_names(self) -> list[str]:
        try:
            run = find_run(self.path)
        except RunRecordError:  # unreadable: nobody knows which other files belong to it
            return []
        return list(run.outputs) if run is not None else []

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        shutil.rmtree(self.staging, ignore_errors=True)
        self._remove_made()

    def _remove_made(self) -> None:
        for folder in reversed(self._made):
            try:
                folder.rmdir()
            except OSError:
                return  # not empty: someone else is using it
