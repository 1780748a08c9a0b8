"""HAProxy in front of servers, configured as ``staindiffuser proxy`` configures it."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped]
import pytest
import tritonclient.grpc as triton

from staindiffuser.benchmarks.certificates import Authority
from staindiffuser.client.credentials import Credentials
from staindiffuser.serving.proxy import ProxyOptions, ProxyServer, write_proxy
from staindiffuser.serving.server import TritonServer
from tests.running_serve import eventually

MAX_MESSAGE = 200_000


def haproxy() -> str:
    path = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
    if path is None:
        pytest.skip("haproxy is not installed: apt-get install haproxy")
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Proxy:
    """A running HAProxy."""

    def __init__(self, folder: Path, options: ProxyOptions) -> None:
        self.url = f"localhost:{options.listen.rpartition(':')[2]}"
        self.health = f"http://{options.health_listen}"
        self.metrics = f"https://localhost:{options.metrics_listen.rpartition(':')[2]}"
        self.log = folder / "log"
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None

    def credentials(self, name: str = "clinic", **others: Any) -> Credentials:
        folder = self.folder.parent
        files = {"certificate": folder / f"{name}.pem", "key": folder / f"{name}.key"} if name else {}
        return Credentials(**{"authority": folder / "ca.pem", **files, **others})

    def client(self, name: str = "clinic") -> triton.InferenceServerClient:
        return triton.InferenceServerClient(self.url, **self.credentials(name).tls())

    def channel(self) -> grpc.Channel:
        files = [self.credentials().authority, self.credentials().key, self.credentials().certificate]
        return grpc.secure_channel(self.url, grpc.ssl_channel_credentials(*(f.read_bytes() for f in files if f)))


def address(server: TritonServer) -> str:
    return f"{server.url}:{server.metrics_url.rpartition(':')[2].partition('/')[0]}"


@contextmanager
def running(
    folder: Path, servers: Sequence[TritonServer | str], authority: Authority, **options: Any
) -> Iterator[Proxy]:
    """HAProxy in front of servers, or of the addresses that ``ProxyServer`` reads."""
    (authority.folder / "tokens").write_text("s3cret night-batch\n", encoding="utf-8")
    chosen = ProxyOptions(
        listen=f"127.0.0.1:{free_port()}",
        metrics_listen=f"127.0.0.1:{free_port()}",
        health_listen=f"127.0.0.1:{free_port()}",
        servers=tuple(ProxyServer.parse(s if isinstance(s, str) else address(s)) for s in servers),
        client_ca=authority.folder / "ca.pem",
        **{
            "certificate": authority.folder / "server.pem",
            "tokens": authority.folder / "tokens",
            "max_message": MAX_MESSAGE,
            "requests_per_10s": 10_000,
            **options,
        },
    )
    configuration = write_proxy(chosen, folder)
    checked = subprocess.run([haproxy(), "-c", "-f", configuration], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    assert "WARNING" not in checked.stderr
    proxy = Proxy(folder, chosen)
    with proxy.log.open("w") as log:
        proxy.process = process = subprocess.Popen([haproxy(), "-W", "-f", configuration], stdout=log, stderr=log)
    try:
        assert eventually(lambda: is_ready(proxy), 30), proxy.log.read_text()
        yield proxy
    finally:
        process.terminate()
        process.wait(20)


def is_ready(proxy: Proxy) -> bool:
    try:
        with proxy.client() as client:
            return bool(client.is_server_ready(client_timeout=2))
    except triton.InferenceServerException:
        return False
