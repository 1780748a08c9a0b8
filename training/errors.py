"""What can go wrong while preparing data, training and evaluating::

StainDiffuserError
├── UsageError
│   └── ConfigError      2  a configuration field, option or preset has a value that it cannot have
├── InputError
│   ├── DataError        4  a paired-tiles folder, image or slide cannot be used
│   └── CheckpointError  4  a checkpoint is missing, incomplete, not finite or of another format
├── DependencyError
│   └── LoaderError      6  a loader process was lost: too little memory
└── DivergedError        7  the loss or a weight is no longer finite
"""

from staindiffuser.errors import DependencyError, InputError, StainDiffuserError, UsageError

__all__ = ["CheckpointError", "ConfigError", "DataError", "DivergedError", "LoaderError"]


class ConfigError(UsageError):
    """A configuration field has a value it cannot have; the message names the field and the allowed values."""


class DataError(InputError):
    """Training data cannot be used; the message names the file, the row and the field."""


class CheckpointError(InputError):
    """A checkpoint folder is missing, incomplete, not finite or of a format this version does not read."""


class LoaderError(DependencyError):
    """A loader process ended before its time, or shared memory was too small for a batch."""


class DivergedError(StainDiffuserError):
    """The loss or a weight is no longer finite: training has diverged."""

    exit_code = 7
