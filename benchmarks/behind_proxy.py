"""HAProxy with mutual TLS in front of a server, configured by ``staindiffuser proxy``, with throwaway certificates."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from staindiffuser.benchmarks.certificates import Authority
from staindiffuser.client.credentials import Credentials
from staindiffuser.errors import DependencyError
from staindiffuser.serving.proxy import ProxyOptions, ProxyServer, write_proxy
from staindiffuser.serving.server import TritonServer

__all__ = ["behind_proxy"]

START_SECONDS = 30.0
MESSAGE_BYTES = 1 << 30


@contextlib.contextmanager
def behind_proxy(server: TritonServer, folder: Path) -> Iterator[tuple[str, Credentials, int]]:
    """The proxy's ``HOST:PORT``, what it knows its client by, and its process's id.

    Args:
        server: a running server.
        folder: where certificates, configuration and log are written.

    Raises:
        DependencyError: HAProxy is not installed, or did not start.
    """
    program = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
    if program is None:
        raise DependencyError("haproxy is not installed: apt-get install haproxy, or measure without --proxy")
    authority = Authority.create(folder / "pki")
    for name in ("server", "client"):
        authority.issue(name)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    metrics_port = server.metrics_url.rpartition(":")[2].partition("/")[0]
    options = ProxyOptions(
        listen=f"127.0.0.1:{port}",
        servers=(ProxyServer.parse(f"{server.url}:{metrics_port}"),),
        certificate=authority.folder / "server.pem",
        client_ca=authority.folder / "ca.pem",
        requests_per_10s=1_000_000,
        max_message=MESSAGE_BYTES,
    )
    configuration = write_proxy(options, folder / "proxy")
    credentials = Credentials(
        authority=authority.folder / "ca.pem",
        certificate=authority.folder / "client.pem",
        key=authority.folder / "client.key",
    )
    with (folder / "haproxy.log").open("wb") as log:
        process = subprocess.Popen([program, "-W", "-f", configuration], stdout=log, stderr=log)
    url = f"localhost:{port}"
    try:
        _wait(url, credentials, folder / "haproxy.log")
        yield url, credentials, process.pid
    finally:
        process.terminate()
        process.wait(20)


def _wait(url: str, credentials: Credentials, log: Path) -> None:
    import tritonclient.grpc as triton

    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        with (
            contextlib.suppress(triton.InferenceServerException),
            triton.InferenceServerClient(url, **credentials.tls()) as client,
        ):
            if client.is_server_ready(client_timeout=5):
                return
        time.sleep(0.1)
    raise DependencyError(f"haproxy did not start: {log.read_text(encoding='utf-8').strip()[-500:]}")
