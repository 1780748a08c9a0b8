"""The gate of a server that is about to stop: new requests are refused while those in progress finish.

Triton cannot do this by itself: on SIGTERM it refuses the inner requests of an ensemble too, so that requests in
progress fail. ``STAINDIFFUSER_GATE`` names a folder. Once it holds the file ``closed``, the ensemble's first model
refuses what reaches it. Every model locks the file ``busy`` while it runs, which tells whether work is in progress.

Copied beside ``model.py`` into the model repository; imports nothing of the project.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["BUSY", "CLOSED", "ENVIRONMENT", "Gate"]

ENVIRONMENT = "STAINDIFFUSER_GATE"
CLOSED = "closed"
BUSY = "busy"


class Gate:
    """A model's view of the gate; without the environment variable it is always open."""

    def __init__(self) -> None:
        self._folder = Path(os.environ[ENVIRONMENT]) if os.environ.get(ENVIRONMENT) else None

    @property
    def closed(self) -> bool:
        """Whether new requests are to be refused."""
        return self._folder is not None and (self._folder / CLOSED).exists()

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Mark that a model is running; several may run at once."""
        if self._folder is None:
            yield
            return
        with (self._folder / BUSY).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            yield
