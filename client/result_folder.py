"""The folder of a slide's result: its files appear under their final names together, or not at all.

Unfinished work lies in the sub-folder ``.unfinished``, which is locked while a run uses it and survives if the run
saved anything.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import FileLock, Timeout

from staindiffuser.client.errors import OutputError, RunRecordError
from staindiffuser.client.journal import JOURNAL
from staindiffuser.client.run_record import RUN_JSON, find_run
from staindiffuser.files import remove

__all__ = ["UNFINISHED", "ResultFolder"]

UNFINISHED = ".unfinished"


class ResultFolder:
    """Holds the lock on an output folder and publishes files together, ``run.json`` last.

    Leaving the context without :meth:`publish` removes what this object made, unless :attr:`keep` is set.
    """

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        """Describe the folder; entering the context creates it.

        Args:
            path: the output folder.
            overwrite: replace an existing result.
        """
        self.path = path
        self.work = path / UNFINISHED
        """Unfinished files."""
        self.keep = False
        """Leave the unfinished files for a later run; set if an earlier run has left some."""
        self._overwrite = overwrite
        self._made: list[Path] = []
        self._lock = FileLock(self.work / "lock", timeout=0)

    def __enter__(self) -> Self:
        """Create the output folder, its parents and the folder for unfinished files, and lock it.

        Raises:
            OutputError: the output cannot be written, already holds a result, or is in use by another run.
        """
        try:
            self._refuse_result()
            missing = [p for p in (self.work, self.path, *self.path.parents) if not p.exists()]
            for folder in reversed(missing):
                folder.mkdir(exist_ok=True)
                self._made.append(folder)
            self._lock.acquire()
            self.keep = (self.work / JOURNAL).exists()
            self._refuse_result()  # one that was completed just before the lock was free
        except Timeout:
            raise OutputError(f"another run is writing to {self.path}: wait for it, or use another --output") from None
        except OSError as error:
            self._remove_made()
            raise OutputError(f"the output {self.path} cannot be written: {error.strerror or error}") from error
        return self

    def clear(self) -> None:
        """Remove the unfinished files of an earlier run."""
        self.keep = False
        for path in self.work.iterdir():
            if path != Path(self._lock.lock_file):
                remove(path)

    def publish(self, names: Sequence[str]) -> None:
        """Move these unfinished files to their final names, and remove the result they replace.

        ``run.json`` is removed first and moved last: wherever it is, the result is complete.

        Raises:
            OutputError: a file cannot be moved.
        """
        try:
            if (self.path / RUN_JSON).exists():
                replaced = self._old_names()
                (self.path / RUN_JSON).unlink()
                for name in replaced:
                    remove(self.path / name)
            for name in sorted(names, key=lambda name: name == RUN_JSON):
                os.replace(self.work / name, self.path / name)  # noqa: PTH105 - atomic replacement is intended
        except OSError as error:
            raise OutputError(f"the result cannot be moved to {self.path}: {error.strerror or error}") from error
        self.keep = False
        self._made = [self.work]

    def _refuse_result(self) -> None:
        if (self.path / RUN_JSON).exists() and not self._overwrite:
            raise OutputError(
                f"{self.path} already holds a result: use --overwrite to replace it, --resume to keep it, "
                "or another --output"
            )

    def _old_names(self) -> list[str]:
        try:
            run = find_run(self.path)
        except RunRecordError:  # unreadable: nobody knows which other files belong to it
            return []
        return list(run.outputs) if run is not None else []

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if not self.keep:
            shutil.rmtree(self.work, ignore_errors=True)
        self._lock.release()
        if not self.keep:
            self._remove_made()

    def _remove_made(self) -> None:
        for folder in reversed(self._made):
            if not folder.exists():
                continue
            with contextlib.suppress(OSError):
                folder.rmdir()
                continue
            return  # not empty: someone else is using it
