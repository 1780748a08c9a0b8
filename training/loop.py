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
from staindiffuser.training.trackers import open_tracker

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
    begin, steps, parts = first.step if first else 0, recipe.steps, recipe.gradient_accumulation
    if options.dry_run:
        return None
    with locked(options), contextlib.ExitStack() as stack:
        processes = Processes.join()
        learner.to(processes.device)
        if options.strategy == "fsdp":
            learner.shard(processes.mesh)
        else:  # FSDP takes only the plain layout
            learner.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a quarter faster on a CPU
        optimizer = learner.optimizer()
        peaks = [group["lr"] for group in optimizer.param_groups]
        if first:
            first.restore(learner, optimizer)
        model = learner if options.strategy == "fsdp" else processes.distribute(learner)
        autocast = torch.autocast(processes.device.type, torch.bfloat16, enabled=recipe.bf16)
        snapshots = Snapshots(options.output, run, first, change)
        numbers = sample_numbers(
            range(begin, steps), batch=recipe.batch, parts=parts, rank=processes.rank, world=processes.world
        )
        pin = processes.device.type == "cuda"
        loader = stack.enter_context(BatchLoader(dataset, numbers, workers=recipe.workers, pin=pin))
        stop = stack.enter_context(_StopSignals())
        tracker = None
        if options.track and processes.first:
            tracker = open_tracker(options.track, options.output, run["recipe"])
        journal = Journal(
            options.output,
            first=begin,
            steps=steps,
            progress=options.progress,
            write=processes.first,
            tracker=tracker,
        )
        stack.enter_context(journal)
        if first:
            journal.tell(f"going on from {first.path}")

        def save(step: int) -> None:
            if step > begin and step != snapshots.step:
                snapshots.save(step, learner, optimizer, write=processes.first)

        def batch_of(step: int) -> CropBatch:
            batch, error = _take(loader)
            if processes.any(error is not None):  # in any process, so that all of them save and stop
                save(step)
                if stop.asked:
                    raise KeyboardInterrupt(_stopped(step, steps))
                raise error or LoaderError("another process lost its loader, and says why")
            assert batch is not None
            return batch.to(processes.device)

        started = saved = time.monotonic()
        speed = _Speed(loader, recipe)
        for step in range(begin, steps):
            with speed.measured(first=step == begin):
                curves: Curves = {}
                logged = (step + 1) % options.log_every == 0
                for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                    group["lr"] = peak * learning_rate(step, recipe)
                optimizer.zero_grad()
                for part in range(parts):
                    batch = batch_of(step)
                    with gradients_kept(model) if part < parts - 1 else contextlib.nullcontext():
                        with autocast:
                            loss = model(batch, step)
                        _stop_if_not_finite(loss, batch, step, options, processes, snapshots)
                        torch.autograd.backward(loss.value / parts)
                    if logged:
                        curves = {name: value + curves.get(name, 0) for name, value in learner.curves(loss).items()}
                optimizer.step()
                learner.after_step(step + 1)
            done = step + 1
            if logged:
                sums = processes.sum(torch.stack(list(curves.values()))).tolist()
                journal.log({name: total / n for name, (total, n) in zip(curves, sums, strict=True) if n}, done)
            journal.step(done, loss.value)
            if done % recipe.validate_every == 0:
                journal.log({f"speed/{name}": value for name, value in speed.summary().items()}, done)
            if validation and (done % recipe.validate_every == 0 or (done == steps > recipe.validate_every)):
                network = learner.averaged()  # by every process: its weights may have to be gathered
                if processes.first:
                    snapshots.save_best(done, validation(network, done, journal), network.state_dict())
            by_step = recipe.checkpoint_steps is not None and done % recipe.checkpoint_steps == 0
            by_time = time.monotonic() - saved > 60 * recipe.checkpoint_minutes
            if processes.any(stop.asked or by_step or by_time or done == steps):
                save(done)
                saved = time.monotonic()
            if processes.any(stop.asked) and done < steps:
                raise KeyboardInterrupt(_stopped(done, steps))
        network, step = learner.averaged(), steps
        if options.keep == "best" and snapshots.best and snapshots.best.step != steps:
            step = snapshots.best.step
            network.load_state_dict(snapshots.load_best())
        if processes.first and speed.crops:
            write_json(options.output / "speed.json", speed.summary())
        return Fitted(
            network=network,
            step=step,
            best=snapshots.best,
            first=processes.first,
            seconds=time.monotonic() - started,
            speed=speed.summary() if speed.crops else {},
            data_changes=snapshots.data_changes,
        )


def _take(loader: BatchLoader) -> tuple[CropBatch | None, Exception | None]:
    """The next batch, or why there is none."""
    try:
        return loader.take(), None
    except Exception as error:  # raised again, once every process knows
        return None, error


def _stopped(step: int, steps: int) -> str:
    return f"stopped after step {step} of {steps}, which is saved: the same command goes on from there"


def _stop_if_not_finite(
    loss: Loss, batch: CropBatch, step: int, options: RunOptions, processes: Processes, snapshots: Snapshots
) -> None:
    """Stop every process if any one's loss is not finite; that one saves its batch beside the run.

    Raises:
        DivergedError: naming the file, and how to go on.
    """
    finite = bool(torch.isfinite(loss.value))
    if not processes.any(not finite):
        return
    what = f"training diverged: the loss is not finite at step {step}"
    if finite:
        raise DivergedError(f"{what} on another process, which names the batch")
    suffix = f"-{processes.rank}" if processes.rank else ""
    path = options.output / f"diverged-batch{suffix}.pt"
    torch.save({"batch": vars(batch), "step": step}, path)
    raise DivergedError(f"{what}: the batch is in {path}; {snapshots.advice()} and a lower learning rate")


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
