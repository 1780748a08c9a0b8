"""Where what can be made again is kept."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """``$STAINDIFFUSER_CACHE``, or the user's cache folder."""
    if chosen := os.environ.get("STAINDIFFUSER_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "staindiffuser"
