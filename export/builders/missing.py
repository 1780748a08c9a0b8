"""The error for a target that cannot be used on this machine: why, and which targets can."""

from __future__ import annotations

import contextlib
from contextvars import ContextVar

from staindiffuser.errors import DependencyError
from staindiffuser.export.errors import BuilderMissingError

__all__ = ["missing", "working_targets"]

_asking: ContextVar[bool] = ContextVar("asking", default=False)


def working_targets() -> list[str]:
    """Targets whose builder and device this machine has."""
    from staindiffuser.export import builders

    working = []
    token = _asking.set(True)  # a target that fails here must not query the others in turn
    try:
        for target in builders.TARGETS:
            with contextlib.suppress(DependencyError):
                builder = builders.get(target)
                builder.version()
                builder.device()
                working.append(target)
    finally:
        _asking.reset(token)
    return working


def missing(target: str, reason: str) -> BuilderMissingError:
    """The error for a target that cannot be used, for the caller to raise."""
    if _asking.get():
        return BuilderMissingError(f"target {target}: {reason}")
    return BuilderMissingError(
        f"target {target}: {reason}; targets that work here: {', '.join(working_targets()) or 'none'}"
    )
