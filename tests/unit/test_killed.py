"""SIGKILL at twenty random moments, also while a snapshot is written: each time the same command goes on, and the run
ends with the bytes of the one that was not interrupted.

This file is also the program that starts the runs: it forks each from one that has imported torch.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from staindiffuser.training.checkpoint import WEIGHTS
from staindiffuser.training.snapshots import read_snapshot

KILLS = 20
SETTINGS = """
preset = "debug"
[train]
steps = 300
crop = 32
workers = 1
checkpoint_steps = 2
validate_every = 50
validation_tiles = 2
"""


@pytest.mark.slow  # twenty-two runs
@pytest.mark.timeout(3600)
def test_killed_at_twenty_random_moments(tiles_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text(SETTINGS, encoding="utf-8")
    result = subprocess.run(
        [sys.executable, __file__, str(tiles_folder), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert not any((tmp_path / "parts").rglob("*.partial"))
    weights = [(tmp_path / part / "checkpoint" / WEIGHTS).read_bytes() for part in ("parts", "whole")]
    assert weights[0] == weights[1]
    parts, whole = (read_snapshot(tmp_path / part / "snapshots" / "last.ckpt") for part in ("parts", "whole"))
    assert set(parts.learner) == set(whole.learner)
    for name, tensor in whole.learner.items():
        assert torch.equal(parts.learner[name], tensor), name
    for name, moments in whole.optimizer["state"].items():
        assert all(torch.equal(parts.optimizer["state"][name][moment], value) for moment, value in moments.items()), (
            name
        )
    sys.stdout.write(result.stdout)


def start(tiles: Path, output: Path) -> int:
    """Begin the command, or go on with it; the process."""
    process = os.fork()
    if process:
        return process
    from staindiffuser.cli import main

    settings = output.parent / "settings.toml"
    asked = ["train", "--data", tiles, "--output", output, "--config", settings, "--no-progress", "--log-every", "1"]
    sys.argv = ["staindiffuser", *map(str, asked)]
    code = 1
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        os._exit(code)


def finish(process: int) -> None:
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


def drive(tiles: Path, folder: Path) -> None:
    import staindiffuser.training.train  # noqa: F401  # before forking

    finish(start(tiles, folder / "whole"))
    chance, snapshots = random.Random(), folder / "parts" / "snapshots"
    writing = 0
    for number in range(KILLS):
        before = {path.name for path in snapshots.glob("step-*.ckpt")}
        process = start(tiles, folder / "parts")
        while {path.name for path in snapshots.glob("step-*.ckpt")} == before:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.2))
        if number % 2:  # half of them while a snapshot is being written
            deadline = time.monotonic() + 20
            while not any(snapshots.glob("*.partial")) and time.monotonic() < deadline:
                pass
        os.kill(process, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL, "it had ended"
        writing += any(snapshots.glob("*.partial"))
        sys.stderr.write(f"killed {number + 1}: {max(snapshots.glob('step-*.ckpt')).name}\n")
        assert not (folder / "parts" / "checkpoint").exists()
    finish(start(tiles, folder / "parts"))
    sys.stdout.write(f"{writing} of {KILLS} kills left a snapshot half written\n")


if __name__ == "__main__":
    drive(Path(sys.argv[1]), Path(sys.argv[2]))
