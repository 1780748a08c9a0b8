"""A port belongs to one server: whoever listens on it, on any address, and whichever of two servers came first."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from staindiffuser.serving.errors import PortInUseError
from staindiffuser.serving.ports import PortClaim

HOLDER = """
import sys
from staindiffuser.serving.ports import PortClaim
claim = PortClaim(None, option="--grpc-port")
print(claim.port, flush=True)
sys.stdin.read()
"""
PARENT = """
import subprocess, sys, time
from staindiffuser.serving.ports import PortClaim
claim = PortClaim(None, option="--grpc-port")
child = subprocess.Popen(["sleep", "60"], pass_fds=[claim.fileno()])
print(claim.port, child.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder() -> Iterator[tuple[subprocess.Popen[str], int]]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield process, int(process.stdout.readline())
    process.kill()
    process.communicate()


def listening(family: int, address: str, *, reuse_port: bool = False, v6only: bool = False) -> socket.socket:
    listener = socket.socket(family)
    if reuse_port:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(v6only))
    listener.bind((address, 0))
    listener.listen()
    return listener


def test_a_free_port_is_claimed_and_released() -> None:
    with PortClaim(None, option="--grpc-port") as first:
        with PortClaim(None, option="--metrics-port") as second:
            assert second.port != first.port
        with pytest.raises(PortInUseError):
            PortClaim(first.port, option="--grpc-port")
    with PortClaim(first.port, option="--grpc-port") as again:
        assert again.port == first.port


@pytest.mark.parametrize(
    ("family", "address", "v6only"),
    [
        (socket.AF_INET, "127.0.0.1", False),
        (socket.AF_INET, "0.0.0.0", False),
        (socket.AF_INET6, "::1", True),
        (socket.AF_INET6, "::", True),
        (socket.AF_INET6, "::", False),
    ],
)
@pytest.mark.parametrize("reuse_port", [False, True])
def test_a_listener_on_any_address_is_found_and_named(
    family: int, address: str, v6only: bool, reuse_port: bool
) -> None:
    try:
        listener = listening(family, address, reuse_port=reuse_port, v6only=v6only)
    except OSError as error:
        pytest.skip(f"this machine has no {address}: {error}")
    with listener:
        port = listener.getsockname()[1]
        with pytest.raises(PortInUseError, match=rf"port {port} is in use by process {os.getpid()} \(.+\): .*--grpc-"):
            PortClaim(port, option="--grpc-port")
    with PortClaim(port, option="--grpc-port"):  # a failed claim leaves no lock behind
        pass


def test_the_other_server_is_named(holder: tuple[subprocess.Popen[str], int]) -> None:
    process, port = holder
    with pytest.raises(PortInUseError, match=f"in use by another StainDiffuser server, process {process.pid} "):
        PortClaim(port, option="--metrics-port")


def test_a_killed_server_holds_nothing(holder: tuple[subprocess.Popen[str], int]) -> None:
    process, port = holder
    process.kill()
    process.wait()
    with PortClaim(port, option="--grpc-port") as claim:
        assert claim.port == port


def test_a_supervisor_that_is_still_stopping_the_server_keeps_the_port() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    port, child = map(int, parent.stdout.readline().split())
    try:
        parent.kill()
        parent.wait()
        parent.stdout.close()
        with pytest.raises(PortInUseError, match=rf"server that is stopping \(process {parent.pid} has ended\)"):
            PortClaim(port, option="--grpc-port")
    finally:
        os.kill(child, signal.SIGKILL)


def test_connections_that_linger_do_not_block_a_restart() -> None:
    """The end that closes first stays in TIME_WAIT; a restarted server must not wait a minute for it."""
    with listening(socket.AF_INET, "127.0.0.1") as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            listener.accept()[0].close()
    with PortClaim(port, option="--grpc-port") as claim:
        assert claim.port == port


def test_a_port_that_does_not_exist() -> None:
    with pytest.raises(PortInUseError, match="port 70000 does not exist: choose one below 65536 with --grpc-port"):
        PortClaim(70000, option="--grpc-port")
