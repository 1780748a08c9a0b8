"""``serve`` under faults: crashes are followed by restarts, requests in progress finish, the audit log has it all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest

from staindiffuser.client import StainClient
from staindiffuser.errors import ServerLostError
from staindiffuser.export.manifest import Manifest
from staindiffuser.export.repository import build_repository
from staindiffuser.serving import watch
from staindiffuser.serving.audit import AuditLog
from staindiffuser.serving.server import TritonServer
from tests.running_serve import ORIGINS, TILE, TILES, Serve, eventually, kill_engine, kill_server, marked, serving
from tests.synthetic_graphs import write_graphs

CLIENTS = 3
BACK_SECONDS = 15.0
"""After which a killed server must answer again."""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    write_graphs(folder / "graphs", tile=TILE)
    return build_repository(folder / "graphs", folder / "models", max_batch=1, threads=1)


@pytest.fixture(scope="module")
def slow_graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A request takes about a second and a half on one idle core."""
    folder = tmp_path_factory.mktemp("slow") / "graphs"
    write_graphs(folder, tile=TILE, channels=(96, 12, 16, 24), depth=60, samples=1)
    return folder


@pytest.fixture(scope="module")
def slow_repository(slow_graphs: Path) -> Path:
    return build_repository(slow_graphs, slow_graphs.parent / "single", max_batch=1, threads=1)


@pytest.fixture(scope="module")
def slow_ensemble(slow_graphs: Path) -> Path:
    return build_repository(slow_graphs, slow_graphs.parent / "ensemble", flavour="python", max_batch=1, threads=1)


@contextlib.contextmanager
def under_load(url: str, expected: Sequence[dict[str, np.ndarray]]) -> Iterator[Callable[[], int]]:
    """Three clients that send one request after another, and check that each gets the image of its own tile.

    Gives a function that says how many have been answered. Whatever goes wrong for one of them is raised at the end.
    """
    stop = threading.Event()
    answered = [0] * CLIENTS

    def keep_asking(number: int) -> None:
        with StainClient(url) as client:
            while not stop.is_set():
                mark = (number + CLIENTS * answered[number]) % len(expected)
                for name, tensor in client.stain_tiles(marked(mark), ORIGINS, mark).items():
                    np.testing.assert_array_equal(tensor, expected[mark][name])
                answered[number] += 1

    with ThreadPoolExecutor(CLIENTS) as pool:
        asking = [pool.submit(keep_asking, number) for number in range(CLIENTS)]
        try:
            yield lambda: sum(answered)
        finally:
            stop.set()
        for future in asking:
            future.result(timeout=60)


@pytest.mark.parametrize("kill", [kill_server, kill_engine])
def test_what_crashes_under_load_comes_back_and_no_request_is_lost(
    repository: Path, tmp_path: Path, kill: Callable[[Serve], None]
) -> None:
    with serving(repository, tmp_path) as server:
        with StainClient(server.url) as client:
            expected = [client.stain_tiles(marked(number), ORIGINS, number) for number in range(3 * CLIENTS)]
        with under_load(server.url, expected) as answered:
            assert eventually(lambda: answered() > CLIENTS, 30)
            kill(server)
            assert eventually(lambda: "restarted" in server.names(), 60)
            then = answered()
            assert eventually(lambda: answered() > then + CLIENTS, 30)
        events = {event["event"]: event for event in server.events()}
        assert events["restarted"]["server_id"] != events["ready"]["server_id"]
        assert psutil.pid_exists(events["restarted"]["pid"])
        assert not psutil.pid_exists(server.ready["pid"])
        code, stderr = server.end()
    assert code == 0
    assert server.names() == ["start", "ready", "crashed", "restarted", "drained", "stop"]
    assert "restart 1 of 5 in 0.5 s" in stderr
    assert "ready again: " in stderr
    assert "Traceback" not in stderr
    assert events["crashed"]["reason"] in stderr


@pytest.mark.timing
@pytest.mark.parametrize("kill", [kill_server, kill_engine])
def test_the_demonstration_is_back_in_time(tmp_path: Path, kill: Callable[[Serve], None]) -> None:
    """The model that ships, with one tile under way and others waiting."""
    with serving("demo", tmp_path) as server, ThreadPoolExecutor(CLIENTS) as pool, StainClient(server.url) as client:
        side = client.contract.tile
        tiles = np.random.default_rng(0).integers(0, 255, (1, side, side, 3), dtype=np.uint8)
        expected = client.stain_tiles(tiles, ORIGINS, 0)
        answers = [pool.submit(client.stain_tiles, tiles, ORIGINS, 0) for _ in range(CLIENTS)]
        time.sleep(0.3)
        kill(server)
        killed = time.monotonic()
        assert eventually(lambda: "restarted" in server.names(), 60)
        ready = time.monotonic() - killed
        for answer in answers:
            for name, tensor in answer.result(timeout=60).items():
                np.testing.assert_array_equal(tensor, expected[name])
        print(f"ready again after {ready:.1f} s, all answered after {time.monotonic() - killed:.1f} s")
    assert ready <= BACK_SECONDS


def test_a_file_that_is_missing_is_named_and_nothing_starts(repository: Path, tmp_path: Path) -> None:
    copy = tmp_path / "models"
    shutil.copytree(repository, copy)
    engine = copy / Manifest.load(copy).engines["stain_cd3"].file
    engine.unlink()
    command = [sys.executable, "-c", "from staindiffuser.cli import main; main()", "serve", str(copy)]
    result = subprocess.run([*command, "--grpc-port", "0"], capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 5
    assert str(engine.relative_to(copy)) in result.stderr
    assert "missing" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_server_that_keeps_crashing_is_given_up(repository: Path, tmp_path: Path) -> None:
    with serving(repository, tmp_path, "--restarts", 1) as server:
        kill_server(server)
        assert eventually(lambda: "restarted" in server.names(), 60)
        os.kill(server.events()[-1]["pid"], signal.SIGKILL)
        _, stderr = server.process.communicate(timeout=30)
    assert server.process.returncode == 3
    assert stderr.splitlines()[-1] == "error: Triton was ended by SIGKILL: out of memory?"
    assert server.events()[-1]["event"] == "failed"
    assert server.events()[-1]["exit_code"] == 3


def test_a_repository_that_was_changed_is_not_restarted(tmp_path: Path) -> None:
    write_graphs(tmp_path / "graphs", tile=32)
    repository = build_repository(tmp_path / "graphs", tmp_path / "models", max_batch=1, threads=1)
    with serving(repository, tmp_path) as server:
        (model,) = repository.glob("staindiffuser/*/model.py")
        model.write_text("import os\n", encoding="utf-8")
        kill_server(server)
        _, stderr = server.process.communicate(timeout=60)
    assert server.process.returncode == 5
    assert f"{model.relative_to(repository)} differs from manifest.json" in stderr.splitlines()[-1]
    assert server.names()[-2:] == ["crashed", "failed"]


def test_a_refusal_to_start_is_in_the_audit_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from staindiffuser.cli import main; main()", "serve", str(tmp_path / "nothing")]
    result = subprocess.run(
        [*command, "--audit", str(tmp_path / "audit.jsonl"), "--grpc-port", "0", "--metrics-port", "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 5
    start, failed = map(json.loads, (tmp_path / "audit.jsonl").read_text(encoding="utf-8").splitlines())
    assert (start["event"], failed["event"], failed["exit_code"]) == ("start", "failed", 5)
    assert "is not a model repository" in failed["reason"]
    unwritable = subprocess.run([*command, "--audit", "/proc/audit"], capture_output=True, text=True, check=False)
    assert unwritable.returncode == 2
    assert "error: the audit log /proc/audit cannot be written" in unwritable.stderr


def ask(url: str) -> np.ndarray:
    """One request as any client may send it, without this client's patience."""
    with StainClient(url, patience=0) as client:
        return client.stain_tiles(TILES, ORIGINS, 0, cells=False)["STAIN_CD3"]


def under_way(server: Serve, pool: ThreadPoolExecutor, number: int) -> list[Future[np.ndarray]]:
    """Requests that the server has accepted: the engines are busy with one, and the others wait."""
    with StainClient(server.url) as client:

        def came() -> int:
            return max(client.execution_counts().values())

        before = came()
        answers = [pool.submit(ask, server.url) for _ in range(number)]
        assert eventually(lambda: came() >= before + number, 30)
    return answers


@pytest.mark.parametrize("kind", ["slow_repository", pytest.param("slow_ensemble", marks=pytest.mark.slow)])
def test_sigterm_finishes_what_is_in_progress_and_refuses_what_is_new(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    with (
        serving(request.getfixturevalue(kind), tmp_path, "--drain-timeout", 120) as server,
        ThreadPoolExecutor(4) as pool,
    ):
        expected = ask(server.url)
        answers = under_way(server, pool, 1 if kind == "slow_ensemble" else 4)
        assert not answers[-1].done(), "the requests were over before the server was asked to stop"
        server.process.send_signal(signal.SIGTERM)
        assert eventually(lambda: "stopping" in refusal(server.url), 20)
        for answer in answers:
            np.testing.assert_array_equal(answer.result(timeout=60), expected)
        server.process.communicate(timeout=60)
    assert server.process.returncode == 0
    assert server.names() == ["start", "ready", "drained", "stop"]
    assert server.events()[2]["complete"] is True


def refusal(url: str) -> str:
    try:
        ask(url)
    except ServerLostError as error:
        return str(error)
    return ""


def test_the_deadline_ends_a_drain(slow_repository: Path, tmp_path: Path) -> None:
    with serving(slow_repository, tmp_path, "--drain-timeout", 0.2) as server, ThreadPoolExecutor(4) as pool:
        expected = ask(server.url)
        answers = under_way(server, pool, 4)
        assert server.end()[0] == 0
        for answer in answers:
            with contextlib.suppress(ServerLostError):  # Triton itself still waits for the last step of an ensemble
                np.testing.assert_array_equal(answer.result(timeout=30), expected)
    assert server.events()[2]["complete"] is False


def test_systemd_is_told(repository: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(60)
        with serving(repository, tmp_path, NOTIFY_SOCKET=str(tmp_path / "notify")) as server:
            assert systemd.recv(100) == b"READY=1"
            assert server.end()[0] == 0
            assert systemd.recv(100) == b"STOPPING=1"


def test_a_client_of_a_server_that_nobody_restarts_is_told_at_once(slow_repository: Path) -> None:
    """The engine's process ends while requests are in it, as under ``stain`` without ``serve``."""
    with (
        TritonServer(slow_repository) as server,
        StainClient(server.url, in_flight=20, patience=0) as client,
        ThreadPoolExecutor(20) as pool,
    ):
        before = client.execution_counts()["staindiffuser"]
        answers = [pool.submit(client.stain_tiles, TILES, ORIGINS, number) for number in range(20)]
        while client.execution_counts()["staindiffuser"] < before + 20:
            time.sleep(0.01)
        psutil.Process(server.pid).children(recursive=True)[0].kill()
        killed = time.monotonic()
        with pytest.raises(ServerLostError):
            answers[-1].result(timeout=60)
        assert time.monotonic() - killed < 20
        with pytest.raises(ServerLostError, match="an engine's process"):
            server.wait(20)


def test_an_engine_that_is_stuck_is_noticed(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "PROBE_SECONDS", 1)
    monkeypatch.setattr(watch, "STUCK_SECONDS", 4)
    said: list[str] = []
    with TritonServer(repository) as server:
        server.probe(60)  # nothing is wrong
        psutil.Process(server.pid).children(recursive=True)[0].suspend()
        with pytest.raises(ServerLostError, match=r"failed on a probe tile|finished nothing for 4 s|has ended"):
            watch.keep_running(server, restarts=0, audit=AuditLog(None), say=said.append)
    assert said == []
