"""Files: where what can be made again is kept, and writing so that nothing incomplete stands under a final name."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from staindiffuser.errors import UsageError

__all__ = ["cache_folder", "finite", "write_json"]


def cache_folder() -> Path:
    """``$STAINDIFFUSER_CACHE``, or the user's cache folder."""
    if chosen := os.environ.get("STAINDIFFUSER_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "staindiffuser"


def finite(data: Any) -> Any:
    """Data for JSON, which has neither NaN nor infinity: both become null. Tuples become lists."""
    if isinstance(data, dict):
        return {name: finite(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write JSON under a temporary name, then rename; numbers that are not finite become null.

    Raises:
        UsageError: the place cannot be written.
    """
    temporary = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(finite(data), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}; choose another file") from error
