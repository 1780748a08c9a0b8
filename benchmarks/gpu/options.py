"""The options and the result of each step of ``verify_gpu``."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from staindiffuser.files import write_json

__all__ = ["Check", "GpuOptions", "StepResult", "grey_levels"]


@dataclass(frozen=True, kw_only=True)
class GpuOptions:
    """What to verify, and how long it may take."""

    output: Path
    """Folder of the results."""
    device: str
    """``cuda``, or ``cpu`` for a rehearsal, whose timings mean nothing."""
    graphs: Path
    """Graphs folder whose engines are checked."""
    preset: str
    """Size of the network whose stages are timed; its weights are random."""
    tile: int
    """Height and width of the tiles that stages are timed with, pixels."""
    batches: tuple[int, ...]
    """Batch sizes that stages are timed with."""
    seconds_each: float
    """Time spent on one measurement, seconds."""
    compiled: bool
    """Also measure ``torch.compile``, which takes the longest."""
    train_preset: str
    """Preset to train in the remaining time."""
    tiles: Path | None
    """Paired tiles to train on; None to simulate them."""
    limit: float
    """Seconds after which the step starts nothing new."""


@dataclass
class StepResult:
    """What a step has found so far, written to ``<output>/<step>.json`` after each finding."""

    path: Path
    limit: float
    data: dict[str, Any] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    """Failures; a step with any has failed."""
    left_out: list[str] = field(default_factory=list)
    """What was not done because of the time limit."""
    skipped: str = ""
    """Why the whole step does not apply to this machine; empty if it does."""
    began: float = field(default_factory=time.monotonic)

    @property
    def over(self) -> bool:
        """Whether the time limit has passed."""
        return time.monotonic() - self.began > self.limit

    def write(self) -> None:
        """Write the findings so far."""
        status = "failed" if self.errors else "skipped" if self.skipped else "passed"
        more = {"skipped": self.skipped} if self.skipped else {}
        seconds = round(time.monotonic() - self.began, 2)
        ends = {"errors": self.errors, "left_out": self.left_out}
        write_json(self.path, {"status": status, "seconds": seconds, **more, **ends, **self.data})

    def attempt(self, what: str, do: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call a function unless the time is up; an error is recorded and the step continues. Returns None then."""
        if self.over:
            self.left_out.append(f"{what}: the time limit")
            self.write()
            return None
        try:
            return do(*arguments, **options)
        except Exception as error:  # GPU libraries raise anything; it is reported, and the step continues
            lines = str(error).splitlines() or [""]
            self.errors.append(f"{what}: {type(error).__name__}: {lines[0][:300]}")
            return None
        finally:
            self.write()


@dataclass(frozen=True, kw_only=True)
class Check:
    """The difference between two results."""

    max_levels: float
    """Largest difference, grey levels; for features in hundredths of their largest value."""
    share_over_one: float
    """Share of values that differ by more than one."""

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return dataclasses.asdict(self)


def grey_levels(found: Any, wanted: Any) -> Check:
    """Compare arrays or tensors: uint8 in grey levels, features in hundredths of the largest value.

    Raises:
        ValueError: the shapes differ, or a value is not finite.
    """
    a, b = (np.asarray(x.detach().float().cpu() if hasattr(x, "detach") else x, np.float32) for x in (found, wanted))
    if a.shape != b.shape:
        raise ValueError(f"shape {a.shape}, but {b.shape} is wanted")
    if not np.isfinite(a).all():
        raise ValueError("NaN or infinity")
    features = not str(wanted.dtype).endswith("uint8")
    apart = np.abs(a - b) / (max(float(np.abs(b).max()), 1e-6) / 100 if features else 1)
    return Check(max_levels=float(apart.max()), share_over_one=float((apart > 1).mean()))
