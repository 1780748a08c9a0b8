"""What surrounds the steps of a run: its snapshots, its speed, and the curves that outlive an interruption."""

from __future__ import annotations

import abc
import csv
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from staindiffuser.imaging.errors import ImageError
from staindiffuser.training import resuming
from staindiffuser.training.errors import DataError

__all__ = ["EachStep", "KeepCurves", "Snapshots", "Speed", "TimedLoader"]


class TimedLoader(DataLoader[Any]):
    """A loader that is one batch ahead, and adds up the seconds in which training waited for it.

    Taking a batch from another process takes its time, so a thread does it while the last one is worked on. The
    loader's processes do not hear Ctrl-C and SIGTERM, which a whole group of processes may get: they end with training.

    Args:
        batches: its length: of the whole run, so that a run is one epoch however often it is resumed.
    """

    def __init__(self, *arguments: Any, batches: int, **options: Any) -> None:
        super().__init__(*arguments, **{**options, "worker_init_fn": _deaf})
        self.batches = batches
        self.waited = 0.0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # Lightning needs an iterator, not torch's own
        batches = super().__iter__()
        try:
            with ThreadPoolExecutor(1) as thread:
                coming = thread.submit(next, batches, None)
                while True:
                    start = time.perf_counter()
                    try:
                        batch = coming.result()
                    except (DataError, ImageError) as error:  # into which torch has put the worker's traceback
                        kind = type(error)
                        raise kind(str(error).rstrip().rpartition(f"{kind.__name__}: ")[2]) from None
                    self.waited += time.perf_counter() - start
                    if batch is None:
                        return
                    coming = thread.submit(next, batches, None)
                    yield batch
        finally:
            # After an error Python would end them at its exit, by a signal that they do not hear, and wait for ever.
            if isinstance(batches, _MultiProcessingDataLoaderIter):
                batches._shutdown_workers()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: where to go on follows from the step. That this exists tells Lightning that it can be resumed."""
        return {}

    def load_state_dict(self, _state: dict[str, Any]) -> None:
        """See :meth:`state_dict`."""


def _deaf(_worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class EachStep(L.Callback, abc.ABC):
    """Calls :meth:`on_step` after every optimiser step: not after the parts that a step may be worked through in."""

    _step = 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self.on_step(trainer, module)

    @abc.abstractmethod
    def on_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """``trainer.global_step`` steps are done."""


class Speed(EachStep):
    """Crops per second, and the share of the time in which there was no data to work on.

    Validation and snapshots do not count, nor does the first batch: the loader's processes start with it.
    """

    def __init__(self, loader: TimedLoader, *, crop: int, batch: int, every: int) -> None:
        self.loader, self.crop, self.batch, self.every = loader, crop, batch, every
        self.worked = self.waited = 0.0
        self.crops = 0
        self._start: float | None = None
        self._waited_before = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int) -> None:
        if self._start is not None:
            self.waited += self.loader.waited - self._waited_before
        self._waited_before = self.loader.waited
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        assert self._start is not None
        self.worked += time.perf_counter() - self._start
        self.crops += self.batch
        super().on_train_batch_end(trainer, module, outputs, batch, index)

    def on_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.global_step % self.every == 0:
            values = {f"speed/{name}": value for name, value in self.summary().items()}
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.global_step)

    def summary(self) -> dict[str, float]:
        """Crops per second over all processes, the same in tiles of 256², and the share of the time without data."""
        total = max(self.waited + self.worked, 1e-9)
        crops = self.crops / total
        return {
            "crops_per_second": round(crops, 2),
            "tiles_256_per_second": round(crops * self.crop**2 / 256**2, 3),
            "data_wait_share": round(self.waited / total, 4),
        }


class Snapshots(EachStep):
    """A snapshot every so many minutes or steps, at the last step, and when the run is asked to stop.

    SIGTERM and Ctrl-C ask it to stop: it finishes the step it is at, on every process the same one, saves and stops;
    a second Ctrl-C stops it at once. Only whole steps are saved, so a resumed run is the run that was never stopped.

    Args:
        path: the one snapshot, replaced by each newer one when that is complete.
        minutes: time between two of them.
        steps: steps between two of them, if that is asked for too.
        run: what the run was begun with, kept in the snapshot.
    """

    def __init__(self, path: Path, *, minutes: float, steps: int | None, run: dict[str, Any]) -> None:
        self.path, self.seconds, self.steps, self.run = path, 60 * minutes, steps, run
        self.stopped = False
        """Whether the run was asked to stop before its end."""
        self._asked = False
        self._saved = time.monotonic()

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        super().on_train_start(trainer, module)
        self._saved = time.monotonic()
        # In place of Lightning's handler, which talks to other processes in the middle of whatever this one does.
        # Lightning puts back what was there before when the run ends.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._ask)
            signal.signal(signal.SIGINT, self._ask)

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[resuming.KEY] = self.run

    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Else a run that begins with another's weights would keep that one's learning rate."""
        for schedule in checkpoint["lr_schedulers"]:
            schedule["base_lrs"] = [self.run["recipe"]["learning_rate"]] * len(schedule["base_lrs"])

    def _ask(self, number: int, _frame: Any) -> None:
        self._asked = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        step = trainer.global_step
        any_process = trainer.strategy.reduce_boolean_decision
        due = self._asked or time.monotonic() - self._saved > self.seconds
        due = due or step == trainer.max_steps or (self.steps is not None and step % self.steps == 0)
        if not any_process(due, all=False):
            return
        partial = self.path.with_name(self.path.name + ".partial")
        trainer.save_checkpoint(partial)
        if trainer.is_global_zero:
            partial.replace(self.path)
        self._saved = time.monotonic()
        if any_process(self._asked, all=False):
            trainer.should_stop = self.stopped = True


class KeepCurves(L.Callback):
    """Carries a run's earlier lines over into the new file that Lightning's CSV logger begins on every start.

    Made before that logger; lines of steps that a killed run did after its last snapshot are left out.
    """

    def __init__(self, path: Path) -> None:
        self._rows: list[dict[str, str]] = []
        if path.is_file():
            with path.open(encoding="utf-8", newline="") as file:
                self._rows = list(csv.DictReader(file))

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger):
                for row in self._rows:
                    if int(row["step"]) <= trainer.global_step:
                        values: dict[str, Tensor | float] = {
                            name: float(value) for name, value in row.items() if value and name != "step"
                        }
                        logger.log_metrics(values, step=int(row["step"]))
        self._rows = []

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.on_train_start(trainer, module)  # a finished run does not start again
