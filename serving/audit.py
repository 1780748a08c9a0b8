"""The audit log: one JSON object per line for every start, failure, crash, restart, drain and stop of a server."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any

from staindiffuser.errors import UsageError

__all__ = ["AuditLog"]


class AuditLog:
    """Appends to a file; several servers may share it. It never holds file names of slides, or pixels."""

    def __init__(self, path: Path | None) -> None:
        """Open the log.

        Args:
            path: the file, created if it does not exist; None for no log.

        Raises:
            UsageError: it cannot be written.
        """
        self._path = path
        self._append(b"")

    def record(self, event: str, **details: Any) -> None:
        """Append one event, with the time and this process's id, and flush it to the disk.

        Raises:
            UsageError: the log cannot be written any more.
        """
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, "event": event, "serve_pid": os.getpid(), **details}, ensure_ascii=False)
        self._append(f"{line}\n".encode())

    def _append(self, data: bytes) -> None:
        if self._path is None:
            return
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
            try:
                os.write(descriptor, data)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise UsageError(f"the audit log {self._path} cannot be written: {error.strerror}") from error
