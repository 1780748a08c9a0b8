"""The viewer's exceptions, and the HTTP status of each."""

from __future__ import annotations

from typing import ClassVar

from staindiffuser.errors import InputError, UsageError

__all__ = ["NotThereError", "RequestError", "ResultGoneError", "ViewerUsageError"]


class ViewerUsageError(UsageError):
    """An address that cannot be used, or a name for it that is not one."""


class NotThereError(UsageError):
    """A request for a slide, a stain or a tile that does not exist."""

    status: ClassVar[int] = 404


class RequestError(UsageError):
    """A request that cannot be answered: a region that is not one, a threshold out of range."""

    status: ClassVar[int] = 400


class ResultGoneError(InputError):
    """A result, or one of its files, that was there and cannot be read any more."""

    status: ClassVar[int] = 410
