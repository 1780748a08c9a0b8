"""Writing small files so that nothing incomplete ever stands under a final name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from staindiffuser.errors import UsageError

__all__ = ["write_json"]


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write JSON under a temporary name, then rename.

    Raises:
        UsageError: the place cannot be written.
    """
    temporary = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}; choose another file") from error
