"""Telling systemd that a service is ready or stopping (the protocol of ``sd_notify``)."""

from __future__ import annotations

import os
import socket

__all__ = ["notify"]


def notify(state: str) -> None:
    """Send a state such as ``READY=1`` or ``STOPPING=1``; does nothing for a process that systemd did not start."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as connection:
            connection.connect(f"\0{address[1:]}" if address.startswith("@") else address)
            connection.sendall(state.encode())
