"""Errors of serving, with their exit codes. A Triton that ends is a :class:`staindiffuser.errors.ServerLostError`::

StainDiffuserError
├── UsageError
│   └── PortInUseError         2  another process uses the port
├── ServerError
│   └── ServerStartError       3  Triton did not become ready; the message quotes its log
└── DependencyError
    └── ServerMissingError     6  no tritonserver, no shared Python library, too little shared memory
"""

from staindiffuser.errors import DependencyError, ServerError, UsageError

__all__ = ["PortInUseError", "ServerMissingError", "ServerStartError"]


class PortInUseError(UsageError):
    """Another process uses a requested port."""


class ServerStartError(ServerError):
    """Triton did not become ready."""


class ServerMissingError(DependencyError):
    """This machine lacks something that the embedded server needs."""
