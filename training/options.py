"""What is asked of a run besides its recipe, and what can be refused before anything else is looked at."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from staindiffuser.errors import UsageError
from staindiffuser.files import check_folder
from staindiffuser.training.config import TrainConfig
from staindiffuser.training.journal import ProgressName
from staindiffuser.training.processes import StrategyName, rank, world_size
from staindiffuser.training.tiles.folds import Fold
from staindiffuser.training.trackers import TrackerName

__all__ = ["Keep", "RunOptions", "check_run", "check_writable", "locked"]

Keep = Literal["best", "last"]
"""Which weights a run ends with: those of the best validation, or those of the last step."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What is asked of a run besides its recipe."""

    output: Path
    """Run folder: curves, snapshots, and the finished ``checkpoint/``."""
    name: str = "model"
    """Name written into the checkpoint."""
    trained_on: str = "the data named in its card"
    """What the notice on every output says that the model was trained on."""
    resume: bool | Path = True
    """Go on from the run folder's newest snapshot if there is one, or else from this snapshot: of another run perhaps,
    with another recipe, but of the same model."""
    start: Path | None = None
    """Begin with the weights, sizes and constants of this checkpoint instead of random weights."""
    accept_data_change: bool = False
    """Go on although the data are not those that the run was begun with; the checkpoint says so."""
    keep: Keep = "best"
    fold: Fold | None = None
    """Validate on this part of the patients instead of the split ``val``, and train on the others."""
    strategy: StrategyName = "ddp"
    """With several processes: each holds the whole model (``ddp``) or a share of it (``fsdp``)."""
    log_every: int = 20
    """Steps between two rows of the curves."""
    progress: ProgressName = "none"
    track: TrackerName | None = None
    """A tracker that gets the curves too."""
    dry_run: bool = False
    """Check everything, train nothing."""


def check_run(config: TrainConfig, options: RunOptions, source: Path | None = None) -> None:
    """Refuse what cannot be run, without writing anything.

    Args:
        source: the checkpoint that the run is made from, if there is one.

    Raises:
        ModuleNotFoundError: the tracker is not installed.
        UsageError: the batch cannot be shared, a snapshot is missing or unwanted, or the output cannot be written.
    """
    world = world_size()
    parts = world * config.gradient_accumulation
    if config.batch % parts:
        raise UsageError(
            f"batch is {config.batch}: {world} processes of {config.gradient_accumulation} parts each cannot share it; "
            f"choose a multiple of {parts}"
        )
    if options.strategy == "fsdp" and world == 1:
        raise UsageError("--strategy fsdp splits the weights over several processes: start them with torchrun")
    if isinstance(options.resume, Path) and not options.resume.is_file():
        raise UsageError(f"--resume {options.resume}: no such snapshot")
    if options.resume is False and any((options.output / "snapshots").glob("*.ckpt")):
        raise UsageError(f"{options.output} holds a run already: choose another --output, or resume it")
    for option, text in (("--name", options.name), ("--trained-on", options.trained_on)):
        if text != text.encode(errors="replace").decode():
            raise UsageError(
                f"{option} holds bytes that are not UTF-8: type it again in a terminal whose locale is UTF-8"
            )
    check_writable(options.output, source)
    if options.track and find_spec(options.track) is None:
        raise ModuleNotFoundError(name=options.track)


def check_writable(output: Path, source: Path | None = None) -> None:
    """Refuse a run folder that cannot be written, or whose checkpoint is the one that the run is made from.

    Raises:
        UsageError: with the reason.
    """
    if source is not None and (output / "checkpoint").resolve() == source.resolve():
        raise UsageError(f"--output {output} would replace {source}: choose another")
    check_folder(output)


@contextlib.contextmanager
def locked(options: RunOptions) -> Iterator[None]:
    """Make the run folder, and keep other runs out of it. The first process locks for all; locks may be nested.

    A dry run makes nothing and locks nothing.

    Raises:
        UsageError: another run is at work there, or the folder cannot be written.
    """
    output = options.output
    if options.dry_run or rank() > 0:
        yield
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output / "run.lock", timeout=0, is_singleton=True)
        lock.acquire()
    except Timeout:
        raise UsageError(f"another run is writing to {output}: wait for it, or choose another --output") from None
    except OSError as error:
        raise UsageError(f"{output} cannot be written: {error.strerror}; choose another --output") from error
    try:
        yield
    finally:
        lock.release()
