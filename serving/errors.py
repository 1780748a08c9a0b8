"""What can go wrong while serving::

StainDiffuserError
├── UsageError
│   └── PortInUseError         2  another process listens on the port
├── ServerError
│   ├── ServerStartError       3  Triton did not become ready; the message quotes its log
│   └── ServerLostError        3  Triton ended by itself
└── DependencyError
    └── ServerMissingError     6  no tritonserver, no shared Python library, too little shared memory
"""

from staindiffuser.errors import DependencyError, ServerError, UsageError

__all__ = ["PortInUseError", "ServerLostError", "ServerMissingError", "ServerStartError"]


class PortInUseError(UsageError):
    """Another process listens on a port that was asked for."""


class ServerStartError(ServerError):
    """Triton did not become ready."""


class ServerLostError(ServerError):
    """Triton ended by itself."""


class ServerMissingError(DependencyError):
    """What the embedded server needs is not on this machine."""
