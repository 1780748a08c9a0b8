"""MLflow or Weights & Biases, beside TensorBoard and the CSV: each is an extra, and configured by its own variables."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from staindiffuser.files import write_json

__all__ = ["Tracker", "TrackerName", "open_tracker"]

TrackerName = Literal["mlflow", "wandb"]
_RUNS = "tracking.json"
"""In the run folder: the identity of its run in each tracker, so that a resumed run goes on with it."""


class Tracker(Protocol):
    """Where the curves go as well."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of an optimiser step."""

    def close(self) -> None:
        """The sitting ends."""


def open_tracker(name: TrackerName, output: Path, recipe: Mapping[str, Any]) -> Tracker:
    """Begin a run in a tracker, or go on with the one that belongs to this run folder.

    ``MLFLOW_TRACKING_URI``, ``WANDB_PROJECT``, ``WANDB_MODE`` and so on say where it is.

    Args:
        output: the run folder, after which the run is named.
        recipe: its settings.

    Raises:
        ModuleNotFoundError: the tracker is not installed.
    """
    runs: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError):
        runs = json.loads((output / _RUNS).read_text(encoding="utf-8"))
    kind: type[_MLflow | _WandB] = _MLflow if name == "mlflow" else _WandB
    tracker = kind(output, recipe, runs.get(name))
    write_json(output / _RUNS, {**runs, name: tracker.identity})
    return tracker


class _MLflow:
    def __init__(self, output: Path, recipe: Mapping[str, Any], identity: str | None) -> None:
        import mlflow

        self._mlflow = mlflow
        run = mlflow.start_run(run_id=identity, run_name=None if identity else output.name)
        self.identity: str = run.info.run_id
        if identity is None:
            mlflow.log_params(dict(recipe))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class _WandB:
    def __init__(self, output: Path, recipe: Mapping[str, Any], identity: str | None) -> None:
        import wandb

        self._run = wandb.init(id=identity, resume="allow", name=output.name, dir=output, config=dict(recipe))
        self.identity: str = self._run.id

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()
