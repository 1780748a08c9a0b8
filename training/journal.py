"""What a run says of itself: ``csv/metrics.csv``, TensorBoard, and a progress bar or plain lines on the screen."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import resource
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from staindiffuser.errors import UsageError
from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.training.curves import METRICS, read_rows
from staindiffuser.training.processes import rank
from staindiffuser.training.trackers import Tracker, open_tracker

if TYPE_CHECKING:
    from staindiffuser.training.config import TrainConfig
    from staindiffuser.training.options import RunOptions

__all__ = ["Journal", "ProgressName", "tell"]

ProgressName = Literal["none", "lines", "bar"]
"""How a run shows its progress on standard error: not at all, plain lines that a log can hold, or a bar in a terminal
and lines elsewhere."""
_AGAIN = "make room, then start the same command again"
SECONDS = 60.0
"""Between two plain lines; validations have their own."""


def tell(line: str) -> None:
    """Write a line to standard error, for a person or a log; of several processes only the first does."""
    if rank() == 0:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


_HEADLINES = {"val/dab_dice/": "DAB-Dice", "val/cell_dice/": "cell Dice"}
"""The score of a validation that a line of progress shows: the first that there is."""


class Journal:
    """Where the numbers of a run go; a context. Everything but the first process's writes nothing.

    Args:
        output: the run folder.
        first: optimiser steps that were done before; later rows of an earlier sitting are dropped.
        steps: optimiser steps of the whole run.
        write: whether this is the process that writes.
        tracker: gets the numbers too.
    """

    def __init__(
        self,
        output: Path,
        *,
        first: int,
        steps: int,
        progress: ProgressName,
        write: bool,
        tracker: Tracker | None = None,
    ) -> None:
        self.first, self.steps, self.write = first, steps, write
        self._csv = _Table(output / METRICS, first) if write else None
        self._board = SummaryWriter(output / "tensorboard", purge_step=first + 1) if write else None
        self._tracker = tracker
        self._lines = write and progress != "none"
        self._bar: Progress | None = None
        if write and progress == "bar" and sys.stderr.isatty():
            self._lines = False
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[shown]}"),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task("steps", total=steps, completed=first, shown="")
        self._latest: dict[str, float] = {}
        self._validated = ""
        self._start = self._told = time.monotonic()

    @classmethod
    def open(cls, options: RunOptions, first: int, recipe: TrainConfig, *, write: bool) -> Self:
        """The journal that a run's options ask for."""
        tracker = None
        if options.track and write:
            tracker = open_tracker(options.track, options.output, dataclasses.asdict(recipe))
        return cls(
            options.output, first=first, steps=recipe.steps, progress=options.progress, write=write, tracker=tracker
        )

    def __enter__(self) -> Self:
        self._hook, threading.excepthook = threading.excepthook, self._thread_failed
        if self._bar is not None:
            self._bar.start()
        if self._lines:
            tell(f"training from step {self.first} to {self.steps}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._board is not None:
            with contextlib.suppress(OSError):
                self._board.close()
        threading.excepthook = self._hook
        if self._tracker is not None:
            self._tracker.close()

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        """TensorBoard writes in a thread: its error is raised where the next number is logged, not shown here."""
        if not isinstance(failure.exc_value, OSError):
            self._hook(failure)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add a row to the curves.

        Raises:
            UsageError: the file cannot be written.
        """
        if self._csv is None or self._board is None:
            return
        self._csv.add(values, step)
        try:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        except OSError as error:
            raise UsageError(f"{self._board.log_dir} cannot be written: {error.strerror}: {_AGAIN}") from error
        if self._tracker is not None:
            self._tracker.log(values, step)
        for name, words in _HEADLINES.items():
            if scores := {n.removeprefix(name): v for n, v in values.items() if n.startswith(name)}:
                shown = ", ".join(f"{stain} {value:.3f}" for stain, value in scores.items())
                self._validated = f"validation {words} {shown}"
                self._line(step)
                break
        if "loss" in values:
            self._latest = {name: value for name, value in values.items() if name.startswith(("loss", "error/"))}

    def image(self, name: str, images: Sequence[UInt8Array], step: int) -> None:
        """Images [H, W, 3] below each other, for TensorBoard."""
        if self._board is not None and images:
            with contextlib.suppress(OSError):  # it comes again with the next number
                self._board.add_image(name, np.concatenate(list(images)), step, dataformats="HWC")

    def step(self, step: int) -> None:
        """``step`` steps are done. Shows the loss that was logged last: reading each one would wait for the GPU."""
        if self._bar is not None:
            shown = f"loss {self._latest['loss']:.3f}" if "loss" in self._latest else ""
            self._bar.update(self._task, completed=step, shown=shown)
        elif time.monotonic() - self._told > SECONDS:
            self._line(step)

    def tell(self, line: str) -> None:
        """A line for people, beside the progress."""
        if self._bar is not None:
            self._bar.console.print(line)
        elif self._lines:
            tell(line)

    def _line(self, step: int) -> None:
        if not self._lines:
            return
        self._told = time.monotonic()
        seconds = (self._told - self._start) / max(1, step - self.first) * (self.steps - step)
        parts = [f"step {step} of {self.steps} ({step / self.steps:.0%}), {timedelta(seconds=round(seconds))} left"]
        if self._latest:
            parts.append(", ".join(f"{n.removeprefix('error/')} {v:.3f}" for n, v in self._latest.items()))
        if self._validated:
            parts.append(self._validated)
        tell(" · ".join([*parts, _memory()]))


def _memory() -> str:
    """The most memory that this process has taken, on the GPU if it uses one."""
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of GPU memory"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB of memory"


class _Table:
    """``metrics.csv``: a row per step that has numbers; a new column rewrites the file."""

    def __init__(self, path: Path, last: int) -> None:
        self.path = path
        self._columns = ["step"]
        if path.is_file():
            rows = [row for row in read_rows(path) if int(row["step"]) <= last]
            self._columns = list(dict.fromkeys(["step", *(name for row in rows for name in row)]))
            self._rewrite(rows)

    def add(self, values: Mapping[str, float], step: int) -> None:
        row: dict[str, Any] = {"step": step, **{name: float(value) for name, value in values.items()}}
        new = [name for name in row if name not in self._columns]
        if new or not self.path.is_file():
            rows = read_rows(self.path) if self.path.is_file() else []
            self._columns += new
            self._rewrite([*rows, row])
            return
        try:
            with self.path.open("a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, self._columns, lineterminator="\n").writerow(row)
        except OSError as error:
            raise UsageError(f"{self.path} cannot be written: {error.strerror}: {_AGAIN}") from error

    def _rewrite(self, rows: Sequence[Mapping[str, Any]]) -> None:
        partial = self.path.with_name(f"{self.path.name}.partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, self._columns, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
            partial.replace(self.path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise UsageError(f"{self.path} cannot be written: {error.strerror}: {_AGAIN}") from error
