"""Decoded tiles in memory, shared by a loader's processes."""

from __future__ import annotations

import mmap
import multiprocessing
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["TileCache"]


class TileCache:
    """Keeps the bytes of tiles, up to a budget.

    Each tile has a fixed slot, in file order until the budget is used up; the others are decoded every time. Where
    every tile is seen once an epoch in random order, no policy of eviction has more hits.

    The memory is anonymous and shared: processes forked from this one (a loader's workers) fill it together, and it
    grows only as tiles come in. Spawned workers would each have their own.

    Args:
        sizes: bytes of each tile.
        budget: bytes in all.
    """

    def __init__(self, sizes: Sequence[int], budget: int) -> None:
        self._ends = np.cumsum(np.asarray(sizes, np.int64))
        self._sizes = tuple(int(size) for size in sizes)
        self._budget = budget
        self._kept = int(np.searchsorted(self._ends, budget, side="right"))
        self._open()

    def _open(self) -> None:
        self.nbytes = int(self._ends[self._kept - 1]) if self._kept else 0
        """Bytes that the cache takes when it is full."""
        self._memory = mmap.mmap(-1, max(1, self.nbytes))
        self._filled = mmap.mmap(-1, max(1, self._kept))
        # The lock orders the mark after the bytes for every reader; it is held for the mark alone.
        self._lock = multiprocessing.Lock()

    def get(self, index: int) -> NDArray[np.uint8] | None:
        """The bytes of tile ``index``, uint8 [N], read-only; None if they are not kept (yet)."""
        if index >= self._kept:
            return None
        with self._lock:
            filled = self._filled[index]
        return self._slot(index) if filled else None

    def put(self, index: int, arrays: Iterable[NDArray[np.uint8]]) -> None:
        """Keep the bytes of tile ``index``, its arrays one after another, if it has a slot."""
        if index < self._kept:
            slot, start = self._slot(index), 0
            for array in arrays:
                slot[start : start + array.size] = array.reshape(-1)
                start += array.size
            with self._lock:
                self._filled[index] = 1

    def _slot(self, index: int) -> NDArray[np.uint8]:
        start = int(self._ends[index]) - self._sizes[index]
        return np.frombuffer(self._memory, np.uint8, self._sizes[index], start)

    def __getstate__(self) -> dict[str, Any]:
        return {"sizes": self._sizes, "budget": self._budget}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # a spawned process starts an empty one
