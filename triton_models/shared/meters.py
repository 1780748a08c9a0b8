"""Counters of our own, beside Triton's on its metrics port.

- ``staindiffuser_tiles_total``: tiles that were computed, by output (``STAIN_CD3``, …) and model version;
- ``staindiffuser_flagged_tiles_total``: tiles whose quality is above a limit, by measure and model version;
- ``staindiffuser_refused_total``: requests refused because the server is stopping.

Copied beside ``model.py`` into the model repository; imports nothing of the project.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

__all__ = ["Meters"]

COUNTERS = {
    "staindiffuser_tiles_total": "Tiles that were computed",
    "staindiffuser_flagged_tiles_total": "Tiles whose quality is above a limit",
    "staindiffuser_refused_total": "Requests refused because the server is stopping",
}
LEAST_TISSUE = 0.05
"""Share of tissue from which a tile is judged, as in the client."""


class Meters:
    """One model's counters; without Triton's metrics (a stand-in for its backend) they count nothing."""

    def __init__(self, utilities: Any, *, version: str = "", quality: str = "") -> None:
        """Describe the counters.

        Args:
            utilities: ``triton_python_backend_utils``.
            version: of the model, a label of its tiles.
            quality: the contract's parameter of that name, JSON, for a model that gives ``QUALITY``.
        """
        self._kinds = getattr(utilities, "MetricFamily", None)
        self._version = version[:12]
        self._quality = json.loads(quality or "{}")
        self._families: dict[str, Any] = {}
        self._counters: dict[tuple[str, ...], Any] = {}

    def tiles(self, output: str, values: Any) -> None:
        """Count the tiles of an output, batch dimension first, and the flags of ``QUALITY``."""
        if not output.startswith(("STAIN_", "CELLS_", "QUALITY")):
            return
        self._count("staindiffuser_tiles_total", len(values), output=output, model_version=self._version)
        if output != "QUALITY" or not self._quality or not isinstance(values, np.ndarray):
            return
        names = self._quality["tile"]
        judged = values[values[:, names.index("tissue")] >= LEAST_TISSUE]
        for name, limit in self._quality["limits"].items():
            flagged = int((judged[:, names.index(name)] > limit).sum())
            self._count("staindiffuser_flagged_tiles_total", flagged, flag=name, model_version=self._version)

    def refused(self, requests: int) -> None:
        """Count requests that a closed gate has refused."""
        self._count("staindiffuser_refused_total", requests, reason="stopping")

    def close(self) -> None:
        """Give the counters back while Triton can still be told; a process that ends with them ends in a crash."""
        self._kinds = None
        self._counters.clear()
        self._families.clear()

    def _count(self, name: str, amount: int, **labels: str) -> None:
        if self._kinds is None:
            return
        key = (name, *labels.values())
        if key not in self._counters:
            if name not in self._families:
                self._families[name] = self._kinds(name=name, description=COUNTERS[name], kind=self._kinds.COUNTER)
            self._counters[key] = self._families[name].Metric(labels=labels)
        self._counters[key].increment(amount)
