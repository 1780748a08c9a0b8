"""Batches made ahead of training, by other processes."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from types import TracebackType
from typing import Protocol, Self

import torch

from staindiffuser.training.data.dataset import CropBatch
from staindiffuser.training.errors import LoaderError

__all__ = ["BatchLoader", "Batches", "sample_numbers"]

AHEAD = 4
"""Batches that each process is asked for in advance."""


class Batches(Protocol):
    """What a loader takes its batches from."""

    def batch(self, samples: Iterable[int]) -> CropBatch:
        """The batch of these sample numbers."""
        ...


def sample_numbers(steps: range, *, batch: int, parts: int = 1, rank: int = 0, world: int = 1) -> Iterator[range]:
    """The sample numbers of one process's batches, in order.

    Args:
        steps: optimiser steps; step n takes the samples from n × ``batch`` on.
        batch: samples per step, over all processes and parts.
        parts: batches that each process splits its share of a step into.
    """
    size = batch // (world * parts)
    for step in steps:
        first = step * batch + rank * size * parts
        for part in range(parts):
            yield range(first + part * size, first + (part + 1) * size)


class BatchLoader:
    """A context in which :meth:`take` gives one batch after another.

    A thread receives each batch while the last one is used. An exception in a loader process arrives here with its
    type. The processes have a process group of their own, so that Ctrl-C in a terminal does not reach them, and they
    end when this one does, whatever ends it.

    Args:
        numbers: the sample numbers of each batch.
        workers: loader processes; with 0 the thread makes the batches.
        pin: put batches into page-locked memory.
    """

    def __init__(self, data: Batches, numbers: Iterable[range], *, workers: int, pin: bool = False) -> None:
        self.waited = 0.0
        """Seconds that :meth:`take` has waited so far."""
        self._data, self._numbers, self._pin = data, iter(numbers), pin
        self._asked: deque[Future[CropBatch]] = deque()
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None
        if workers:
            # Forked, so that they share the cache of decoded tiles.
            fork = multiprocessing.get_context("fork")
            self._pool = ProcessPoolExecutor(workers, mp_context=fork, initializer=_begin, initargs=(data,))
        self._thread = ThreadPoolExecutor(1)
        self._next: Future[CropBatch | None] | None = None

    def __enter__(self) -> Self:
        with warnings.catch_warnings():
            # From Python 3.12 on, forking beside any thread warns. The children take no lock that others may hold.
            warnings.filterwarnings("ignore", ".*use of fork.*", DeprecationWarning)
            self._ask()
        self._next = self._thread.submit(self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._thread.shutdown(cancel_futures=True)

    def take(self) -> CropBatch | None:
        """The next batch; None after the last.

        Raises:
            LoaderError: a loader process was killed, or shared memory is too small.
            DataError, ImageError: a tile cannot be read.
        """
        assert self._next is not None, "not entered"
        start = time.perf_counter()
        try:
            batch = self._next.result()
        except BrokenProcessPool:
            raise LoaderError(
                "a loader process was killed, as happens when memory (or /dev/shm) runs out: use fewer --workers, or a "
                "smaller --batch or --crop"
            ) from None
        self.waited += time.perf_counter() - start
        if batch is not None:
            self._next = self._thread.submit(self._receive)
        return batch

    def _ask(self) -> None:
        """Keep the processes busy."""
        while self._pool is not None and len(self._asked) < AHEAD * self._workers:
            numbers = next(self._numbers, None)
            if numbers is None:
                return
            try:
                future = self._pool.submit(_make, numbers)
            except BrokenProcessPool as error:  # to be raised in its turn, after the batches that are there
                future = Future()
                future.set_exception(error)
            self._asked.append(future)

    def _receive(self) -> CropBatch | None:
        """Runs in the thread."""
        if self._pool is None:
            numbers = next(self._numbers, None)
            batch = self._data.batch(numbers) if numbers is not None else None
        else:
            self._ask()
            batch = self._asked.popleft().result() if self._asked else None
        return batch.pin_memory() if self._pin and batch is not None else batch


_data: Batches | None = None
"""In a loader process: what it makes batches of."""


def _begin(data: Batches) -> None:
    """In a loader process: before its first batch."""
    global _data
    _data = data
    os.setpgrp()
    torch.set_num_threads(1)  # the parent's threads did not survive the fork
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _make(numbers: range) -> CropBatch:
    """In a loader process."""
    assert _data is not None
    batch = _data.batch(numbers)
    try:
        return batch.share_memory_()
    except (RuntimeError, OSError) as error:
        raise LoaderError(
            f"shared memory is too small for a batch ({str(error).splitlines()[0]}): enlarge /dev/shm (docker run "
            "--shm-size), or use fewer --workers; with 0 none is needed"
        ) from None
