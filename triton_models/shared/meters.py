"""Counters of our own, beside Triton's on its metrics port.

- ``staindiffuser_tiles_total``: tiles that were computed, by output (``STAIN_CD3``, …) and model version;
- ``staindiffuser_flagged_tiles_total``: tiles whose quality is above a limit, by measure and model version;
- ``staindiffuser_refused_total``: requests that were refused, by reason: ``stopping`` (the server), ``full`` (the
  queue), ``late`` (waited in it for too long).

And of a model that keeps its requests itself (``request_queue.py``), of which Triton counts only that they came:

- ``staindiffuser_requests_total``: requests whose turn came, by status (``OK``, or Triton's name of the error);
- ``staindiffuser_queue_seconds_total``, ``staindiffuser_compute_seconds_total``: that these waited, and took;
- ``staindiffuser_waiting_requests``: requests in the queue.

Copied beside ``model.py`` into the model repository; imports nothing of the project.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["Meters"]

COUNTERS = {
    "staindiffuser_tiles_total": "Tiles that were computed",
    "staindiffuser_flagged_tiles_total": "Tiles whose quality is above a limit",
    "staindiffuser_refused_total": "Requests that were refused",
    "staindiffuser_requests_total": "Requests whose turn came",
    "staindiffuser_queue_seconds_total": "Time that requests waited for their turn",
    "staindiffuser_compute_seconds_total": "Time that requests took when it was their turn",
}
GAUGES = {"staindiffuser_waiting_requests": "Requests in the queue"}
SECONDS = 0.5
"""Between two times that Triton is told: a call takes as long as a small request (ours)."""
LEAST_TISSUE = 0.05
"""Share of tissue from which a tile is judged, as in the client."""


class Meters:
    """One model's counters; without Triton's metrics (a stand-in for its backend) they count nothing. Thread-safe."""

    def __init__(
        self, utilities: Any, *, version: str = "", quality: str = "", waiting: Callable[[], int] | None = None
    ) -> None:
        """Describe the counters.

        Args:
            utilities: ``triton_python_backend_utils``.
            version: of the model, a label of its tiles.
            quality: the contract's parameter of that name, JSON, for a model that gives ``QUALITY``.
            waiting: tells how many requests are in the queue, for a model that has one.
        """
        self._kinds: Any = getattr(utilities, "MetricFamily", None)
        self._version = version[:12]
        self._quality = json.loads(quality or "{}")
        self._waiting = waiting
        self._families: dict[str, Any] = {}
        self._metrics: dict[tuple[str, ...], Any] = {}
        self._new: dict[tuple[str, ...], tuple[dict[str, str], float]] = {}
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep_telling, name="meters", daemon=True)
        if self._kinds is not None:
            self._thread.start()

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

    def request(self, status: str, *, waited: float, took: float) -> None:
        """Count a request whose turn came, and the seconds that it waited and took."""
        self._count("staindiffuser_requests_total", 1, status=status, model_version=self._version)
        self._count("staindiffuser_queue_seconds_total", waited, model_version=self._version)
        self._count("staindiffuser_compute_seconds_total", took, model_version=self._version)

    def refused(self, requests: int, reason: str = "stopping") -> None:
        """Count requests that were refused."""
        self._count("staindiffuser_refused_total", requests, reason=reason, model_version=self._version)

    def close(self) -> None:
        """Give the counters back while Triton can still be told; a process that ends with them ends in a crash."""
        if self._thread.is_alive():
            self._closing.set()
            self._thread.join()
            self._tell()
        self._kinds = None
        self._metrics.clear()
        self._families.clear()

    def _count(self, name: str, amount: float, **labels: str) -> None:
        if self._kinds is None:
            return
        key = (name, *labels.values())
        with self._lock:
            self._new[key] = (labels, self._new.get(key, (labels, 0))[1] + amount)

    def _keep_telling(self) -> None:
        while not self._closing.wait(SECONDS):
            self._tell()

    def _tell(self) -> None:
        with self._lock:
            new, self._new = self._new, {}
        for key, (labels, amount) in new.items():
            self._metric(key, labels).increment(amount)
        if self._waiting is not None:
            labels = {"model_version": self._version}  # a server may have several models
            self._metric(("staindiffuser_waiting_requests", self._version), labels).set(self._waiting())

    def _metric(self, key: tuple[str, ...], labels: dict[str, str]) -> Any:
        if key not in self._metrics:
            name = key[0]
            if name not in self._families:
                kind = self._kinds.GAUGE if name in GAUGES else self._kinds.COUNTER
                description = {**COUNTERS, **GAUGES}[name]
                self._families[name] = self._kinds(name=name, description=description, kind=kind)
            self._metrics[key] = self._families[name].Metric(labels=labels)
        return self._metrics[key]
