"""Several servers that serve the same model, used as one: a request goes to the least busy, and on if that is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from staindiffuser.client.connection import BUSY_PATIENCE, StainClient
from staindiffuser.client.contract import ModelContract
from staindiffuser.client.errors import ContractError, ServerBusyError, ServerUnreachableError
from staindiffuser.errors import ServerError, ServerLostError
from staindiffuser.imaging.arrays import UInt8Array

__all__ = ["ServerPool"]

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before a lost server is tried again; the pause doubles each time."""


@dataclass
class _Member:
    """One server of a pool."""

    address: str
    client: StainClient | None = None
    """None while it has never been reached."""
    busy: int = 0
    """Requests that run there."""
    retry_at: float = 0.0
    """When a lost server may be tried again."""
    pause: float = FIRST_PAUSE


class ServerPool:
    """Stains tiles on several servers; thread-safe, a :class:`~staindiffuser.client.contract.Stainer`.

    A request whose server is lost is sent to another one. A lost server is tried again after a pause. Servers that
    cannot be reached at first may join later.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        connect: Callable[[str], StainClient],
        *,
        in_flight: int,
        patience: float,
        say: Callable[[str], None],
    ) -> None:
        """Connect to every server.

        Args:
            addresses: ``HOST:PORT`` of each server.
            connect: connects to one of them; its client must not wait for a lost server itself.
            in_flight: concurrent requests per server.
            patience: seconds to wait while no server can be reached.
            say: receives messages about servers that are lost or join.

        Raises:
            ServerUnreachableError: none of them can be reached.
            ContractError: they do not serve the same model.
        """
        self._connect, self._in_flight, self._patience, self._say = connect, in_flight, patience, say
        self._members = [_Member(address) for address in addresses]
        self._change = threading.Condition()
        self._cancelled = False
        errors: list[ServerError] = []
        for member in self._members:
            try:
                member.client = connect(member.address)
            except ServerUnreachableError as error:
                errors.append(error)
                say(f"{error}; going on without it")
        clients = [member.client for member in self._members if member.client is not None]
        if not clients:
            raise errors[-1]
        self._contract = clients[0].contract
        for client in clients[1:]:
            if client.contract != self._contract:
                self.close()
                raise ContractError(f"{clients[0].url} and {client.url} do not serve the same model: use one of them")

    @property
    def url(self) -> str:
        """The servers' addresses."""
        return ", ".join(member.address for member in self._members)

    @property
    def server_version(self) -> str:
        """The servers' names and versions."""
        return ", ".join(sorted({client.server_version for client in self._clients()}))

    @property
    def server_id(self) -> str:
        """Random identities of the servers' starts."""
        return ", ".join(client.server_id for client in self._clients())

    @property
    def contract(self) -> ModelContract:
        """Inputs, outputs and identity of the served model."""
        return self._contract

    def stain_tiles(
        self,
        tiles_BTT3: UInt8Array,
        origins_B2: NDArray[np.int64],
        seed: int,
        *,
        stains: Sequence[str] | None = None,
        images: bool = True,
        cells: bool = True,
        quality: bool = False,
    ) -> dict[str, NDArray[Any]]:
        """Stain a batch on one of the servers; see :meth:`staindiffuser.client.connection.StainClient.stain_tiles`."""
        give_up: float | None = None
        error: ServerError = ServerLostError(f"the requests to {self.url} were cancelled")
        while True:
            member = self._reserve(give_up, error)
            try:
                if member.client is None:
                    member.client = self._join(member)
                outputs = member.client.stain_tiles(
                    tiles_BTT3, origins_B2, seed, stains=stains, images=images, cells=cells, quality=quality
                )
            except ContractError:
                self._release(member)
                raise
            except ServerBusyError as busy:  # the others may have time; if none has, wait longer than for a lost one
                error, give_up = busy, give_up or time.monotonic() + BUSY_PATIENCE
                self._release(member, trouble="busy")
            except ServerError as lost:  # gone, or broken: Triton answers even if a process of its own has died
                error, give_up = lost, give_up or time.monotonic() + self._patience
                self._release(member, trouble="lost")
            except BaseException:
                self._release(member)
                raise
            else:
                self._release(member)
                return outputs

    def cancel(self) -> None:
        """Abort all requests, from any thread; later calls fail."""
        with self._change:
            self._cancelled = True
            self._change.notify_all()
        for client in self._clients():
            client.cancel()

    def close(self) -> None:
        """Close all connections."""
        for client in self._clients():
            client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _clients(self) -> list[StainClient]:
        return [member.client for member in self._members if member.client is not None]

    def _reserve(self, give_up: float | None, error: ServerError) -> _Member:
        """Wait for a server with a free place; raises ``error`` if all are lost and ``give_up`` has passed."""
        with self._change:
            while True:
                now = time.monotonic()
                if self._cancelled:
                    raise ServerLostError(f"the requests to {self.url} were cancelled")
                usable = [member for member in self._members if member.retry_at <= now]
                free = [member for member in usable if member.busy < self._in_flight]
                if free:
                    member = min(free, key=lambda member: member.busy)
                    member.busy += 1
                    return member
                if give_up is not None and now > give_up and not usable:
                    raise error
                self._change.wait(FIRST_PAUSE)

    def _release(self, member: _Member, *, trouble: str = "") -> None:
        with self._change:
            member.busy -= 1
            if not trouble:
                member.pause = FIRST_PAUSE
            elif member.retry_at <= time.monotonic():  # the first of the requests that were lost together
                if member.pause == FIRST_PAUSE and not self._cancelled:
                    self._say(f"{member.address} is {trouble}; its tiles go to the other servers until it is back")
                member.retry_at = time.monotonic() + member.pause
                member.pause = min(2 * member.pause, LONGEST_PAUSE)
            self._change.notify_all()

    def _join(self, member: _Member) -> StainClient:
        client = self._connect(member.address)
        if client.contract != self._contract:
            with suppress(ServerError):
                client.close()
            raise ServerUnreachableError(f"{member.address} serves another model")
        return client
