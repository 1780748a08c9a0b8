"""Runs the viewer's server until it is stopped."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import secrets
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import uvicorn

from staindiffuser.errors import DependencyError
from staindiffuser.viewer.app import STATIC, make_app
from staindiffuser.viewer.errors import ViewerUsageError
from staindiffuser.viewer.guard import LOOPBACK, Guard
from staindiffuser.viewer.results import Library, find_results

__all__ = ["DEFAULT_PORT", "OPENSEADRAGON", "require_openseadragon", "view_results"]

DEFAULT_PORT = 8127
START_SECONDS = 5.0
"""Longest that the address is held back while the first slide is read; a slide of gigabytes takes longer."""
OPENSEADRAGON = STATIC / "vendor" / "openseadragon.min.js"


def require_openseadragon() -> None:
    """Refuse to show a page without the library that draws the images.

    Raises:
        DependencyError: it was left out when this package was built.
    """
    if not OPENSEADRAGON.is_file():
        raise DependencyError(
            "this build of StainDiffuser lacks OpenSeadragon, which draws the images: install it again where "
            f"npm can reach its registry, or put openseadragon.min.js of version 6.1.1 at {OPENSEADRAGON}"
        )


def view_results(
    results: Sequence[Path],
    *,
    slides: Sequence[Path],
    host: str,
    port: int | None,
    token: str | None,
    truth: Sequence[str] = (),
    say: Callable[[str], None],
) -> None:
    """Serve the page until Ctrl-C or SIGTERM.

    Args:
        results: folders of results, or folders that hold them.
        slides: files and folders among which H&E slides are looked for.
        host: address or name to listen on.
        port: 0 for a free one; None for the usual one, or a free one if that is taken.
        token: what visitors must bring; by default none on loopback, and a random one elsewhere.
        truth: registered real stains of the only result, ``STAIN=FILE``.
        say: receives the address.

    Raises:
        ResultGoneError: there is no result.
        ViewerUsageError: the address cannot be used, or a real stain does not fit.
        DependencyError: OpenSeadragon is missing.
    """
    require_openseadragon()
    entries = find_results(results)
    library = Library(entries, slides, truth)
    # Finding the H&E means reading it once: before somebody waits for it.
    first = threading.Thread(target=library.open_first, daemon=True)
    first.start()
    if truth:  # refuse one that does not fit before a page is opened
        library.open(next(entry.name for entry in entries if entry.error is None))
    listening = _listen(host, port)
    with listening:
        local = _is_loopback(host)
        if not local and token is None:
            token = secrets.token_urlsafe(24)
        names = (*LOOPBACK, host.lower(), f"[{host.lower()}]") if local or not _is_any(host) else None
        app = Guard(make_app(library), names=names, token=token)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, timeout_keep_alive=30,
            timeout_graceful_shutdown=2, ws="none", loop="asyncio", http="h11",
        )  # fmt: skip
        failed = sum(entry.error is not None for entry in entries)
        say(f"{len(entries)} slides" + (f", {failed} of them without a result" if failed else ""))
        if not local:
            say("the connection is not encrypted, and whoever has this address sees the slides")
        first.join(START_SECONDS)
        say(f"open {address(host, listening.getsockname()[1], token)} (Ctrl-C ends)")
        server = uvicorn.Server(config)
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn ends cleanly, then passes the signal on
            server.run(sockets=[listening])
        say("stopped")


def address(host: str, port: int, token: str | None) -> str:
    """What to open in a browser."""
    name = socket.gethostname() if _is_any(host) else f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}/" + (f"?token={token}" if token else "")


def _listen(host: str, port: int | None) -> socket.socket:
    wanted = [port] if port is not None else [DEFAULT_PORT, 0]
    problem: OSError | None = None
    for number in wanted:
        try:
            found = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, kind, protocol, _, place = found[0]
            opened = socket.socket(family, kind, protocol)
        except OSError as error:
            raise ViewerUsageError(
                f"--host {host} is not an address of this machine: {error.strerror or error}"
            ) from error
        try:
            if hasattr(socket, "SO_REUSEADDR") and socket.has_ipv6 is not None and not _is_windows():
                opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind(place)
            opened.listen(128)
            return opened
        except OSError as error:
            opened.close()
            problem = error
            if error.errno != errno.EADDRINUSE:
                break
    raise ViewerUsageError(
        f"{host}:{port if port is not None else DEFAULT_PORT} cannot be used: "
        f"{problem.strerror if problem else ''}; choose another --port, or 0 for a free one"
    )


def _is_windows() -> bool:
    import sys

    return sys.platform == "win32"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _is_any(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False
