"""Errors of the client, with their exit codes. A lost server is :class:`staindiffuser.errors.ServerLostError`::

StainDiffuserError
├── UsageError
│   ├── UnknownStainError      2  the model does not have a requested stain
│   ├── FileNameError          2  a file name is not UTF-8
│   ├── OutputError            2  the output cannot be written, or already holds a result
│   └── RefusedRequestError    2  the server rejects a request: its origin, shape or batch size
├── ServerError
│   ├── ServerUnreachableError 3  no gRPC server answers at the address, or it is not ready
│   ├── ServerLostError        3  the server went away, or did not answer in time, during the work
│   ├── ServerBusyError        3  the server refused a request for too long because it has more than it can do
│   ├── ModelChangedError      3  the server was replaced by one with another model during the work
│   └── ContractError          3  the server has no ensemble that this client understands
└── InputError
    └── RunRecordError         4  a result's run.json is missing or malformed
"""

from staindiffuser.errors import InputError, ServerError, UsageError

__all__ = [
    "ContractError",
    "FileNameError",
    "ModelChangedError",
    "OutputError",
    "RefusedRequestError",
    "RunRecordError",
    "ServerBusyError",
    "ServerUnreachableError",
    "UnknownStainError",
]


class UnknownStainError(UsageError):
    """The model does not have a requested stain."""


class FileNameError(UsageError):
    """The name of an input or output is not valid UTF-8, so it cannot be recorded."""


class OutputError(UsageError):
    """The output cannot be written, or already holds a result."""


class RefusedRequestError(UsageError):
    """The server rejects a request: an origin that is not a multiple of 16, or an unsupported shape or batch size."""


class ServerUnreachableError(ServerError):
    """No gRPC server answers at the address, or it is not ready."""


class ServerBusyError(ServerError):
    """The server refused a request for too long because it has more work than it can do."""


class ModelChangedError(ServerError):
    """The server was replaced by one with another model during the work, whose results must not be mixed."""


class ContractError(ServerError):
    """The server has no ensemble that this client understands."""


class RunRecordError(InputError):
    """A result's ``run.json`` is missing or malformed."""
