"""Messages and progress of the command line, on stderr: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager, contextmanager
from typing import ParamSpec, Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from staindiffuser.client.run_record import printable

__all__ = ["QuietReporter", "Reporter", "Stopwatch", "TerminalReporter"]


P = ParamSpec("P")
T = TypeVar("T")

LINE_SECONDS = 60.0
"""Between two lines of progress where there is no terminal."""


class Reporter(Protocol):
    """Receives messages and the progress of a slide; called from one thread."""

    def say(self, line: str) -> None:
        """Show a line to the user."""
        ...

    def start(self, name: str, tiles: int) -> None:
        """Staining of this many tiles begins."""
        ...

    def advance(self, tiles: int) -> None:
        """This many more tiles are done."""
        ...

    def stop(self) -> None:
        """Staining has ended."""
        ...


class QuietReporter:
    """Shows nothing."""

    def say(self, line: str) -> None:
        """Ignore."""

    def start(self, name: str, tiles: int) -> None:
        """Ignore."""

    def advance(self, tiles: int) -> None:
        """Ignore."""

    def stop(self) -> None:
        """Ignore."""


class TerminalReporter:
    """A progress bar with rate and time left; if stderr is not a terminal, messages and a line every minute."""

    def __init__(self) -> None:
        self.prefix = ""
        """Precedes a slide's name, such as ``slide 3 of 200 · ``."""
        self.hide: Callable[[str], str] = str
        """Takes slides' names out of a line that may be kept: one that is not written on a terminal."""
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._name, self._tiles, self._done = "", 0, 0
        self._since = self._said = 0.0

    @property
    def is_terminal(self) -> bool:
        """Whether lines are read as they come; else they are a log."""
        return self._console.is_terminal

    def say(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        self._console.print(printable(line if self.is_terminal else self.hide(line)), markup=False)

    def start(self, name: str, tiles: int) -> None:
        """Show the progress bar."""
        self._name, self._tiles = self.prefix + name, tiles
        self._done, self._since = 0, time.perf_counter()
        self._said = self._since
        if not self._console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("tiles · {task.fields[rate]} ·"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self._console,
        )
        self._task = self._progress.add_task(printable(self._name), total=tiles, rate="…")
        self._progress.start()

    def advance(self, tiles: int) -> None:
        """Advance the progress bar."""
        self._done += tiles
        now = time.perf_counter()
        rate = self._done / max(1e-6, now - self._since)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, advance=tiles, rate=f"{rate:.1f} tiles/s")
        elif now - self._said >= LINE_SECONDS:
            self._said = now
            self.say(f"{self._name}: {self._done} of {self._tiles} tiles · {rate:.1f} tiles/s")

    def stop(self) -> None:
        """Remove the progress bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class Stopwatch:
    """Seconds per stage, summed over threads: stages that overlap add up to more than the total."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._cpu: dict[str, float] = {}
        self._lock = threading.Lock()
        self._start = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside the context to ``name``."""
        start = time.perf_counter()
        try:
            with self._working(name):
                yield
        finally:
            with self._lock:
                self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def workers(self, name: str, pool: Executor) -> Executor:
        """``pool``, with the processor time of what is submitted to it added to ``name``."""
        return _Workers(pool, lambda: self._working(name))

    @property
    def total(self) -> float:
        """Seconds since the stopwatch was made."""
        return time.perf_counter() - self._start

    def seconds(self) -> dict[str, float]:
        """Per stage, rounded to milliseconds."""
        return {name: round(value, 3) for name, value in self._seconds.items()}

    def cpu_seconds(self) -> dict[str, float]:
        """Processor time per stage, of the threads inside it and of its :meth:`workers`, rounded to milliseconds."""
        return {name: round(value, 3) for name, value in self._cpu.items()}

    @contextmanager
    def _working(self, name: str) -> Iterator[None]:
        start = time.thread_time()
        try:
            yield
        finally:
            with self._lock:
                self._cpu[name] = self._cpu.get(name, 0.0) + time.thread_time() - start


class _Workers(Executor):
    """A pool that does what is submitted to it inside a context."""

    def __init__(self, pool: Executor, context: Callable[[], AbstractContextManager[None]]) -> None:
        self._pool, self._context = pool, context

    def submit(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        def work() -> T:
            with self._context():
                return function(*args, **kwargs)

        return self._pool.submit(work)
