"""The gate of a server that is about to stop: new requests are refused while those in progress finish.

Triton cannot do this by itself: on SIGTERM it refuses the inner requests of an ensemble too, so that requests in
progress fail. ``STAINDIFFUSER_GATE`` names a folder. Once it holds the file ``closed``, the ensemble's first model
refuses what reaches it. Every model locks the file ``busy`` while it has requests, which tells whether work is in
progress.

Copied beside ``model.py`` into the model repository; imports nothing of the project.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path

__all__ = ["BUSY", "CLOSED", "ENVIRONMENT", "Gate"]

ENVIRONMENT = "STAINDIFFUSER_GATE"
CLOSED = "closed"
BUSY = "busy"


class Gate:
    """A model's view of the gate; without the environment variable it is always open. Thread-safe."""

    def __init__(self) -> None:
        folder = Path(os.environ[ENVIRONMENT]) if os.environ.get(ENVIRONMENT) else None
        self._closed = folder / CLOSED if folder is not None else None
        self._busy = (folder / BUSY).open("rb") if folder is not None else None
        self._inside, self._lock = 0, threading.Lock()

    @property
    def closed(self) -> bool:
        """Whether new requests are to be refused."""
        return self._closed is not None and self._closed.exists()

    def enter(self) -> None:
        """Mark that the model has a request, until :meth:`leave`; it may have several."""
        with self._lock:
            self._inside += 1
            if self._inside == 1 and self._busy is not None:
                fcntl.flock(self._busy, fcntl.LOCK_SH)

    def leave(self) -> None:
        """Mark that a request is answered."""
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._busy is not None:
                fcntl.flock(self._busy, fcntl.LOCK_UN)

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Mark that a model is running."""
        self.enter()
        try:
            yield
        finally:
            self.leave()
