"""Requests that wait for their turn: urgent ones first, no more than a number, none for longer than it may.

Triton's own queue, as soon as it has limits and priorities, does not have the next request at hand when a model is
free, and its time-outs fire only when a running inference ends (server#7512). So a model may keep its requests itself.

Copied beside ``model.py`` into the model repository; imports nothing of the project.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Generic, TypeVar

__all__ = ["RequestQueue", "Waiting"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Waiting(Generic[T]):
    """A request in the queue."""

    request: T
    since: float
    """``time.monotonic()`` when it came."""
    until: float
    """``time.monotonic()`` at which it has waited for too long."""


class RequestQueue(Generic[T]):
    """First come, first served, of the urgent ones and then of the others; thread-safe.

    A thread of its own takes out what has waited for too long, at that moment, whatever the model is doing.
    """

    def __init__(self, *, length: int, seconds: float, expired: Callable[[T], None]) -> None:
        """An empty queue.

        Args:
            length: urgent requests that may wait, and others that may.
            seconds: that each may wait.
            expired: called with a request that has waited for too long, from the queue's own thread.
        """
        self._length, self._seconds, self._expired = length, seconds, expired
        self._urgent: deque[Waiting[T]] = deque()
        self._others: deque[Waiting[T]] = deque()
        self._closed = False
        self._wakes = inf
        lock = threading.Lock()
        self._came, self._sooner = threading.Condition(lock), threading.Condition(lock)
        self._timer = threading.Thread(target=self._expire, name="queue", daemon=True)
        self._timer.start()

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._urgent) + len(self._others)

    def put(self, request: T, *, urgent: bool = False, seconds: float | None = None) -> bool:
        """Add a request.

        Args:
            request: whatever :meth:`take` is to give.
            urgent: goes before all that are not.
            seconds: that it may wait, if less than others.

        Returns:
            False if there is no room for it, or the queue is closed.
        """
        now = time.monotonic()
        until = now + (self._seconds if seconds is None else min(seconds, self._seconds))
        line = self._urgent if urgent else self._others
        with self._came:
            if self._closed or len(line) >= self._length:
                return False
            line.append(Waiting(request, now, until))
            self._came.notify()
            if until < self._wakes:
                self._sooner.notify()
        return True

    def take(self) -> Waiting[T] | None:
        """The next request, once there is one; None when the queue is closed."""
        with self._came:
            while not self._closed:
                for line in (self._urgent, self._others):
                    if line:
                        return line.popleft()
                self._came.wait()
        return None

    def close(self) -> list[T]:
        """Accept nothing more, and end those that wait in :meth:`take`; returns the requests that are left."""
        with self._came:
            self._closed = True
            left = [waiting.request for line in (self._urgent, self._others) for waiting in line]
            self._urgent.clear()
            self._others.clear()
            self._came.notify_all()
            self._sooner.notify_all()
        self._timer.join()
        return left

    def _expire(self) -> None:
        while True:
            late: list[Waiting[T]] = []
            with self._sooner:
                while not late:
                    if self._closed:
                        return
                    self._wakes = min((w.until for line in (self._urgent, self._others) for w in line), default=inf)
                    self._sooner.wait(None if self._wakes == inf else max(0.0, self._wakes - time.monotonic()))
                    late = self._remove_late(time.monotonic())
            for waiting in late:
                self._expired(waiting.request)

    def _remove_late(self, now: float) -> list[Waiting[T]]:
        late = []
        for line in (self._urgent, self._others):
            late += [waiting for waiting in line if waiting.until <= now]
            if late:
                kept = [waiting for waiting in line if waiting.until > now]
                line.clear()
                line.extend(kept)
        return late
