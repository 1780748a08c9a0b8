"""The audit log: one JSON object per line for every start, failure, crash, restart, drain and stop of a server."""

from __future__ import annotations

import datetime
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from staindiffuser.errors import UsageError

__all__ = ["AuditLog"]


class AuditLog:
    """Appends to a file; several servers may share it. It never holds file names of slides, or pixels."""

    def __init__(self, path: Path | None, say: Callable[[str], None] = lambda message: None) -> None:
        """Open the log.

        Args:
            path: the file, created if it does not exist; None for no log.
            say: receives the events that cannot be written later on: a full disk must not end a server that works.

        Raises:
            UsageError: it cannot be written.
        """
        self._path = path
        self._say = say
        self._begun = self._torn = False
        self._append(b"")

    def record(self, event: str, **details: Any) -> None:
        """Append one event, with the time and this process's id, and flush it to the disk.

        Raises:
            UsageError: the log's first event cannot be written.
        """
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, "event": event, "serve_pid": os.getpid(), **details}, ensure_ascii=False)
        start = "\n" if self._torn else ""  # after a line of which only a part fitted
        try:
            self._append(f"{start}{line}\n".encode())
            self._torn = False
        except UsageError as error:
            if not self._begun:
                raise
            self._torn = True
            self._say(f"{error}: {line}")
        self._begun = True

    def _append(self, data: bytes) -> None:
        if self._path is None:
            return
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
            try:
                if os.write(descriptor, data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise UsageError(f"the audit log {self._path} cannot be written: {error.strerror}") from error
