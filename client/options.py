"""How a slide is stained."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["StainingOptions"]


@dataclass(frozen=True, kw_only=True)
class StainingOptions:
    """The choices of one run."""

    stains: tuple[str, ...] | None = None
    """Names of the stains; all the model has for None."""
    seed: int = 0
    """Decides the noise: the same seed gives the same pixels. 0 … 2⁶³ − 1."""
    mpp: float | None = None
    """Pixel size of the input, µm, instead of what the file says."""
    batch: int = 4
    """Tiles in a request; the model's limit where that is lower."""
    in_flight: int = 3
    """Requests with the server at a time."""
    cells: bool = True
    """Make cell maps and search them for cells."""
    preview: bool = False
    """Make ``preview.png``."""
    overwrite: bool = False
    """Replace a result that is there."""
    resume: bool = False
    """Keep a complete result of the same slide, model and options; make it again where anything differs."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2^63 - 1, not {self.seed}")
        if self.mpp is not None and not 0.01 <= self.mpp <= 100:
            raise ValueError(f"mpp must be from 0.01 to 100 µm, not {self.mpp:g}")
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, not {self.batch}")
        if self.in_flight < 1:
            raise ValueError(f"in_flight must be at least 1, not {self.in_flight}")
        if self.overwrite and self.resume:
            raise ValueError("overwrite and resume exclude each other")
