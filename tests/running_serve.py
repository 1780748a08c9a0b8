"""``staindiffuser serve`` as a process, and tiles that tell one request from another."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

TILE = 64
TILES = np.random.default_rng(0).integers(0, 255, (1, TILE, TILE, 3), dtype=np.uint8)
ORIGINS = np.zeros((1, 2), np.int64)


class Serve:
    """A running ``staindiffuser serve`` with an audit log."""

    def __init__(self, process: subprocess.Popen[str], audit: Path) -> None:
        self.process, self._audit = process, audit
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        self.ready: dict[str, Any] = json.loads(line)

    @property
    def url(self) -> str:
        return str(self.ready["grpc"])

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._audit.read_text(encoding="utf-8").splitlines()]

    def names(self) -> list[str]:
        return [event["event"] for event in self.events()]

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        self.process.send_signal(number)
        _, stderr = self.process.communicate(timeout=60)
        return self.process.returncode, stderr


@contextlib.contextmanager
def serving(
    repository: Path | str, folder: Path, *options: object, wrapper: Sequence[str] = (), **environment: str
) -> Iterator[Serve]:
    command: list[object] = [*wrapper, sys.executable, "-c", "from staindiffuser.cli import main; main()"]
    command += ["serve", repository, "--grpc-port", "0", "--metrics-port", "0", "--json"]
    command += ["--audit", folder / "audit.jsonl", *options]
    process = subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        yield Serve(process, folder / "audit.jsonl")
    finally:
        process.kill()
        process.communicate()


def eventually(condition: Callable[[], bool], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


def kill_server(server: Serve) -> None:
    os.kill(server.ready["pid"], signal.SIGKILL)


def kill_engine(server: Serve) -> None:
    """What an out-of-memory killer does: Triton itself goes on, and says that it is ready."""
    psutil.Process(server.ready["pid"]).children(recursive=True)[0].kill()


def marked(number: int) -> np.ndarray:
    """A tile that is unlike all others."""
    return np.random.default_rng(number).integers(0, 255, TILES.shape, dtype=np.uint8)
