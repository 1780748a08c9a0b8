"""Draining: refuse new requests, and wait until those in progress are finished.

The server's side is :mod:`staindiffuser.triton_models.shared.gate`. A request in progress is always either in one of
the models, which mark that they have requests, or waiting for one, apart from the moments between two of them; so a
server that shows neither for :data:`QUIET_SECONDS` is idle.
"""

from __future__ import annotations

import fcntl
import time
from pathlib import Path

from staindiffuser.serving.metrics import read_metrics
from staindiffuser.triton_models.shared.gate import BUSY, CLOSED

__all__ = ["drain", "open_gate"]

QUIET_SECONDS = 0.5


def open_gate(folder: Path) -> Path:
    """Make the folder of an open gate; returns it."""
    folder.mkdir()
    (folder / BUSY).touch()
    return folder


def drain(gate: Path, metrics_url: str, timeout: float) -> bool:
    """Close the gate and wait for the requests in progress.

    Args:
        gate: the folder of :func:`open_gate`.
        metrics_url: Triton's metrics.
        timeout: seconds.

    Returns:
        Whether the server is idle; False if the time was up first.
    """
    (gate / CLOSED).touch()
    deadline, quiet_since = time.monotonic() + timeout, None
    while (now := time.monotonic()) < deadline:
        if not _idle(gate, metrics_url):
            quiet_since = None
        elif quiet_since is None:
            quiet_since = now
        elif now - quiet_since >= QUIET_SECONDS:
            return True
        time.sleep(0.05)
    return False


def _idle(gate: Path, metrics_url: str) -> bool:
    with (gate / BUSY).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    try:
        return not read_metrics(metrics_url)["nv_inference_pending_request_count"]
    except OSError:
        return True  # the server has ended, and its requests with it
