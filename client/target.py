"""Where tiles are stained: servers that are already running, or one started for the duration of the work."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from staindiffuser.client.connection import BUSY_PATIENCE, PATIENCE, StainClient
from staindiffuser.client.contract import Stainer
from staindiffuser.client.credentials import Credentials
from staindiffuser.client.server_pool import ServerPool

__all__ = ["Target"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """The servers to use. Raises ValueError for a value that is out of range or contradicts another."""

    addresses: tuple[str, ...] = ()
    """``HOST:PORT`` of the gRPC endpoint of each running server; all must serve the same model."""
    repository: Path | None = None
    """A model repository to serve during the work; without addresses either, the demonstration model is served."""
    fast: bool | None = None
    """Serve a model that ships on the fastest engines of this CPU, measured once (also if None, unless the environment
    sets ``STAINDIFFUSER_EXACT``), or in float32 (False), whose pixels are the same on every machine, give or take one
    grey level."""
    timeout: float = 300.0
    """Seconds to wait for the answer to a request."""
    patience: float = PATIENCE
    """Seconds to wait for a lost server to return with the same model."""
    urgent: bool = False
    """Requests go before all ordinary ones that wait on the server."""
    model: str = ""
    """Name of the model, or ``NAME@VERSION``, where a server or a proxy offers several; by default the only one, or a
    proxy's current one."""
    use_proxy: bool = False
    """Obey ``http_proxy``."""
    credentials: Credentials = field(default_factory=Credentials)
    """For a server that is offered on a network."""

    def __post_init__(self) -> None:
        if self.addresses and self.repository is not None:
            raise ValueError("--server and --repository are mutually exclusive: --server names a running server")
        if self.fast and self.addresses:
            raise ValueError("--fast is for a model that is served here: start the running server with `serve --fast`")
        for address in self.addresses:
            if not re.fullmatch(r"[^\s/]+:\d{1,5}", address):
                raise ValueError(f"--server must be HOST:PORT of the server's gRPC endpoint, not {address!r}")
        if len(set(self.addresses)) < len(self.addresses):
            raise ValueError("--server names a server twice")
        if not self.addresses and self.credentials != Credentials():
            raise ValueError("--tls-ca, --tls-cert, --tls-key and --token-file are for --server")
        if self.timeout <= 0:
            raise ValueError(f"--timeout must be positive, not {self.timeout:g}")
        if self.patience < 0:
            raise ValueError(f"--patience must not be negative, not {self.patience:g}")

    @contextmanager
    def connect(self, in_flight: int = 4, say: Callable[[str], None] = lambda message: None) -> Iterator[Stainer]:
        """Connect; a server of our own runs as long as the context.

        Args:
            in_flight: concurrent requests per server.
            say: receives messages for the user.

        Raises:
            ServerError: the server cannot be reached or started.
            VerificationError: the model repository differs from its manifest.
        """
        if len(self.addresses) == 1:
            (address,) = self.addresses
            with self._client(address, in_flight, patience=self.patience, credentials=self.credentials) as client:
                yield client
            return
        if self.addresses:

            def connect(address: str) -> StainClient:
                # The pool waits itself, and asks the other servers meanwhile.
                return self._client(address, in_flight, patience=0, busy_patience=0, credentials=self.credentials)

            with ServerPool(self.addresses, connect, in_flight=in_flight, patience=self.patience, say=say) as pool:
                yield pool
            return
        # Imported here, because a client of a remote server does not need the packages of the server.
        from staindiffuser.serving.demo import repository_of
        from staindiffuser.serving.server import TritonServer

        if self.repository is None:
            say("serving the demonstration model, which is meant only for trying out the software")
        with (
            TritonServer(repository_of(self.repository, say, fast=self.fast)) as server,
            self._client(server.url, in_flight, patience=0) as client,  # nobody restarts this server
        ):
            yield client

    def _client(
        self,
        address: str,
        in_flight: int,
        *,
        patience: float,
        busy_patience: float = BUSY_PATIENCE,
        credentials: Credentials | None = None,
    ) -> StainClient:
        return StainClient(
            address,
            in_flight=in_flight,
            deadline=self.timeout,
            patience=patience,
            busy_patience=busy_patience,
            urgent=self.urgent,
            model=self.model,
            use_proxy=self.use_proxy,
            credentials=credentials,
        )
