"""A line of JSON for each request, if ``STAINDIFFUSER_REQUEST_LOG`` names a file: its id, its size, how it ended.

The id is the one that the client made up, which the logs of Triton and of the proxy repeat; nothing tells which slide a
tile belongs to. The file is opened for each line, so that it may be moved away at any time; what cannot be written is
left out.

Copied beside ``model.py`` into the model repository; imports nothing of the project.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Sequence

__all__ = ["ENVIRONMENT", "RequestLog"]

ENVIRONMENT = "STAINDIFFUSER_REQUEST_LOG"
LONGEST_ID = 64


class RequestLog:
    """One model's view of the log; without the environment variable nothing is written."""

    def __init__(self, version: str = "") -> None:
        """Of a model of this version."""
        self._path = os.environ.get(ENVIRONMENT, "")
        self._version = version[:12]

    def write(
        self, request: str, *, tiles: int, outputs: Sequence[str], waited: float, took: float, status: str
    ) -> None:
        """Append a line.

        Args:
            request: the client's id.
            tiles: in the request.
            outputs: that it asked for.
            waited: seconds until its turn came.
            took: seconds from then on.
            status: ``OK``, or Triton's name of the error.
        """
        if not self._path:
            return
        line = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            "request": request[:LONGEST_ID],
            "model_version": self._version,
            "tiles": tiles,
            "outputs": list(outputs),
            "waited_ms": round(1e3 * waited, 1),
            "ms": round(1e3 * took, 1),
            "status": status,
        }
        with contextlib.suppress(OSError):
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
            try:
                os.write(descriptor, f"{json.dumps(line)}\n".encode())
            finally:
                os.close(descriptor)
