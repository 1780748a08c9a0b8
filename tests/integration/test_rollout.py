"""Several models behind one proxy: the client chooses, and a promotion under load loses no request and mixes no slide.

HAProxy is real. Behind it is Triton for a promotion under load; elsewhere substitutes, whose answers tell which model
painted them.
"""

from __future__ import annotations

import dataclasses
import http.server
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from tritonclient.grpc import service_pb2
from typer.testing import CliRunner

from staindiffuser.benchmarks.certificates import Authority
from staindiffuser.cli import app
from staindiffuser.client import StainClient
from staindiffuser.client.errors import ContractError
from staindiffuser.client.testing import FAKE_CONTRACT, FakeTriton
from staindiffuser.errors import UsageError
from staindiffuser.export.repository import build_repository
from staindiffuser.serving.errors import ServerStartError
from staindiffuser.serving.rollout import promote, rollback
from staindiffuser.serving.server import TritonServer
from tests.metrics_port import metrics_port
from tests.running_proxy import Proxy, address, free_port, running
from tests.synthetic_graphs import write_graphs

TILE = FAKE_CONTRACT.tile
TILES = np.zeros((1, TILE, TILE, 3), np.uint8)
ORIGINS = np.zeros((1, 2), np.int64)
MODELS = {"blue": ("colon", 1), "green": ("colon", 2), "breast": ("breast", 3)}
"""Pool → name of its model, and what it paints."""


class Metrics(http.server.BaseHTTPRequestHandler):
    """What the proxy's health check reads."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'nv_inference_request_success{model="staindiffuser",version="1"} 1\n')

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def pool(name: str) -> Iterator[tuple[FakeTriton, str]]:
    """A substitute server, and how the proxy's option names it."""
    model, level = MODELS[name]
    contract = dataclasses.replace(FAKE_CONTRACT, model_name=model, model_version=str(level) * 64)

    def paint(tensor: str, tiles: np.ndarray, origins: np.ndarray) -> np.ndarray:
        return np.full((*tiles.shape[:3], 3 if tensor.startswith("STAIN_") else 1), level, np.uint8)

    with FakeTriton(paint, contract) as server, http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metrics) as metrics:
        threading.Thread(target=metrics.serve_forever, daemon=True).start()
        try:
            yield server, f"{name}@{server.url}:{metrics.server_port}"
        finally:
            metrics.shutdown()


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[Proxy]:
    authority = Authority.create(tmp_path / "pki")
    authority.issue("server")
    authority.issue("clinic")
    with ExitStack() as stack:
        servers = [stack.enter_context(pool(name))[1] for name in MODELS]
        folder = tmp_path / "pki" / "proxy"
        yield stack.enter_context(running(folder, servers, authority, requests_per_10s=1_000_000))


def connected(proxy: Proxy, model: str = "") -> StainClient:
    return StainClient(proxy.url, credentials=proxy.credentials(), model=model)


def painted(client: StainClient) -> int:
    """The one value of an answer."""
    (level,) = {int(value) for tensor in client.stain_tiles(TILES, ORIGINS, 0).values() for value in np.unique(tensor)}
    return level


def test_a_promotion_under_load_loses_nothing_and_mixes_nothing(proxy: Proxy) -> None:
    stop = threading.Event()

    def one_slide_after_another() -> list[set[int]]:
        """What painted the tiles of each slide; a connection is a slide."""
        slides = []
        while not stop.is_set():
            with connected(proxy) as client:
                tiles = {painted(client) for _ in range(4)}
                assert tiles == {int(client.contract.model_version[0])}
                slides.append(tiles)
        return slides

    with connected(proxy) as begun, ThreadPoolExecutor(2) as threads:
        assert painted(begun) == 1
        work = [threads.submit(one_slide_after_another) for _ in range(2)]
        try:
            for target, level in (("green", 2), ("blue", 1), ("green", 2)):
                promotion = promote(proxy.folder, target)
                assert promotion.live
                assert promotion.model_name == "colon"
                with connected(proxy) as new:
                    assert painted(new) == level
                    assert painted(begun) == 1, "a slide that was begun goes on with its model"
                time.sleep(0.2)
            assert rollback(proxy.folder).pool == "blue"
        finally:
            stop.set()
        slides = [tiles for future in work for tiles in future.result(timeout=60)]
    assert all(len(tiles) == 1 for tiles in slides)
    assert {1, 2} == set.union(*slides)
    with connected(proxy) as client:
        assert painted(client) == 1


@pytest.mark.parametrize("seconds", [5, pytest.param(60, marks=pytest.mark.slow)])
def test_many_clients_at_once_do_not_end_the_proxy(proxy: Proxy, seconds: int) -> None:
    """Good requests, refused ones and half ones, from threads that race for the guard, while pools are exchanged.

    With one Lua state for all threads, HAProxy 2.6 ended within a hundred requests.
    """
    end = time.monotonic() + seconds
    answers = refusals = 0
    lock = threading.Lock()

    def work(number: int) -> None:
        nonlocal answers, refusals
        rng = np.random.default_rng(number)
        ready = service_pb2.ServerReadyRequest().SerializeToString()
        inner = service_pb2.ModelInferRequest(model_name="he_encoder").SerializeToString()
        with connected(proxy) as client, proxy.channel() as channel:
            ask = channel.unary_unary("/inference.GRPCInferenceService/ServerReady")
            stain = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            while time.monotonic() < end:
                good = [ask.future(ready, timeout=20) for _ in range(32)]
                bad = [stain.future(inner, timeout=20)]
                bad += [stain.future(rng.bytes(3000), timeout=float(rng.uniform(0.001, 0.05)))]
                assert painted(client) == int(client.contract.model_version[0])
                assert all(service_pb2.ServerReadyResponse.FromString(call.result()).ready for call in good)
                assert all(call.exception() is not None for call in bad)
                with lock:
                    answers, refusals = answers + 33, refusals + 2

    with ThreadPoolExecutor(6) as threads:
        work_of_all = [threads.submit(work, number) for number in range(6)]
        while time.monotonic() < end:
            promote(proxy.folder, "green")
            promote(proxy.folder, "blue")
        for future in work_of_all:
            future.result(timeout=60)
    print(f"{answers} answers, {refusals} refusals")
    assert proxy.process is not None
    assert proxy.process.poll() is None, proxy.log.read_text()
    alerts = [line for line in proxy.log.read_text().splitlines() if "[ALERT]" in line]
    assert all("request refused" in line for line in alerts), alerts


def test_a_new_client_does_not_wait_for_others_tiles(tmp_path: Path) -> None:
    """Its questions go before the tiles that wait in the proxy: it would give up before their turn came."""
    authority = Authority.create(tmp_path / "pki")
    authority.issue("server")
    authority.issue("clinic")

    def slowly(tensor: str, tiles: np.ndarray, origins: np.ndarray) -> np.ndarray:
        time.sleep(0.1)
        return np.zeros((*tiles.shape[:3], 3 if tensor.startswith("STAIN_") else 1), np.uint8)

    with (
        FakeTriton(slowly) as server,
        metrics_port(lambda: 'nv_inference_request_success{model="staindiffuser",version="1"} 1\n') as metrics,
        running(
            tmp_path / "pki" / "proxy",
            [f"{server.url}:{metrics.rpartition(':')[2].partition('/')[0]}"],
            authority,
            in_flight=1,
        ) as proxy,
        ExitStack() as stack,
        ThreadPoolExecutor(4) as threads,
    ):
        others = [stack.enter_context(connected(proxy)) for _ in range(4)]
        waiting = [threads.submit(others[number % 4].stain_tiles, TILES, ORIGINS, 0) for number in range(12)]
        time.sleep(0.5)  # 0.4 s each, and three in the proxy's queue at any time
        with connected(proxy):
            assert sum(future.done() for future in waiting) <= 7
        for future in waiting:
            future.result(timeout=60)


def test_many_requests_on_one_connection_all_come_back(tmp_path: Path) -> None:
    """Where some wait in the proxy, their bodies hold up the others of the connection, and nothing moves any more."""
    authority = Authority.create(tmp_path / "pki")
    authority.issue("server")
    authority.issue("clinic")
    write_graphs(tmp_path / "graphs", tile=256)
    repository = build_repository(tmp_path / "graphs", tmp_path / "models", max_batch=4, threads=1)
    tiles, origins = np.zeros((4, 256, 256, 3), np.uint8), np.zeros((4, 2), np.int64)
    with (
        TritonServer(repository) as server,
        running(tmp_path / "pki" / "proxy", [server], authority, max_message=1 << 24) as proxy,
        StainClient(proxy.url, credentials=proxy.credentials(), in_flight=16) as client,
        ThreadPoolExecutor(16) as threads,
    ):
        for future in [threads.submit(client.stain_tiles, tiles, origins, 0) for _ in range(24)]:
            assert future.result(timeout=45)


def test_a_promotion_under_load_with_real_servers(tmp_path: Path) -> None:
    """Two versions on two Tritons: every answer is, to the byte, that of the version with which its slide began."""
    authority = Authority.create(tmp_path / "pki")
    for name in ("server", "clinic"):
        authority.issue(name)
    tiles = [np.random.default_rng(mark).integers(0, 255, (1, 64, 64, 3), dtype=np.uint8) for mark in range(4)]
    stop = threading.Event()
    with ExitStack() as stack:
        servers, expected = [], {}
        for seed, name in enumerate(("blue", "green")):
            write_graphs(tmp_path / f"graphs{seed}", tile=64, seed=seed)
            repository = build_repository(tmp_path / f"graphs{seed}", tmp_path / name, max_batch=1, threads=1)
            server = stack.enter_context(TritonServer(repository))
            servers.append(f"{name}@{address(server)}")
            with StainClient(server.url) as client:
                answers = [client.stain_tiles(tile, ORIGINS, mark) for mark, tile in enumerate(tiles)]
                expected[client.contract.model_version] = answers
        blue, green = expected
        proxy = stack.enter_context(running(tmp_path / "pki" / "proxy", servers, authority))

        def one_slide_after_another() -> list[str]:
            """The versions of the slides, in order; without the patience that hides a request that was lost."""
            versions = []
            while not stop.is_set():
                with StainClient(proxy.url, credentials=proxy.credentials(), patience=0, busy_patience=0) as client:
                    version = client.contract.model_version
                    for mark, tile in enumerate(tiles):
                        for name, tensor in client.stain_tiles(tile, ORIGINS, mark).items():
                            np.testing.assert_array_equal(tensor, expected[version][mark][name])
                versions.append(version)
            return versions

        with ThreadPoolExecutor(3) as threads:
            work = [threads.submit(one_slide_after_another) for _ in range(3)]
            try:
                for target, version in (("green", green), ("blue", blue), ("green", green)):
                    assert promote(proxy.folder, target).model_version == version
                    with connected(proxy) as client:
                        assert client.contract.model_version == version
                    time.sleep(0.3)
                assert rollback(proxy.folder).model_version == blue
                time.sleep(0.3)
            finally:
                stop.set()
            slides = [future.result(timeout=60) for future in work]
    print(f"{sum(map(len, slides))} slides of {len(tiles)} requests")
    assert {blue, green} == {version for versions in slides for version in versions}


def test_a_client_chooses_its_model(proxy: Proxy) -> None:
    with pytest.raises(ContractError, match="no model 'breast'"):
        connected(proxy, "breast")  # its name is not known before it is promoted
    assert promote(proxy.folder, "breast").previous == "breast"
    with connected(proxy) as client, connected(proxy, "breast") as breast, connected(proxy, "colon") as colon:
        assert [painted(c) for c in (client, breast, colon)] == [1, 3, 1]
        promote(proxy.folder, "green")
        with connected(proxy, "colon") as new:
            assert [painted(c) for c in (client, breast, colon, new)] == [1, 3, 1, 2]
        assert rollback(proxy.folder, "colon").pool == "blue"
    with pytest.raises(UsageError, match="nothing of lung has been promoted"):
        rollback(proxy.folder, "lung")


def test_what_does_not_answer_is_not_promoted(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "pki")
    authority.issue("server")
    authority.issue("clinic")
    gone = f"green@127.0.0.1:{free_port()}:{free_port()}"
    with pool("blue") as (_, blue):
        with running(tmp_path / "pki" / "proxy", [blue, gone], authority) as proxy:
            with pytest.raises(ServerStartError, match="did not answer a probe tile"):
                promote(proxy.folder, "green")
            with pytest.raises(UsageError, match="has no pool red: it has blue, green"):
                promote(proxy.folder, "red")
            with pytest.raises(UsageError, match="serves the model colon, not lung"):
                StainClient(blue.partition("@")[2].rpartition(":")[0], model="lung")
        result = CliRunner().invoke(app, ["promote", str(proxy.folder), "blue", "--json"])
        assert json.loads(result.stdout)["live"] is False, result.output  # the proxy has ended
