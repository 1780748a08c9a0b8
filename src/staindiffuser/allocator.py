"""How glibc's allocator behaves in this process."""

from __future__ import annotations

import ctypes
import os

__all__ = ["use_few_arenas"]

ARENAS = 2
_M_ARENA_MAX = -8


def use_few_arenas() -> None:
    """Let threads share two arenas, of which glibc would make up to eight a core; call it before they start.

    What one thread has freed, others can then use: a slide's client holds 150 MiB less of free memory, at the same
    speed. Does nothing with another allocator, or where ``MALLOC_ARENA_MAX`` is set.
    """
    if "MALLOC_ARENA_MAX" in os.environ:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, ARENAS)
