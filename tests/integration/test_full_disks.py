"""Full disks and full shared memory under a running ``serve``: nothing hangs, and what is answered is right.

Each server sees small file systems of its own, in a mount namespace; that takes root.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from staindiffuser.client import StainClient
from staindiffuser.errors import ServerError
from staindiffuser.export.repository import build_repository
from staindiffuser.serving.audit import AuditLog
from tests.running_serve import ORIGINS, TILE, Serve, eventually, kill_server, marked, serving
from tests.synthetic_graphs import write_graphs


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    write_graphs(folder / "graphs", tile=TILE)
    return build_repository(folder / "graphs", folder / "models", max_batch=1, threads=1)


def small(place: Path, size: str) -> Sequence[str]:
    """A command's prefix: the command sees ``place`` as an empty file system of this size."""
    wrapper = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs -o size={size} none {place} && exec "$@"', "sh"]
    try:
        if subprocess.run([*wrapper, "true"], capture_output=True, check=False).returncode == 0:
            return wrapper
    except FileNotFoundError:
        pass
    pytest.skip("mounting in a namespace takes root and unshare (util-linux)")


@contextlib.contextmanager
def full(server: Serve, place: Path) -> Iterator[None]:
    """Fill a server's file system to the last byte, again whenever something is freed; empty it at the end."""
    filler = Path(f"/proc/{server.process.pid}/root{place}/filler")
    stop, filled = threading.Event(), threading.Event()

    def fill() -> None:
        with filler.open("wb", buffering=0) as file:
            while not stop.is_set():
                for size in (1 << 16, 1 << 12, 1):
                    with contextlib.suppress(OSError):
                        while not stop.is_set():
                            file.write(bytes(size))
                filled.set()
                stop.wait(0.002)

    with ThreadPoolExecutor(1) as pool:
        filling = pool.submit(fill)
        try:
            assert filled.wait(60)
            yield
        finally:
            stop.set()
            filling.result()
            filler.unlink()


def expected(server: Serve) -> list[dict[str, np.ndarray]]:
    with StainClient(server.url) as client:
        return [client.stain_tiles(marked(number), ORIGINS, number) for number in range(6)]


def require_right(answer: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(answer[name], tensor)


def test_a_full_disk_ends_no_server_and_a_crash_is_survived_once_there_is_room(
    repository: Path, tmp_path: Path
) -> None:
    """Logs, audit log and temporary files on one disk, which fills up."""
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["--log", disk / "triton.log"]
    with serving(repository, disk, *options, wrapper=small(disk, "2m"), TMPDIR=str(disk)) as server:
        assert server.process.stderr is not None
        audit = Path(f"/proc/{server.process.pid}/root{disk}/audit.jsonl")
        wanted = expected(server)
        with full(server, disk), StainClient(server.url) as client:
            require_right(client.stain_tiles(marked(1), ORIGINS, 1), wanted[1])
            kill_server(server)
            said = [server.process.stderr.readline() for _ in range(2)]
        assert "restart 1 of 5" in said[0], said
        assert re.search(r"Triton could not be started: .*: No space left on device; restart 2 of 5", said[1]), said
        assert eventually(lambda: "restarted" in audit.read_text(encoding="utf-8"), 60)
        with StainClient(server.url) as client:
            require_right(client.stain_tiles(marked(2), ORIGINS, 2), wanted[2])
        server.process.send_signal(signal.SIGTERM)
        assert eventually(lambda: "stop" in audit.read_text(encoding="utf-8"), 30)
        events = [json.loads(line)["event"] for line in audit.read_text(encoding="utf-8").splitlines() if line]
        assert events[:2] == ["start", "ready"]
        assert events[-3:] == ["restarted", "drained", "stop"]
        server.process.communicate(timeout=30)
    assert server.process.returncode == 0


def test_a_disk_that_is_full_at_the_start_is_named(repository: Path, tmp_path: Path) -> None:
    command = ["serve", str(repository), "--grpc-port", "0", "--metrics-port", "0", "--audit", "/dev/full"]
    program = [sys.executable, "-c", "from staindiffuser.cli import main; main()"]
    result = subprocess.run([*program, *command], capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 2
    assert result.stderr.startswith("error: the audit log /dev/full cannot be written: No space left on device")


def test_an_event_that_the_audit_log_cannot_take_is_said(tmp_path: Path) -> None:
    """A full disk later on ends nothing, and what was written before stays readable."""
    said: list[str] = []
    log = tmp_path / "audit.jsonl"
    log.symlink_to(tmp_path / "disk")
    book = AuditLog(log, said.append)
    book.record("start")
    log.unlink()
    log.symlink_to("/dev/full")
    book.record("crashed", reason="out of memory?")
    log.unlink()
    log.symlink_to(tmp_path / "disk")
    book.record("restarted")
    (line,) = said
    assert line.startswith(f"the audit log {log} cannot be written: No space left on device: ")
    assert json.loads(line.partition("device: ")[2])["event"] == "crashed"
    events = [json.loads(line)["event"] for line in log.read_text(encoding="utf-8").splitlines() if line]
    assert events == ["start", "restarted"]


def test_shared_memory_that_is_full_costs_requests_and_not_the_server(repository: Path, tmp_path: Path) -> None:
    place = Path("/dev/shm")
    with serving(repository, tmp_path, wrapper=small(place, "16m")) as server:
        wanted = expected(server)
        outcomes: list[tuple[int, dict[str, np.ndarray]]] = []

        def send(client: StainClient, number: int) -> None:
            with contextlib.suppress(ServerError):  # at once, or after the deadline
                outcomes.append((number, client.stain_tiles(marked(number), ORIGINS, number)))

        with full(server, place), StainClient(server.url, patience=0, deadline=20, in_flight=6) as client:
            with ThreadPoolExecutor(6) as pool:
                for future in [pool.submit(send, client, number % 6) for number in range(12)]:
                    future.result(timeout=60)
            answered = len(outcomes)
        with StainClient(server.url, patience=60, connect_timeout=60) as client:
            send(client, 3)
        assert len(outcomes) == answered + 1
        for number, answer in outcomes:
            require_right(answer, wanted[number])
        assert server.end()[0] == 0


def test_requests_that_wait_take_no_shared_memory(tmp_path: Path) -> None:
    """Forty requests, of which only a few would fit into ``/dev/shm`` at a time."""
    write_graphs(tmp_path / "graphs", tile=256, samples=1)
    repository = build_repository(tmp_path / "graphs", tmp_path / "models", max_batch=4, threads=1)
    tiles = [np.random.default_rng(number).integers(0, 255, (4, 256, 256, 3), dtype=np.uint8) for number in range(40)]
    assert sum(tile.nbytes for tile in tiles) > 28 << 20
    origins = np.zeros((4, 2), np.int64)
    with (
        serving(repository, tmp_path, wrapper=small(Path("/dev/shm"), "14m")) as server,
        StainClient(server.url, in_flight=40, busy_patience=0, patience=0) as client,
        ThreadPoolExecutor(40) as pool,
    ):
        wanted = [client.stain_tiles(tile, origins, 7, cells=False) for tile in tiles[:4]]
        answers = list(pool.map(lambda tile: client.stain_tiles(tile, origins, 7, cells=False), tiles))
        for answer, right in zip(answers, wanted, strict=False):
            require_right(answer, right)
        assert len(answers) == 40
