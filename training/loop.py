"""The training loop: one for every learner, recipe and number of processes. The same command resumes a run."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch

from staindiffuser.errors import DependencyError
from staindiffuser.files import write_json
from staindiffuser.training.config import TrainConfig
from staindiffuser.training.data.dataset import CropBatch
from staindiffuser.training.data.loader import Batches, BatchLoader, sample_numbers
from staindiffuser.training.errors import DivergedError, LoaderError
from staindiffuser.training.journal import Journal
from staindiffuser.training.learner import Curves, Learner, Loss, learning_rate
from staindiffuser.training.options import RunOptions, check_run, locked
from staindiffuser.training.processes import Processes, gradients_kept
from staindiffuser.training.snapshots import Best, Snapshot, Snapshots, begun_with, check_same_run
from staindiffuser.training.tiles.digest import DataDigest

__all__ = ["Fitted", "Validation", "fit"]


class Validation(Protocol):
    """Scores a network during training."""

    def __call__(self, network: Any, step: int, journal: Journal) -> float:
        """Log how good the averaged network is.

        Returns:
            one number to choose the best by; NaN if there is none.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What came of a fit."""

    network: Any
    """The averaged network that the run ends with; whole, on every process."""
    step: int
    """The step that it is of."""
    best: Best | None
    first: bool
    """Whether this process is the one that writes the checkpoint."""
    seconds: float
    """Of this sitting."""
    speed: dict[str, float]
    """Crops per second over all processes, the same in tiles of 256², and the share of the time spent waiting for
    data; empty if there was nothing left to do."""
    data_changes: list[dict[str, Any]]


def fit(
    learner: Learner,
    dataset: Batches,
    recipe: TrainConfig,
    options: RunOptions,
    *,
    first: Snapshot | None = None,
    validation: Validation | None = None,
    data: DataDigest | None = None,
) -> Fitted | None:
    """Train for ``recipe.steps`` optimiser steps; None for a dry run, which only checks.

    Step n takes the samples from n × ``batch`` on, so a run is the same however it is split over processes, in parts
    and by interruptions. SIGTERM or Ctrl-C lets the current step end, saves a snapshot and stops; a second Ctrl-C stops
    at once.

    Args:
        first: the snapshot to go on from.
        validation: called every ``recipe.validate_every`` steps.
        data: digest of the tiles; a snapshot of a run on other tiles is refused.

    Raises:
        UsageError: the output cannot be written, or the snapshot is of another run.
        DivergedError: the loss or a weight is no longer finite.
        LoaderError: a loader process was lost; the last whole step has been saved.
        KeyboardInterrupt: the run was asked to stop, and has saved a snapshot; the message says at which step.
    """
    check_run(recipe, options)
    run = begun_with(learner, recipe, data)
    change = check_same_run(first, run, options) if first else None
    if options.dry_run:
        return None
    with locked(options), contextlib.ExitStack() as stack:
        sitting = _Sitting(
            learner, dataset, recipe, options, Snapshots(options.output, run, first, change), first, stack
        )
        for step in range(sitting.begin, recipe.steps):
            try:
                sitting.step(step)
            except torch.OutOfMemoryError as error:
                raise DependencyError(
                    f"the GPU's memory ran out at step {step}: use a smaller --batch or --crop, or "
                    "--gradient-accumulation"
                ) from error
            if validation and sitting.validation_is_due(step + 1):
                sitting.validate(step + 1, validation)
            sitting.save_if_due(step + 1)
        return sitting.result()


class _Sitting:
    """A run from where it stands to its end or its next interruption."""

    def __init__(
        self,
        learner: Learner,
        dataset: Batches,
        recipe: TrainConfig,
        options: RunOptions,
        snapshots: Snapshots,
        first: Snapshot | None,
        stack: contextlib.ExitStack,
    ) -> None:
        self.learner, self.recipe, self.options, self.snapshots = learner, recipe, options, snapshots
        self.processes = processes = Processes.join()
        self.begin = first.step if first else 0
        learner.to(processes.device)
        if options.strategy == "fsdp":
            learner.shard(processes.mesh)
        else:  # FSDP takes only the plain layout
            learner.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a quarter faster on a CPU
        self.optimizer = learner.optimizer()
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        if first:
            first.restore(learner, self.optimizer)
        self.model = learner if options.strategy == "fsdp" else processes.distribute(learner)
        bf16 = recipe.bf16 and processes.computes_bf16
        self.autocast = torch.autocast(processes.device.type, torch.bfloat16, enabled=bf16)
        numbers = sample_numbers(
            range(self.begin, recipe.steps),
            batch=recipe.batch,
            parts=recipe.gradient_accumulation,
            rank=processes.rank,
            world=processes.world,
        )
        pin = processes.device.type == "cuda"
        # The loader comes first: it forks its processes, which need no copies of the journal's threads.
        self.loader = stack.enter_context(BatchLoader(dataset, numbers, workers=recipe.workers, pin=pin))
        self.stop = stack.enter_context(_StopSignals())
        self.journal = stack.enter_context(Journal.open(options, self.begin, recipe, write=processes.first))
        if first:
            self.journal.tell(f"going on from {first.path}")
        if recipe.bf16 and not bf16:
            self.journal.tell("this device has no instructions for bfloat16: training computes in float32")
        self.finite = _FiniteLosses(dataset, recipe, options, processes, self.snapshots)
        self.speed = _Speed(self.loader, recipe)
        self.started = self.saved = time.monotonic()

    def step(self, step: int) -> None:
        """One optimiser step, and a row of the curves if it is time for one."""
        recipe, parts = self.recipe, self.recipe.gradient_accumulation
        logged = (step + 1) % self.options.log_every == 0
        curves: Curves = {}
        with self.speed.measured(first=step == self.begin):
            for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
                group["lr"] = peak * learning_rate(step, recipe)
            self.optimizer.zero_grad()
            for part in range(parts):
                batch = self._batch(step)
                with gradients_kept(self.model) if part < parts - 1 else contextlib.nullcontext():
                    with self.autocast:
                        loss: Loss = self.model(batch, step)
                    self.finite.note(loss.value, step, part)
                    torch.autograd.backward(loss.value / parts)
                if logged:
                    curves = {name: value + curves.get(name, 0) for name, value in self.learner.curves(loss).items()}
            self.optimizer.step()
            self.learner.after_step(step + 1)
        if logged:
            sums = self.processes.sum(torch.stack(list(curves.values()))).tolist()
            self.journal.log({name: total / n for name, (total, n) in zip(curves, sums, strict=True) if n}, step + 1)
        if self.finite.due(step + 1):
            self.finite.check()
        self.journal.step(step + 1)
        if (step + 1) % recipe.validate_every == 0:
            self.journal.log({f"speed/{name}": value for name, value in self.speed.summary().items()}, step + 1)

    def _batch(self, step: int) -> CropBatch:
        """The next batch, on the device. If any process has none, all of them save the last whole step and stop."""
        batch, error = None, None
        try:
            batch = self.loader.take()
        except Exception as caught:  # raised again, once every process knows
            error = caught
        if self.processes.any(error is not None):
            self.save(step)
            if self.stop.asked:  # what asked this process to stop may have ended its loader
                raise self._stopped(step)
            raise error or LoaderError("another process lost its loader, and says why")
        assert batch is not None
        return batch.to(self.processes.device)

    def validation_is_due(self, step: int) -> bool:
        """Every so many steps, and at the end of a run that was long enough for any."""
        return step % self.recipe.validate_every == 0 or step == self.recipe.steps > self.recipe.validate_every

    def validate(self, step: int, validation: Validation) -> None:
        """Score the averaged network, and keep it if it is the best so far."""
        self.finite.check()
        network = self.learner.averaged()  # by every process: its weights may have to be gathered
        if self.processes.first:
            self.snapshots.save_best(step, validation(network, step, self.journal), network.state_dict())

    def save_if_due(self, step: int) -> None:
        """Save a snapshot every so many minutes or steps, at the end, and when the run is asked to stop.

        Raises:
            KeyboardInterrupt: it was asked to.
        """
        recipe = self.recipe
        due = step == recipe.steps or (recipe.checkpoint_steps is not None and step % recipe.checkpoint_steps == 0)
        due = due or time.monotonic() - self.saved > 60 * recipe.checkpoint_minutes
        stop = self.processes.any(self.stop.asked)
        if self.processes.any(due or stop):
            self.save(step)
            self.saved = time.monotonic()
        if stop and step < recipe.steps:
            raise self._stopped(step)

    def save(self, step: int) -> None:
        """Save a snapshot, unless there is one of this step."""
        if step > self.begin and step != self.snapshots.step:
            self.finite.check()
            self.snapshots.save(step, self.learner, self.optimizer, write=self.processes.first)

    def _stopped(self, step: int) -> KeyboardInterrupt:
        saved = "which is saved: the same command goes on from there" if step else "before the first: nothing to save"
        return KeyboardInterrupt(f"stopped after step {step} of {self.recipe.steps}, {saved}")

    def result(self) -> Fitted:
        """What the run ends with."""
        network, step, best = self.learner.averaged(), self.recipe.steps, self.snapshots.best
        if self.options.keep == "best" and best and best.step != step:
            step = best.step
            network.load_state_dict(self.snapshots.load_best())
        speed = self.speed.summary() if self.speed.crops else {}
        if self.processes.first and speed:
            write_json(self.options.output / "speed.json", speed)
        return Fitted(
            network=network,
            step=step,
            best=best,
            first=self.processes.first,
            seconds=time.monotonic() - self.started,
            speed=speed,
            data_changes=self.snapshots.data_changes,
        )


class _FiniteLosses:
    """Stops every process as soon as the loss of any is not finite; that process saves the batch beside the run.

    Reading a loss waits for the GPU, which then idles until the next step has been launched. So the first bad loss is
    recorded on the GPU, and read every ``log_every`` steps and before anything is saved or validated. The batch is made
    again from its sample numbers.
    """

    NONE = 2**62

    def __init__(
        self, data: Batches, recipe: TrainConfig, options: RunOptions, processes: Processes, snapshots: Snapshots
    ) -> None:
        self._data, self._recipe, self._options = data, recipe, options
        self._processes, self._snapshots = processes, snapshots
        self._every = options.log_every if processes.device.type == "cuda" else 1
        self._bad = torch.full((), self.NONE, device=processes.device)
        """The first part of a step with a bad loss, counted over all steps."""

    def note(self, loss: torch.Tensor, step: int, part: int) -> None:
        """Record the part if its loss is the first that is not finite; does not wait."""
        number = step * self._recipe.gradient_accumulation + part
        first = (self._bad == self.NONE) & ~torch.isfinite(loss.detach())
        self._bad = torch.where(first, number, self._bad)

    def due(self, done: int) -> bool:
        """Whether it is time to check."""
        return done % self._every == 0

    def check(self) -> None:
        """Read the record; all processes must do so at the same point.

        Raises:
            DivergedError: names the file, and how to continue.
        """
        mine = int(self._bad)
        # After its step a bad gradient is everybody's: only the first bad part is a cause.
        first = self._processes.smallest(mine)
        if first == self.NONE:
            return
        step, part = divmod(first, self._recipe.gradient_accumulation)
        what = f"training diverged: the loss is not finite at step {step}"
        if mine != first:
            raise DivergedError(f"{what} on another process, which names the batch")
        numbers = sample_numbers(
            range(step, step + 1),
            batch=self._recipe.batch,
            parts=self._recipe.gradient_accumulation,
            rank=self._processes.rank,
            world=self._processes.world,
        )
        batch = self._data.batch(list(numbers)[part])
        suffix = f"-{self._processes.rank}" if self._processes.rank else ""
        path = self._options.output / f"diverged-batch{suffix}.pt"
        torch.save({"batch": vars(batch), "step": step}, path)
        raise DivergedError(f"{what}: the batch is in {path}; {self._snapshots.advice()} and a lower learning rate")


class _StopSignals:
    """Notes SIGTERM and the first Ctrl-C; the second Ctrl-C has its usual effect. A context, in the main thread."""

    asked = False

    def __enter__(self) -> Self:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _frame: object) -> None:
        self.asked = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


class _Speed:
    """Crops per second, and the share of the time in which there was no data to work on.

    Validations and snapshots do not count, nor does the wait for the first batch: the loader starts with it.
    """

    def __init__(self, loader: BatchLoader, recipe: TrainConfig) -> None:
        self.loader, self.recipe = loader, recipe
        self.worked = self.waited = 0.0
        self.crops = 0

    @contextlib.contextmanager
    def measured(self, *, first: bool) -> Iterator[None]:
        """Around an optimiser step."""
        start, waited = time.perf_counter(), self.loader.waited
        yield
        waited = self.loader.waited - waited
        self.worked += time.perf_counter() - start - waited
        self.waited += 0 if first else waited
        self.crops += self.recipe.batch

    def summary(self) -> dict[str, float]:
        """Crops per second over all processes, the same in tiles of 256², and the share of the time without data."""
        total = max(self.waited + self.worked, 1e-9)
        crops = self.crops / total
        return {
            "crops_per_second": round(crops, 2),
            "tiles_256_per_second": round(crops * self.recipe.crop**2 / 256**2, 3),
            "data_wait_share": round(self.waited / total, 4),
        }
