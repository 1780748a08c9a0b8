"""What can go wrong in the client::

StainDiffuserError
├── UsageError
│   ├── UnknownStainError      2  a stain the model does not have
│   ├── OutputError            2  an output that cannot be written, or would be overwritten
│   └── RefusedRequestError    2  the server refuses a request: an origin, shape or size it does not take
└── ServerError
    ├── ServerUnreachableError 3  nothing that speaks gRPC answers there
    ├── ServerLostError        3  the server went away, or did not answer in time, while it worked
    └── ContractError          3  a server answers, but serves no ensemble this client understands
"""

from staindiffuser.errors import ServerError, UsageError

__all__ = [
    "ContractError",
    "OutputError",
    "RefusedRequestError",
    "ServerLostError",
    "ServerUnreachableError",
    "UnknownStainError",
]


class UnknownStainError(UsageError):
    """A stain was asked for that the model does not have."""


class OutputError(UsageError):
    """The output cannot be written, or holds a result that would be overwritten."""


class RefusedRequestError(UsageError):
    """The server refuses a request: an origin that is no multiple of 16, a shape or a batch it does not take."""


class ServerUnreachableError(ServerError):
    """Nothing that speaks gRPC answers at the address."""


class ServerLostError(ServerError):
    """The server went away, or did not answer in time, while it worked for this client."""


class ContractError(ServerError):
    """A server answers, but it serves no ensemble that this client understands."""
