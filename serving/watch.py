"""Keeping a server running: a crash is followed by a restart, with pauses that grow while it keeps crashing."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NoReturn

from staindiffuser.errors import ServerError
from staindiffuser.serving.audit import AuditLog
from staindiffuser.serving.server import TritonServer

__all__ = ["keep_running"]

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before the first restart and at most; the pause doubles each time."""
STABLE_SECONDS = 60.0
"""A server that ran for this long starts over with the first pause."""
PROBE_SECONDS = 20.0
"""Between two probe tiles: less than clients wait for a lost server, so that a restart comes in time for them."""
STUCK_SECONDS = 300.0
"""A server that has finished nothing for this long while a probe tile waited is stuck; as long as clients wait."""


def keep_running(server: TritonServer, *, restarts: int, audit: AuditLog, say: Callable[[str], None]) -> NoReturn:
    """Watch a started server, and restart it when it or one of its processes ends.

    Args:
        server: a started server.
        restarts: restarts in a row before giving up; a server that has run for :data:`STABLE_SECONDS` counts anew.
        audit: where crashes and restarts are recorded.
        say: receives one line for each.

    Raises:
        ServerError: the server crashed more often than that.
        StainDiffuserError: it cannot be restarted, for example because its repository has changed.
    """
    crashes = 0
    while True:
        started = time.monotonic()
        try:
            if crashes:
                server.restart()
                audit.record("restarted", pid=server.pid, server_id=server.identity)
                say(f"ready again: {server.url}")
            while True:
                server.wait(PROBE_SECONDS)
                server.probe(STUCK_SECONDS)  # an engine can fail or hang while its process lives on
        except ServerError as error:
            audit.record("crashed", reason=str(error))
            crashes = 1 if time.monotonic() - started > STABLE_SECONDS else crashes + 1
            if crashes > restarts:
                raise
            pause = min(FIRST_PAUSE * 2 ** (crashes - 1), LONGEST_PAUSE)
            say(f"{error}; restart {crashes} of {restarts} in {pause:g} s")
            time.sleep(pause)
