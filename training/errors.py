"""What can go wrong while preparing data, training and evaluating::

StainDiffuserError
├── UsageError
│   └── ConfigError      2  a configuration field, option or preset that cannot be
└── InputError
    ├── DataError        4  a paired-tiles folder, image or slide that cannot be used
    └── CheckpointError  4  a checkpoint that is missing, incomplete or of another format
"""

from staindiffuser.errors import InputError, UsageError

__all__ = ["CheckpointError", "ConfigError", "DataError"]


class ConfigError(UsageError):
    """A configuration field has a value it cannot have; the message names the field and the allowed values."""


class DataError(InputError):
    """Training data cannot be used; the message names the file, the row and the field."""


class CheckpointError(InputError):
    """A checkpoint folder is missing, incomplete or of a format this version does not read."""
