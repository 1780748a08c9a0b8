"""Folders that appear complete or not at all, even if two processes write the same one or one of them is killed."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

__all__ = ["locked", "staging_folder"]

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold the one lock on writing ``output``, waiting for it; then remove what killed builds left beside it.

    The lock is on a hidden file beside ``output``, and the system releases it when its holder dies.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    path = output.parent / f".{output.name}.lock"
    path.touch()  # FileLock waits for ever for a file that cannot be made
    with FileLock(path):
        try:
            for leftover in output.parent.glob(f".{output.name}.building-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()  # while held: whoever waits for it sees that the file is gone and makes a new one


@contextlib.contextmanager
def staging_folder(output: Path) -> Iterator[Path]:
    """A new folder beside ``output`` that replaces it if the block succeeds, and is removed otherwise.

    Use it inside :func:`locked`.
    """
    folder = output.parent / f".{output.name}.building-{uuid.uuid4().hex[:12]}"
    folder.mkdir()
    try:
        yield folder
        _sync(folder)
        if output.is_dir() and any(output.iterdir()):
            _exchange(folder, output)  # the old folder now has the hidden name
        else:
            folder.rename(output)  # an empty folder may be replaced
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _exchange(new: Path, old: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        if libc.renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(code, os.strerror(code), str(old))
    # A file system that cannot exchange two names: for a moment there is no folder, but never an incomplete one.
    aside = new.with_name(f"{new.name}-old")
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
