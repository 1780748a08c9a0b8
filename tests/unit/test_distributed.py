"""Several processes give the curve of one, and a killed run the weights of one that was not: in real processes.

This file is also the program that those processes run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from staindiffuser.errors import StainDiffuserError
from staindiffuser.training.checkpoint import WEIGHTS
from staindiffuser.training.config import PRESETS, Preset
from staindiffuser.training.curves import read_curves
from staindiffuser.training.data.dataset import CropBatch
from staindiffuser.training.learner import Loss
from staindiffuser.training.options import RunOptions
from staindiffuser.training.snapshots import read_snapshot
from staindiffuser.training.teacher import Teacher
from staindiffuser.training.train import train

pytestmark = pytest.mark.timeout(1500)  # on busy cores; a minute or two on free ones

STEPS = 12
RUNS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"strategy": "fsdp"},
    "single task, in parts": {"gradient_accumulation": 2, "tasks": ("images",)},
}
"""What two processes do; each must give the curve of one process."""
RESUMED = "fsdp, interrupted"
FAILURES: dict[str, dict[str, Any]] = {"diverged": {"diverge": True}, "uneven": {"batch": 7}}


def run(data: Path, output: Path, *, strategy: Any = "ddp", **changes: Any) -> None:
    recipe = dataclasses.replace(
        PRESETS["debug"].train, steps=STEPS, batch=8, crop=32, warmup=2, cooldown=0.0, bf16=False, validation_tiles=2
    )
    preset = Preset(model=PRESETS["debug"].model, train=dataclasses.replace(recipe, **changes))
    options = RunOptions(output=output, strategy=strategy, log_every=1, progress="none")
    train(preset, data, options)


def environment() -> dict[str, str]:
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def two(tiles_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run by two processes, one after the other; whatever they refuse is written to ``<name>-<rank>.txt``."""
    folder = tmp_path_factory.mktemp("two")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    result = subprocess.run(
        [*torchrun, __file__, "all", str(tiles_folder), str(folder)],
        capture_output=True,
        text=True,
        timeout=1200,
        env=environment(),
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize(("name", "tasks"), [(n, RUNS[n].get("tasks", ("images", "cells"))) for n in RUNS])
def test_two_processes_give_the_curve_of_one(
    two: Path, tiles_folder: Path, tmp_path: Path, name: str, tasks: tuple[str, ...]
) -> None:
    run(tiles_folder, tmp_path, tasks=tasks)
    one, both = read_curves(tmp_path), read_curves(two / name)
    assert set(one) == set(both)
    assert ("error/cells-cd3" in one) == ("cells" in tasks)
    assert list(both["loss"][0]) == list(range(1, STEPS + 1))  # written by one of them
    for curve in one:
        if curve.startswith(("loss", "error")):
            np.testing.assert_allclose(both[curve][1], one[curve][1], atol=1e-3, err_msg=curve)
    assert sorted(path.name for path in (two / name / "snapshots").iterdir()) == ["last.ckpt", "step-00000012.ckpt"]
    assert (two / name / "checkpoint" / "config.json").is_file()
    of_two, of_one = (read_snapshot(folder / "snapshots" / "last.ckpt") for folder in (two / name, tmp_path))
    for tensor in of_one.learner:  # one file, of the whole, whatever each process held
        torch.testing.assert_close(of_two.learner[tensor], of_one.learner[tensor], atol=1e-3, rtol=1e-3)
    assert set(of_two.optimizer["state"]) == set(of_one.optimizer["state"])


def test_split_weights_are_resumed_exactly(two: Path) -> None:
    whole, parts = (read_snapshot(two / name / "snapshots" / "last.ckpt") for name in ("fsdp", RESUMED))
    for name, tensor in whole.learner.items():
        assert torch.equal(parts.learner[name], tensor), name
    np.testing.assert_array_equal(read_curves(two / RESUMED)["loss"][1], read_curves(two / "fsdp")["loss"][1])


def test_what_one_process_cannot_stops_both(two: Path) -> None:
    messages = [(two / f"diverged-{rank}.txt").read_text() for rank in (0, 1)]
    assert "at step 2 on another process" in messages[0]
    assert "diverged-batch-1.pt" in messages[1]
    assert torch.load(two / "diverged" / "diverged-batch-1.pt")["batch"]["he"].shape[0] == 4
    for rank in (0, 1):
        assert "batch is 7: 2 processes of 1 parts each cannot share it" in (two / f"uneven-{rank}.txt").read_text()
    assert not (two / "uneven").exists()


@pytest.mark.slow
def test_killed_run_ends_with_the_weights_of_one_that_was_not(tiles_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, __file__, "one", str(tiles_folder), str(tmp_path / "parts")]
    moments = random.Random()
    reached = 0
    for number, code in ((signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)):
        wanted = moments.randint(reached + 2, reached + 6)
        process = subprocess.Popen(
            command, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        deadline = time.monotonic() + 600
        while lines(tmp_path / "parts") < wanted and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        os.killpg(process.pid, number)  # the loader's process too
        error = process.communicate(timeout=300)[1]
        assert process.returncode == code, f"asked to stop at step {wanted}: {error}"
        assert not (tmp_path / "parts" / "checkpoint").exists()
        reached = lines(tmp_path / "parts")
    subprocess.run(command, env=environment(), check=True, capture_output=True, timeout=600)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run(tiles_folder, tmp_path / "whole", steps=2 * STEPS)
    finally:
        torch.set_num_threads(threads)
    weights = [(tmp_path / part / "checkpoint" / WEIGHTS).read_bytes() for part in ("parts", "whole")]
    assert weights[0] == weights[1]
    interrupted, whole_run = (read_snapshot(tmp_path / p / "snapshots" / "last.ckpt") for p in ("parts", "whole"))
    for name, tensor in whole_run.learner.items():
        assert torch.equal(interrupted.learner[name], tensor), name
    parts, whole = read_curves(tmp_path / "parts"), read_curves(tmp_path / "whole")
    np.testing.assert_array_equal(parts["loss"][1], whole["loss"][1])


def lines(output: Path) -> int:
    path = output / "csv" / "metrics.csv"
    return max(0, path.read_text().count("\n") - 1) if path.is_file() else 0


def main(what: str, data: Path, output: Path) -> None:
    """What the processes run."""
    real, rank = Teacher.forward, os.environ.get("RANK", "0")

    def forward(teacher: Teacher, batch: CropBatch, step: int) -> Loss:
        loss = real(teacher, batch, step)
        if what == "one":
            time.sleep(0.03)  # so that a signal meets a step
        if name == RESUMED and step == 8:
            raise RuntimeError("lost")
        bad = name in FAILURES and rank == "1" and step == 2
        return dataclasses.replace(loss, value=loss.value * float("nan")) if bad else loss

    Teacher.forward = forward  # type: ignore[assignment,method-assign]
    name = "one"
    if what == "one":
        try:
            run(data, output, steps=2 * STEPS, checkpoint_steps=3, workers=1)
        except KeyboardInterrupt:
            sys.exit(130)
        return
    for name, changes in RUNS.items():
        run(data, output / name, **changes)
    name = RESUMED
    with contextlib.suppress(RuntimeError):
        run(data, output / name, strategy="fsdp", checkpoint_steps=5)
    name = "the rest of it"
    run(data, output / RESUMED, strategy="fsdp", checkpoint_steps=5)
    for name, changes in FAILURES.items():
        try:
            run(data, output / name, **{key: value for key, value in changes.items() if key != "diverge"})
        except StainDiffuserError as error:
            (output / f"{name}-{rank}.txt").write_text(str(error))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
