"""Files: the cache folder, hashes, and writing so that nothing incomplete stands under a final name."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from staindiffuser.errors import UsageError

__all__ = [
    "cache_folder",
    "check_file",
    "check_folder",
    "file_sha256",
    "finite",
    "remove",
    "replacing",
    "size_of",
    "write_json",
]


def cache_folder() -> Path:
    """``$STAINDIFFUSER_CACHE``, or this platform's cache folder of the user."""
    chosen = os.environ.get("STAINDIFFUSER_CACHE")
    return Path(chosen) if chosen else user_cache_path("staindiffuser", appauthor=False)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    if not path.is_dir():
        return path.stat().st_size
    return sum(inner.stat().st_size for inner in path.rglob("*") if inner.is_file())


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name beside ``path``; the file written there replaces ``path`` if the block succeeds.

    Readers see the old file or the new one, never a part. Several processes may write the same path at once: each has
    its own temporary name, and the last to finish wins.

    Raises:
        UsageError: the file cannot be written. Any other exception passes through; the temporary file is removed.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}; choose another place") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def check_file(path: Path | None) -> Path | None:
    """Refuse a file that could not be written, before the work whose result it is to hold; for options.

    Raises:
        UsageError: it is a folder, or would be in a place that cannot be written to.
    """
    if path is not None and str(path) != "-":
        if path.is_dir():
            raise UsageError(f"{path} cannot be written: it is a folder; choose another file")
        _check_place(path, path.parent)
    return path


def check_folder(path: Path | None) -> Path | None:
    """Refuse a folder that could not be made or written to; see :func:`check_file`.

    Raises:
        UsageError: it cannot be written.
    """
    if path is not None:
        _check_place(path, path)
    return path


def _check_place(path: Path, folder: Path) -> None:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"{path} cannot be written: {folder} is not a writable folder; choose another place")


def finite(data: Any) -> Any:
    """Data for JSON, which has neither NaN nor infinity: both become null. Tuples become lists."""
    if isinstance(data, dict):
        return {name: finite(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write JSON by :func:`replacing`; numbers that are not finite become null.

    Raises:
        UsageError: the file cannot be written.
    """
    text = json.dumps(finite(data), indent=1, ensure_ascii=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
