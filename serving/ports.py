"""TCP ports claimed for one server: checked to be free, and locked for as long as that server lives.

A claim consists of two checks, because neither is enough. The lock makes two of our servers that start at the same
moment exclude each other; the probe finds listeners of any other kind.

The lock is a socket in Linux's abstract Unix namespace, bound to a name derived from the port. Binding is atomic, the
kernel releases the name when the last process that holds the socket ends, the name is visible to every user of the same
network namespace (exactly those who share the TCP ports), and a connection to it tells the holder's process id.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from types import TracebackType
from typing import Self

import psutil

from staindiffuser.serving.errors import PortInUseError

__all__ = ["PortClaim"]

_FREE_PORT_TRIES = 100


class PortClaim:
    """A claimed TCP port; closing it, or the end of every process that inherited its lock, releases it."""

    def __init__(self, port: int | None, *, option: str) -> None:
        """Claim a port on all addresses, IPv4 and IPv6.

        Args:
            port: the port, or None for any free one.
            option: the command-line option that sets it, for error messages.

        Raises:
            PortInUseError: the port is in use or cannot be used; names the process that holds it, if it can be found.
        """
        if port is not None:
            self.port, self._lock = port, _claim(port, option)
            return
        for _ in range(_FREE_PORT_TRIES):
            candidate = _free_port()
            with contextlib.suppress(PortInUseError):
                self.port, self._lock = candidate, _claim(candidate, option)
                return
        raise PortInUseError(f"no free port was found: choose one with {option}")

    def fileno(self) -> int:
        """File descriptor of the lock; a child that inherits it keeps the claim alive."""
        return self._lock.fileno()

    def close(self) -> None:
        """Release the port, unless another process has inherited the lock."""
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _claim(port: int, option: str) -> socket.socket:
    lock = socket.socket(socket.AF_UNIX)
    try:
        try:
            lock.bind(_lock_name(port))
            lock.listen(socket.SOMAXCONN)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise PortInUseError(f"port {port} is in use by {_lock_holder(port)}: {_advice(option)}") from error
        _probe(port, option)
    except BaseException:
        lock.close()
        raise
    return lock


def _probe(port: int, option: str) -> None:
    """Check that nothing listens on the port, on any address of either family."""
    for family, address in ((socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")):
        with contextlib.closing(socket.socket(family)) as probe:
            # Allows the port while connections of an earlier server linger in TIME_WAIT, but not beside a listener.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            try:
                probe.bind((address, port))
                return
            except OverflowError:
                raise PortInUseError(f"port {port} does not exist: choose one below 65536 with {option}") from None
            except OSError as error:
                if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT) and family == socket.AF_INET6:
                    continue  # a machine without IPv6
                if error.errno == errno.EADDRINUSE:
                    raise PortInUseError(f"port {port} is in use by {_listener(port)}: {_advice(option)}") from error
                raise PortInUseError(f"port {port} cannot be used ({error.strerror}): {_advice(option)}") from error


def _lock_name(port: int) -> str:
    return f"\0staindiffuser/port/{port}"


def _lock_holder(port: int) -> str:
    """The process that holds the lock, in words."""
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as peer:
        peer.settimeout(1)
        try:
            peer.connect(_lock_name(port))
        except OSError:  # bound but not listening yet, or released in the meantime
            return "another StainDiffuser server that is starting or stopping"
        pid = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))[0]
    try:
        command = " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return f"a StainDiffuser server that is stopping (process {pid} has ended)"
    return f"another StainDiffuser server, process {pid} ({_shortened(command)})"


def _listener(port: int) -> str:
    """The process that listens on the port, in words. Its command line may hold secrets and is not quoted."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,)
            if listens and connection.pid:
                return f"process {connection.pid} ({psutil.Process(connection.pid).name()})"
    return "another process"


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _advice(option: str) -> str:
    return f"stop it, or choose another port with {option}"


def _shortened(text: str) -> str:
    return text if len(text) <= 160 else text[:157] + "..."
