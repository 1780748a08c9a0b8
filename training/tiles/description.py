"""A folder of tiles states in a JSON file what it was made from, so that no other tiles are mixed in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from staindiffuser.errors import UsageError
from staindiffuser.training.tiles.tile import TILES_CSV

__all__ = ["check_described"]


def check_described(folder: Path, file: str, description: Mapping[str, Any], *, what: str) -> None:
    """Refuse a folder that was made from something else.

    Args:
        folder: need not exist.
        file: name of the JSON file in it.
        description: what must be equal for tiles to share a folder.
        what: what the folder holds, for the error's text.

    Raises:
        UsageError: the folder holds other tiles, or its file cannot be read.
    """
    path = folder / file
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(before, dict):
            raise ValueError("it is not a JSON object")
    except (FileNotFoundError, NotADirectoryError):
        if (folder / TILES_CSV).exists():
            raise UsageError(f"{folder} already holds paired tiles of another kind: choose another --output") from None
        return
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}): choose another --output") from error
    for name, value in description.items():
        if before.get(name) != value:
            values = f": {before.get(name)} there, {value} here"
            shown = values if len(values) < 80 else ""
            raise UsageError(f"{folder} holds {what} ({name} differs{shown}): choose another --output, or delete it")
