"""Snapshots of a run: the newest three to go on from, and the best network by validation.

``snapshots/step-00000120.ckpt`` holds everything that the next step depends on, and what the run was begun with, so
that no other run goes on from it unnoticed. ``last.ckpt`` links to the newest, ``best.ckpt`` holds the moving average
of the weights at the best validation. Files are written beside their final name, then renamed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from staindiffuser.errors import UsageError
from staindiffuser.training.checkpoint import not_finite
from staindiffuser.training.config import TrainConfig
from staindiffuser.training.errors import DivergedError
from staindiffuser.training.learner import Learner
from staindiffuser.training.options import RunOptions
from staindiffuser.training.tiles.digest import DataDigest, differences

__all__ = ["Best", "Snapshot", "Snapshots", "begun_with", "check_same_run", "find_snapshot", "read_snapshot"]

FOLDER, LAST, BEST = "snapshots", "last.ckpt", "best.ckpt"
KEPT = 3
FORMAT = 1
_STEP = re.compile(r"step-(\d{8})\.ckpt")
_PARTIAL = ".partial"
_FREE = {
    "gradient_accumulation",
    "workers",
    "checkpoint_minutes",
    "checkpoint_steps",
    "validate_every",
    "validation_tiles",
}
"""Fields of a recipe that may change when a run is resumed: they do not decide what is learned."""
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best validation so far."""

    step: int
    score: float


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A snapshot that has been read."""

    path: Path
    step: int
    """Optimiser steps done."""
    run: dict[str, Any]
    """What :func:`begun_with` returned for the run that left it."""
    data_changes: list[dict[str, Any]]
    """Where the run went on with other data: step, and what differed."""
    learner: dict[str, Tensor] = field(repr=False)
    optimizer: dict[str, Any] = field(repr=False)

    def restore(self, learner: Learner, optimizer: torch.optim.Optimizer) -> None:
        """Put the state back."""
        set_state_dict(
            learner,
            optimizer,
            model_state_dict=dict(self.learner),
            optim_state_dict=self.optimizer,
            options=StateDictOptions(full_state_dict=True),
        )


def begun_with(learner: Learner, config: TrainConfig, data: DataDigest | None) -> dict[str, Any]:
    """What decides a run: the kind of learner, what it starts from, the recipe, and the data (if known)."""
    run = {
        "kind": type(learner).__name__,
        "starts_from": learner.starts_from,
        "recipe": dataclasses.asdict(config),
        "data": data,
    }
    result: dict[str, Any] = json.loads(json.dumps(run))  # as it is when it has been read
    return result


def read_snapshot(path: Path) -> Snapshot:
    """Read a snapshot and check that it is whole and finite.

    Raises:
        UsageError: it cannot be resumed from.
    """
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a damaged file makes torch raise
        raise UsageError(f"{path} cannot be resumed from: {_reason(error)}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UsageError(f"{path} is not a snapshot of a run of this version: choose another --output or --resume")
    if bad := not_finite(data["learner"]):
        raise UsageError(f"{path} cannot be resumed from: {bad}")
    return Snapshot(
        path=path,
        step=data["step"],
        run=data["run"],
        data_changes=data["data_changes"],
        learner=data["learner"],
        optimizer=data["optimizer"],
    )


def find_snapshot(
    output: Path, resume: bool | Path, tell: Callable[[str], None] = lambda line: None
) -> Snapshot | None:
    """The snapshot that a run goes on from: the newest of its own that can be read, or else ``resume``.

    Args:
        tell: told which snapshots had to be passed over.

    Raises:
        UsageError: there are snapshots, but none can be read; or the one that was named cannot.
    """
    failures = []
    for path in reversed(_kept(output / FOLDER)):
        try:
            found = read_snapshot(path)
        except UsageError as error:
            failures.append(error)
            continue
        for failure in failures:
            tell(f"{failure}; going on from {found.path.name}")
        return found
    if failures:
        raise failures[0]
    if (output / FOLDER / LAST).is_file():  # a link to nothing is no file
        raise UsageError(
            f"{output / FOLDER} is of an earlier version, which cannot be resumed: choose another --output"
        )
    return read_snapshot(resume) if isinstance(resume, Path) else None


def check_same_run(snapshot: Snapshot, run: dict[str, Any], options: RunOptions) -> dict[str, Any] | None:
    """Refuse a snapshot of another run. The recipe may differ if the snapshot is not in the run's own folder.

    Args:
        run: :func:`begun_with` of the run that is to go on from it.

    Returns:
        the change of data that was accepted, for the record; None if there is none.

    Raises:
        UsageError: it is of another run, or the data are not those that the run was begun with.
    """
    path, before = snapshot.path, snapshot.run
    if before["kind"] != run["kind"]:
        raise UsageError(f"{path} is of another kind of run ({before['kind']}): choose another --output")
    for what, value in run["starts_from"].items():
        if before["starts_from"].get(what) != value:
            raise UsageError(f"{path}: the run was begun with another {what}: choose another --output")
    frozen, wanted = before["recipe"].get("frozen_blocks", 0), run["recipe"]["frozen_blocks"]
    if wanted < frozen:  # Adam's state of the frozen blocks is not in the snapshot
        raise UsageError(
            f"{path}: the run was begun with frozen_blocks = {frozen}, and cannot go on with {wanted}: use {frozen} or "
            "more, or begin a new run --from its checkpoint"
        )
    if snapshot.path.is_relative_to(options.output):
        for name, value in run["recipe"].items():
            old = before["recipe"].get(name)
            if name not in _FREE and old != value:
                raise UsageError(
                    f"{path}: the run was begun with {name} = {old!r}, not {value!r}: choose another --output "
                    "(and --resume this snapshot, to start from its weights)"
                )
    if run["data"] is None or before["data"] is None or run["data"] == before["data"]:
        return None
    differing = differences(before["data"], run["data"])
    if not options.accept_data_change:
        raise UsageError(
            f"{path}: the run was begun with other data ({', '.join(differing)}): restore them, choose another "
            "--output, or go on with --accept-data-change"
        )
    return {"step": snapshot.step, "differing": differing}


class Snapshots:
    """Writes a run's snapshots; :meth:`save` must be called by every process, the others by the first.

    Args:
        output: the run folder.
        run: see :func:`begun_with`.
        first: the snapshot that the run goes on from.
        change: the change of data that was accepted.
    """

    def __init__(
        self, output: Path, run: dict[str, Any], first: Snapshot | None, change: dict[str, Any] | None
    ) -> None:
        self.folder, self.run = output / FOLDER, run
        self.step = first.step if first else 0
        """The step of the newest one."""
        self.best: Best | None = None
        if first and first.path.parent == self.folder and not change:
            with contextlib.suppress(UsageError):
                found, _ = self._read_best()
                self.best = found if found.step <= first.step else None
        self.data_changes = [*(first.data_changes if first else []), *([change] if change else [])]
        self.saved: Path | None = first.path if first else None
        """The newest good one."""

    def save(self, step: int, learner: Learner, optimizer: torch.optim.Optimizer, *, write: bool) -> None:
        """Save the state after ``step`` steps.

        Args:
            write: whether this is the process that writes.

        Raises:
            DivergedError: a weight is not finite; the older snapshots stay.
            UsageError: it cannot be written; the older snapshots stay.
        """
        state_dict, moments = get_state_dict(learner, optimizer, options=_WHOLE)
        if not write:
            return
        weights = {name: tensor for name, tensor in state_dict.items() if isinstance(tensor, Tensor)}
        if bad := not_finite(weights):
            raise DivergedError(
                f"training diverged: after step {step} {bad}; {self.advice()} and a lower learning rate"
            )
        state = {
            "format": FORMAT,
            "step": step,
            "run": self.run,
            "data_changes": self.data_changes,
            "learner": weights,
            "optimizer": moments,
        }
        path = self.folder / f"step-{step:08}.ckpt"
        with self._replacing(path) as partial:
            _write(state, partial)
        with self._replacing(self.folder / LAST) as partial:
            partial.symlink_to(path.name)
        for old in _kept(self.folder)[:-KEPT]:
            old.unlink()
        self.saved, self.step = path, step

    def save_best(self, step: int, score: float, network: dict[str, Tensor]) -> None:
        """Keep the network of a validation if no earlier one was better; not if the score is NaN.

        Raises:
            UsageError: it cannot be written.
        """
        if math.isnan(score) or (self.best and score < self.best.score) or not_finite(network):
            return
        with self._replacing(self.folder / BEST) as partial:
            _write({"format": FORMAT, "step": step, "score": score, "network": network}, partial)
        self.best = Best(step=step, score=score)

    def load_best(self) -> dict[str, Tensor]:
        """The network of :attr:`best`.

        Raises:
            UsageError: it cannot be read.
        """
        return self._read_best()[1]

    def _read_best(self) -> tuple[Best, dict[str, Tensor]]:
        path = self.folder / BEST
        try:
            data = torch.load(path, map_location="cpu", weights_only=True)
            found, network = Best(step=data["step"], score=data["score"]), data["network"]
        except Exception as error:  # whatever a damaged file makes torch raise
            raise UsageError(
                f"{path} cannot be read ({_reason(error)}): --keep last ends with the last weights"
            ) from error
        if bad := not_finite(network):
            raise UsageError(f"{path}: {bad}: --keep last ends with the last weights")
        return found, network

    def advice(self) -> str:
        """How to go on after the run diverged."""
        resume = f" --resume {self.saved}," if self.saved else ""
        return f"choose another --output,{resume}"

    @contextlib.contextmanager
    def _replacing(self, path: Path) -> Iterator[Path]:
        partial = path.with_name(path.name + _PARTIAL)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial.unlink(missing_ok=True)  # of a killed run
            yield partial
            partial.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            kept = f" ({self.saved} is kept)" if self.saved else ""
            raise UsageError(
                f"{path} cannot be written: {error.strerror or error}: make room, then start the same command "
                f"again{kept}"
            ) from error


def _write(state: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # what torch's writer makes of an error of the file
            raise OSError(_reason(error)) from error
        file.flush()
        os.fsync(file.fileno())


def _reason(error: Exception) -> str:
    """The first line of an error's message."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _kept(folder: Path) -> list[Path]:
    """The snapshots of a run, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _STEP.fullmatch(path.name))
