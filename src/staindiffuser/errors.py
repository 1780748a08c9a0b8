"""The root of every package's exception tree, and the exit codes the command line promises.

``StainDiffuserError`` carries the exit code. Each package's ``errors.py`` derives from the classes here::

    StainDiffuserError
    ├── UsageError            2  wrong usage or configuration, unknown stain, unwritable output
    ├── ServerError           3  server unreachable or lost
    │   └── ServerLostError   3  it went away, or did not answer in time, during the work
    ├── InputError            4  input missing, unreadable, unsupported, or without mpp
    ├── VerificationError     5  manifest, parity or stale engine
    ├── DependencyError       6  a dependency or the hardware is missing
    └── DivergedError         7  training diverged: the loss or a weight is not finite (training/errors.py)

0 is done, 1 is "some slides failed", 130 is interrupted.
"""

from typing import ClassVar

__all__ = [
    "EXIT_INTERRUPTED",
    "EXIT_SOME_FAILED",
    "DependencyError",
    "InputError",
    "ServerError",
    "ServerLostError",
    "StainDiffuserError",
    "UsageError",
    "VerificationError",
]

EXIT_SOME_FAILED = 1
EXIT_INTERRUPTED = 130


class StainDiffuserError(Exception):
    """An expected failure. Its message is one line: what is wrong, with which file or field, and what to do."""

    exit_code: ClassVar[int] = 1


class UsageError(StainDiffuserError):
    """Wrong usage or configuration: an unknown stain, an impossible option, an unwritable output."""

    exit_code = 2


class ServerError(StainDiffuserError):
    """The Triton server cannot be reached or failed."""

    exit_code = 3


class ServerLostError(ServerError):
    """The Triton server ended, became unreachable or did not answer in time while it was in use."""


class InputError(StainDiffuserError):
    """An input is missing, unreadable, unsupported, or lacks its pixel size (mpp)."""

    exit_code = 4


class VerificationError(StainDiffuserError):
    """A manifest, a parity check or an engine's identity did not hold: nothing is served or published."""

    exit_code = 5


class DependencyError(StainDiffuserError):
    """A package or the hardware that a command needs is missing."""

    exit_code = 6
