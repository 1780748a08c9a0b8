"""SIGTERM, which ends a process at once unless it is asked to do better."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["sigterm_like_ctrl_c"]


@contextmanager
def sigterm_like_ctrl_c() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does: what is finished stays saved, and a server of our own is stopped."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
