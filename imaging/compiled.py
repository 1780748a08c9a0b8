"""Loops over pixels, compiled by Numba when they are first called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

__all__ = ["compiled"]

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compile a function of arrays and numbers. It runs without Python's lock: several threads run it side by side.

    The machine code is kept beside the source, or in the user's cache, and used by later processes. Where neither can
    be written, each process compiles it again.
    """
    try:
        return cast(Function, numba.njit(nogil=True, cache=True)(function))
    except RuntimeError:  # no place to keep it
        return cast(Function, numba.njit(nogil=True)(function))
