"""SIGKILL at twenty random moments, also while a snapshot is written: each time the same command goes on, and the run
ends with the bytes of the one that was not interrupted."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from staindiffuser.training.checkpoint import WEIGHTS

KILLS = 20
PROGRAM = "from staindiffuser.cli import main; main()"


def command(tiles: Path, output: Path, settings: Path) -> list[str]:
    asked = ["train", "--data", tiles, "--output", output, "--config", settings, "--no-progress", "--log-every", "1"]
    return [sys.executable, "-c", PROGRAM, *map(str, asked)]


@pytest.mark.slow  # starts twenty processes that import torch
@pytest.mark.timeout(5400)
def test_killed_at_twenty_random_moments(tiles_folder: Path, tmp_path: Path) -> None:
    settings = tmp_path / "settings.toml"
    settings.write_text(
        'preset = "debug"\n[train]\nsteps = 300\ncrop = 32\nworkers = 1\ncheckpoint_steps = 2\nvalidate_every = 50\n'
        "validation_tiles = 2\n",
        encoding="utf-8",
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole = subprocess.run(
        command(tiles_folder, tmp_path / "whole", settings), env=environment, capture_output=True, check=False
    )
    assert whole.returncode == 0, whole.stderr
    chance = random.Random()
    killed = writing = 0
    while killed < KILLS:
        folder = tmp_path / "parts" / "snapshots"
        before = {path.name for path in folder.glob("step-*.ckpt")}
        with subprocess.Popen(
            command(tiles_folder, tmp_path / "parts", settings), env=environment, stderr=subprocess.PIPE
        ) as process:
            while {path.name for path in folder.glob("step-*.ckpt")} == before and process.poll() is None:
                time.sleep(0.002)
            assert process.poll() is None, (killed, process.communicate()[1])
            time.sleep(chance.uniform(0, 0.2))
            if killed % 2:  # half of them while a snapshot is being written
                deadline = time.monotonic() + 20
                while not any(folder.glob("*.partial")) and time.monotonic() < deadline:
                    pass
            process.send_signal(signal.SIGKILL)
        killed += 1
        writing += any(folder.glob("*.partial"))
        assert not (tmp_path / "parts" / "checkpoint").exists()
    last = subprocess.run(
        command(tiles_folder, tmp_path / "parts", settings), env=environment, capture_output=True, check=False
    )
    assert last.returncode == 0, last.stderr
    assert not any((tmp_path / "parts").rglob("*.partial"))
    for name in (f"checkpoint/{WEIGHTS}", "snapshots/last.ckpt"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    sys.stdout.write(f"{writing} of {killed} kills left a snapshot half written\n")
