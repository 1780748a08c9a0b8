"""What ``bench engines`` records: a row for each engine, part of the work and batch size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from staindiffuser.benchmarks.measuring import QUIET, Machine, Spread, Timing

__all__ = ["ONE_GRAPH", "REFERENCE", "TURN", "EnginesReport", "Row"]

REFERENCE = "onnxruntime fp32"
"""What the embedded server runs by default; others are compared with it."""
TURN = 0.3
"""Seconds: a dozen runs of the shortest part. Of single runs, two reports differed by up to 28 % in a part's ratio."""
ONE_GRAPH = "one graph"
"""All engines joined, as the flavour ``single`` runs them; of targets that do."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One engine on one part of the work at one batch size."""

    engine: str
    """Target and precision, such as ``openvino bf16``; ``torch as trained`` is the network before export."""
    what: str
    """``2 stains`` (encoder, image and cell map of each), ``2 stains, one graph``, ``encoder``, ``image, 1 step``, …"""
    batch: int
    ms: Timing
    """A tile."""
    tiles_per_second: float
    mm2_per_second: float
    """Tissue: what is kept of a tile, without its margins."""
    gflops: float
    """Reached, 10⁹ floating-point operations a second: of convolutions, multiply and add counted as two."""
    share_of_peak: float | None
    """Of the machine's convolution peak in this precision, wall time on both sides; None where there is no peak."""
    share_of_peak_cpu: float | None
    """The same of CPU time, which other programs hardly change."""
    relative: Spread | None
    """Wall time over the reference's, round by round; None for the reference, and where it did not run."""
    relative_cpu: Spread | None


@dataclass(frozen=True, kw_only=True)
class EnginesReport:
    """What was measured."""

    machine: Machine
    model_name: str
    model_version: str
    tile: int
    mpp: float
    steps: int
    stains: int
    threads: int
    rounds: int
    gflop: Mapping[str, float]
    """Of one tile, by part of the work."""
    peak: str
    peaks: Mapping[str, float]
    """GFLOP/s by operation and precision: ``convolution fp32``, ``matrix bf16``, …"""
    rows: tuple[Row, ...]
    memory_mib: Mapping[str, float]
    """Growth of the process while an engine's graphs were loaded and run once at batch 1, each run before the others'
    were freed; approximate."""
    absent: Mapping[str, str]
    """Engines that cannot run here, and why."""
    dab_dice: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Of each engine and stain against the real stain; empty where no tiles were given."""
    dice_tiles: int = 0
    """On so many tiles."""
    others: float | None = None
    """Share of the machine's processor time that other programs took meanwhile; None in older reports."""

    @property
    def quiet(self) -> bool:
        """Whether wall times are this program's own."""
        return self.others is not None and self.others <= QUIET

    def cost(self, row: Row) -> float:
        """Milliseconds a tile of the fastest run, which other programs disturbed least; of older reports CPU time."""
        return row.ms.cpu if row.ms.best is None else row.ms.best

    def share(self, row: Row) -> float | None:
        """Of the convolution's peak, for :meth:`cost`."""
        if row.ms.best is None:
            return row.share_of_peak_cpu
        return None if row.share_of_peak is None else row.share_of_peak * row.ms.p50 / row.ms.best

    @property
    def timed(self) -> str:
        """What :meth:`cost` is."""
        return "CPU time" if self.rows[0].ms.best is None else "time"

    @property
    def headline(self) -> str:
        """The part that is the whole work of this model."""
        return f"{self.stains} stains"

    def whole_work(self, batch: int) -> dict[str, Row]:
        """Every way to do the whole work, the slowest first: ``openvino bf16``, ``openvino bf16, one
        graph``, …"""
        ways = {self.headline: "", f"{self.headline}, {ONE_GRAPH}": f", {ONE_GRAPH}"}
        rows = [row for row in self.rows if row.what in ways and row.batch == batch]
        return {row.engine + ways[row.what]: row for row in sorted(rows, key=lambda row: -self.cost(row))}
