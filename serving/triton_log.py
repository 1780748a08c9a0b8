"""Why Triton ended, as far as its log tells."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from staindiffuser.serving.errors import ServerMissingError, ServerStartError

__all__ = ["likely_reason", "start_error"]


def likely_reason(log: Path, start: int) -> str:
    """The line that most likely says why Triton ended; empty if it has logged none.

    Args:
        log: Triton's log.
        start: offset in bytes at which the current run's lines begin.
    """
    try:
        with log.open("rb") as file:
            file.seek(start)
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return "its log cannot be read"
    return _pick(lines)


def start_error(reason: str) -> ServerMissingError | ServerStartError:
    """The error for a server that ended before it was ready, for the caller to raise."""
    if "error while loading shared libraries: libpython" in reason:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        return ServerMissingError(f"Triton's Python backend needs libpython{version}.so: install libpython{version}")
    return ServerStartError(f"Triton did not start: {reason}")


def _pick(lines: Sequence[str]) -> str:
    patterns = (r"error while loading shared libraries", r"failed to load '.*' version", r"^error: ", r"^\S+Z E ")
    # Triton says this on every machine without a GPU, as an error.
    lines = [line for line in lines if "CudaDriverHelper has not been initialized" not in line]
    for pattern in patterns:
        for line in lines:
            if re.search(pattern, line):
                return re.sub(r"^\S+Z [EWI] \d+ (\S+:\d+\] )?", "", line).strip(' "')[:500]
    return lines[-1].strip() if lines else ""
