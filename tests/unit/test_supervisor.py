"""The supervisor of one Triton server: what it does when a process of the Python backend ends."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from staindiffuser.serving import supervisor

SERVER = """
{stub} 0.6 &
wait $!
sleep {late}
echo 'error: no such luck'
exec sleep 60
"""
"""Stands for Triton: it outlives a process of its Python backend, and then says why that has ended."""


@pytest.mark.parametrize(("late", "log"), [(0.3, "error: no such luck\n"), (30, "")])
def test_a_server_that_has_lost_an_engine_may_say_why_and_is_ended(tmp_path: Path, late: float, log: str) -> None:
    sleep = shutil.which("sleep")
    assert sleep is not None
    stub = tmp_path / "triton_python_backend_stub"
    stub.symlink_to(sleep)
    command = ["/bin/sh", "-c", SERVER.format(stub=stub, late=late)]
    with subprocess.Popen(
        [sys.executable, "-I", supervisor.__file__, "no-such-prefix", str(tmp_path / "folder"), *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.wait(20) == supervisor.ENGINE_ENDED
        assert process.stderr is not None
        assert process.stderr.read() == log
