"""Curves go to a tracker too, and a resumed run goes on with the tracker's own run."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from staindiffuser.training.config import TrainConfig
from staindiffuser.training.journal import Journal
from staindiffuser.training.options import RunOptions, check_run
from staindiffuser.training.trackers import TrackerName, open_tracker


class Recorded:
    """What either package was told; both have the few functions that are used."""

    def __init__(self) -> None:
        self.begun: list[str | None] = []
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.ended = 0

    def begin(self, identity: str | None) -> str:
        self.begun.append(identity)
        return identity or "made"

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.rows.append((step, dict(values)))

    def end(self) -> None:
        self.ended += 1


def stand_in(name: TrackerName, told: Recorded) -> ModuleType:
    module: Any = ModuleType(name)
    if name == "mlflow":
        module.start_run = lambda run_id, run_name: SimpleNamespace(info=SimpleNamespace(run_id=told.begin(run_id)))
        module.log_params = lambda params: None
        module.log_metrics = told.log
        module.end_run = told.end
    else:
        module.init = lambda id, **_: SimpleNamespace(id=told.begin(id), log=told.log, finish=told.end)
    return module


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_run_and_its_continuation_are_one_run(
    name: TrackerName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Recorded()
    monkeypatch.setitem(sys.modules, name, stand_in(name, told))
    for first in (0, 5):
        tracker = open_tracker(name, tmp_path, {"steps": 9})
        with Journal(tmp_path, first=first, steps=9, progress="none", write=True, tracker=tracker) as journal:
            journal.log({"loss": 0.5, "val/dab_dice/cd3": 0.25}, first + 1)
    assert told.begun == [None, "made"]
    assert told.rows == [(step, {"loss": 0.5, "val/dab_dice/cd3": 0.25}) for step in (1, 6)]
    assert told.ended == 2
    assert json.loads((tmp_path / "tracking.json").read_text(encoding="utf-8")) == {name: "made"}


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("staindiffuser.training.options.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError) as caught:
        check_run(TrainConfig(), RunOptions(output=tmp_path / "run", track="mlflow"))
    assert caught.value.name == "mlflow"
    assert not (tmp_path / "run").exists()
