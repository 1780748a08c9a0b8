"""Step ``training``: trains the shipped recipe for the remaining time. The run can be resumed on any machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from staindiffuser.benchmarks.gpu.options import GpuOptions, StepResult

__all__ = ["run"]

COMMAND = [sys.executable, "-c", "from staindiffuser.cli import main; main()"]
GRACE = 60.0
"""Seconds for an interrupted run to write its snapshot."""
_LEAST = 20.0
"""Seconds below which training does not start."""


def run(options: GpuOptions, result: StepResult) -> None:
    """Simulate tiles unless some were given, train until the time is up, interrupt the run and report."""
    run_folder = options.output / "training"
    tiles = options.tiles or result.attempt("simulate tiles", _simulate, options, result)
    if tiles is None:
        return
    if options.limit - (time.monotonic() - result.began) < _LEAST:
        result.left_out.append("training: the time limit")
        return
    arguments = ["train", "--data", str(tiles), "--output", str(run_folder), "--preset", options.train_preset]
    arguments += ["--trained-on", "simulated tissue" if options.tiles is None else "tiles of your own"]
    result.data["command"] = " ".join(["staindiffuser", *arguments])
    result.attempt("train", _train, arguments, options, result, run_folder)


def _simulate(options: GpuOptions, result: StepResult) -> Path:
    folder = options.output / "tiles"
    rehearsal = options.device == "cpu"
    count, size = (24, 64) if rehearsal else (3000, 256)
    arguments = ["simulate", "tiles", "--output", str(folder), "--count", str(count), "--size", str(size)]
    arguments += ["--seed", "21", "--val-share", "0.1" if rehearsal else "0.03", "--test-share", "0", "--json"]
    began = time.monotonic()
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=options.limit, check=False)
    if done.returncode:
        raise RuntimeError(f"exit {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    result.data["simulated"] = {"tiles": count, "size": size, "seconds": round(time.monotonic() - began, 1)}
    return folder


def _train(arguments: list[str], options: GpuOptions, result: StepResult, run_folder: Path) -> None:
    log = options.output / "training-run.log"
    began = time.monotonic()
    remaining = options.limit - (began - result.began)
    with log.open("w", encoding="utf-8") as file:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen([*COMMAND, *arguments], stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            code = process.wait(timeout=remaining)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            try:
                code = process.wait(timeout=GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                raise RuntimeError(f"the run did not stop within {GRACE:.0f} s of its interruption") from None
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    result.data["seconds_of_training"] = round(time.monotonic() - began, 1)
    result.data["exit_code"] = code
    result.data["finished"] = code == 0
    result.data["files"] = sorted(p.relative_to(run_folder).as_posix() for p in run_folder.rglob("*") if p.is_file())
    speed = run_folder / "speed.json"
    if speed.is_file():
        result.data["speed"] = json.loads(speed.read_text(encoding="utf-8"))
    result.data["log"] = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()[-15:]
    if code not in (0, 130):
        raise RuntimeError(f"exit {code}: {' '.join(result.data['log'][-2:])}")
    if not result.data["files"]:
        raise RuntimeError("the run left nothing behind")
