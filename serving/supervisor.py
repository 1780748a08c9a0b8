"""Runs one Triton server and makes sure that nothing of it outlives the process that started it.

Runs as a process of its own (``python supervisor.py SHM_PREFIX FOLDER COMMAND...``) and uses the standard library only.
It stops the server

- when its standard input closes, because the parent closed it or died;
- when it receives SIGTERM;
- through the kernel (``PR_SET_PDEATHSIG``) if it is killed itself;
- when a process of its Python backend ends, :data:`LAST_WORDS_SECONDS` later. Triton would go on, and never answer the
  requests that were in there; or it is about to log why that process could not start, and to end.

It then kills the rest of the server's process group (Python backend stubs) and removes the shared memory that a killed
server leaves behind. It also removes ``FOLDER``, unless the server ended by itself and the parent is to read its log.
The first line on standard output is the server's process id.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

GRACE_SECONDS = 10.0
SIGNALLED = 128
"""Exit status of a server that a signal has ended, minus the signal's number."""
ENGINE_ENDED = 97
"""Exit status if a process of the Python backend has ended; Triton's own are 0, 1 and those of signals."""
LAST_WORDS_SECONDS = 1.0
"""How long Triton may go on without a process of its Python backend, to log why it has ended."""
_PR_SET_PDEATHSIG = 1
_STUB = "triton_python_b"
"""How the kernel calls a process of the Python backend (15 characters)."""


def main(arguments: list[str]) -> int:
    """Run ``COMMAND`` until it ends or is stopped; returns the server's exit status."""
    prefix, folder, *command = arguments
    ordered = broken = False
    stubs: set[int] = set()
    libc = ctypes.CDLL(None)
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is handled by the parent
    server = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,  # the log
        process_group=0,
        # This process has one thread, so a function between fork and exec is safe here.
        preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM),
    )
    try:
        os.write(1, f"{server.pid}\n".encode())
        while server.poll() is None:
            if select.select([0], [], [], 0.2)[0] and not os.read(0, 1024):
                ordered = True
                break
            broken = not all(map(_is_stub, stubs))
            if broken:
                select.select([0], [], [], LAST_WORDS_SECONDS)  # unless the parent wants it ended
                server.kill()  # it may not react to a gentler signal
                break
            stubs |= set(filter(_is_stub, _children(server.pid)))
    except (_StopSignal, BrokenPipeError):
        ordered = True
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _end(server)
        for path in Path("/dev/shm").glob(f"{prefix}*"):
            with contextlib.suppress(OSError):
                path.unlink()
        if ordered:
            shutil.rmtree(folder, ignore_errors=True)
    if broken:
        return ENGINE_ENDED
    return SIGNALLED - server.returncode if server.returncode < 0 else server.returncode


class _StopSignal(Exception):  # noqa: N818 - not an error
    """SIGTERM."""


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise _StopSignal


def _children(pid: int) -> set[int]:
    """Ids of a process's children."""
    found: set[int] = set()
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended
            found.update(map(int, file.read_text(encoding="ascii").split()))
    return found


def _is_stub(pid: int) -> bool:
    """Whether a process of the Python backend has this id, and has not ended."""
    with contextlib.suppress(OSError):
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        name, _, rest = stat.partition("(")[2].rpartition(")")
        return name == _STUB and rest.split()[0] not in "ZX"
    return False


def _end(server: subprocess.Popen[bytes]) -> None:
    if server.poll() is None:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(GRACE_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
