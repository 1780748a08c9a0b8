"""The connection, against a stand-in that speaks gRPC as Triton does."""

import dataclasses
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton

from staindiffuser.client import StainClient
from staindiffuser.client.errors import (
    ContractError,
    ModelChangedError,
    RefusedRequestError,
    ServerBusyError,
    ServerUnreachableError,
    UnknownStainError,
)
from staindiffuser.client.testing import FAKE_CONTRACT, FakeTriton
from staindiffuser.errors import ServerError, ServerLostError, UsageError

TILES = np.random.default_rng(0).integers(0, 256, (2, 256, 256, 3), dtype=np.uint8)
ORIGINS = np.array([[-32, -32], [160, 16]], dtype=np.int64)


def test_the_contract_comes_from_the_server() -> None:
    with FakeTriton() as server, StainClient(server.url) as client:
        assert client.contract == FAKE_CONTRACT
        assert client.url == server.url
        assert client.server_version == "fake 0"


def test_tiles_are_stained_and_only_what_is_named_is_asked_for() -> None:
    with FakeTriton() as server, StainClient(server.url) as client:
        both = client.stain_tiles(TILES, ORIGINS, 7)
        assert list(both) == ["STAIN_CD3", "STAIN_CK818", "CELLS_CD3", "CELLS_CK818"]
        np.testing.assert_array_equal(both["STAIN_CD3"], TILES)
        assert both["CELLS_CD3"].shape == (2, 256, 256, 1)
        assert list(client.stain_tiles(TILES, ORIGINS, 7, stains=["cd3"], cells=False)) == ["STAIN_CD3"]
        assert list(client.stain_tiles(TILES, ORIGINS, 7, stains=["ck818"], images=False)) == ["CELLS_CK818"]
        with pytest.raises(UnknownStainError):
            client.stain_tiles(TILES, ORIGINS, 7, stains=["her2"])
        with pytest.raises(ValueError, match="images, cells"):
            client.stain_tiles(TILES, ORIGINS, 7, images=False, cells=False)


def test_large_messages_pass() -> None:
    import dataclasses

    contract = dataclasses.replace(FAKE_CONTRACT, tile=512, margin=64)
    tiles = np.zeros((8, 512, 512, 3), dtype=np.uint8)
    with FakeTriton(contract=contract) as server, StainClient(server.url) as client:
        outputs = client.stain_tiles(tiles, np.zeros((8, 2), dtype=np.int64), 0)
    assert outputs["STAIN_CK818"].nbytes == 6 * 2**20


def test_a_refused_request_says_why() -> None:
    with (
        FakeTriton() as server,
        StainClient(server.url) as client,
        pytest.raises(RefusedRequestError, match="multiples of 16"),
    ):
        client.stain_tiles(TILES, ORIGINS + 1, 0)


def test_no_server_is_said_at_once() -> None:
    with FakeTriton() as server:
        url = server.url
    with pytest.raises(ServerUnreachableError, match=url):
        StainClient(url)


def test_a_server_that_accepts_and_is_silent_is_given_up() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(ServerUnreachableError):
            StainClient(url, connect_timeout=1)


def test_another_model_is_no_ensemble_of_ours() -> None:
    server = FakeTriton()
    server.model = "resnet50"
    with server, pytest.raises(ContractError, match="no model 'staindiffuser'"):
        StainClient(server.url)
    server = FakeTriton()
    del server.parameters["margin"]
    with server, pytest.raises(ContractError, match="margin"):
        StainClient(server.url)


def test_the_webs_proxy_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with FakeTriton() as server:
        with StainClient(server.url) as client:
            client.stain_tiles(TILES, ORIGINS, 0)
        with pytest.raises(ServerUnreachableError):
            StainClient(server.url, use_proxy=True, connect_timeout=2)


def test_a_server_that_dies_is_lost() -> None:
    with FakeTriton(delay=5) as server, StainClient(server.url, patience=1) as client, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.stain_tiles, TILES, ORIGINS, 0)
        while server.requests == 0:
            time.sleep(0.01)
        server.kill()
        with pytest.raises(ServerLostError, match=r"lost while staining .* did not return within 1 s"):
            answer.result(timeout=20)


def wait_for_a_request(server: FakeTriton) -> None:
    while server.requests == 0:
        time.sleep(0.01)


def test_a_request_outlives_a_restart_with_the_same_model() -> None:
    with FakeTriton(delay=5) as first, ThreadPoolExecutor(1) as pool, StainClient(first.url) as client:
        identity = client.server_id
        answer = pool.submit(client.stain_tiles, TILES, ORIGINS, 0)
        wait_for_a_request(first)
        first.kill()
        time.sleep(1)
        with FakeTriton(port=int(first.url.rpartition(":")[2])) as second:
            np.testing.assert_array_equal(answer.result(timeout=20)["STAIN_CD3"], TILES)
            assert second.requests == 1
            assert client.server_id == identity
            with StainClient(second.url) as other:
                assert other.server_id != identity


@pytest.mark.parametrize(
    ("changed", "words", "pending"),
    [
        ({"model_version": "a" * 64}, r"now serves model fake \(aaaaaaaaaaaa\), not fake \(ffffffffffff\)", True),
        ({"model_version": "a" * 64}, r"now serves model fake \(aaaaaaaaaaaa\), not fake \(ffffffffffff\)", False),
        ({"margin": 16}, "the same model with another margin", True),
    ],
)
def test_another_model_at_the_address_is_refused(changed: dict, words: str, pending: bool) -> None:
    """Whether the first server dies during a request or between two: gRPC would reconnect without a word."""
    with FakeTriton(delay=3 * pending) as first, ThreadPoolExecutor(1) as pool, StainClient(first.url) as client:
        answer = pool.submit(client.stain_tiles, TILES, ORIGINS, 0)
        wait_for_a_request(first)
        if not pending:
            answer.result(timeout=20)
        first.kill()
        port = int(first.url.rpartition(":")[2])
        with FakeTriton(contract=dataclasses.replace(FAKE_CONTRACT, **changed), port=port):
            if not pending:
                answer = pool.submit(client.stain_tiles, TILES, ORIGINS, 0)
            with pytest.raises(ModelChangedError, match=words) as error:
                answer.result(timeout=20)
        assert error.value.exit_code == 3


def test_a_request_outlives_an_engine_that_is_not_healthy_for_a_moment() -> None:
    with FakeTriton() as server, StainClient(server.url) as client:
        server.unhealthy = 1
        np.testing.assert_array_equal(client.stain_tiles(TILES, ORIGINS, 0)["STAIN_CD3"], TILES)
    with FakeTriton() as server, StainClient(server.url, patience=0) as client:
        server.unhealthy = 9
        with pytest.raises(ServerError, match="is not healthy"):
            client.stain_tiles(TILES, ORIGINS, 0)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        ("StatusCode.UNKNOWN", "Stream removed (Data frame with END_STREAM flag received)"),
        ("StatusCode.INTERNAL", "Received RST_STREAM with error code 2"),
    ],
)
def test_an_answer_that_breaks_off_is_asked_for_again(
    monkeypatch: pytest.MonkeyPatch, status: str, message: str
) -> None:
    """What HAProxy passes on when the server behind it is killed while it answers."""
    errors = [triton.InferenceServerException(message, status)]
    infer = triton.InferenceServerClient.infer

    def broken_once(*arguments: Any, **options: Any) -> Any:
        if errors:
            raise errors.pop()
        return infer(*arguments, **options)

    monkeypatch.setattr(triton.InferenceServerClient, "infer", broken_once)
    with FakeTriton() as server, StainClient(server.url) as client:
        np.testing.assert_array_equal(client.stain_tiles(TILES, ORIGINS, 0)["STAIN_CD3"], TILES)
    assert not errors


@pytest.mark.parametrize("status", ["DEADLINE_EXCEEDED", "UNAVAILABLE", "RESOURCE_EXHAUSTED"])
def test_a_server_too_busy_to_name_its_model_is_not_taken_for_another(
    monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    """Behind a proxy whose queue is long: the question waits there, and the slide with it, instead of failing."""
    asked = triton.InferenceServerClient.get_model_metadata
    busy = 0

    def metadata(*arguments: Any, **options: Any) -> Any:
        nonlocal busy
        if busy:
            busy -= 1
            raise triton.InferenceServerException("no answer", f"StatusCode.{status}")
        return asked(*arguments, **options)

    monkeypatch.setattr(triton.InferenceServerClient, "get_model_metadata", metadata)
    with FakeTriton() as server:
        busy = 1
        with pytest.raises(ServerUnreachableError, match=r"does not say which model it has \(.*no answer\)"):
            StainClient(server.url)
        with StainClient(server.url) as client:
            server.unhealthy, busy = 1, 1
            np.testing.assert_array_equal(client.stain_tiles(TILES, ORIGINS, 0)["STAIN_CD3"], TILES)
            assert busy == 0


def test_an_answer_that_takes_too_long_is_a_lost_server() -> None:
    with (
        FakeTriton(delay=3) as server,
        StainClient(server.url, deadline=0.3) as client,
        pytest.raises(ServerLostError, match="--timeout"),
    ):
        client.stain_tiles(TILES, ORIGINS, 0)


def test_cancel_ends_what_is_under_way_and_what_would_follow() -> None:
    with FakeTriton(delay=5) as server, StainClient(server.url) as client, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.stain_tiles, TILES, ORIGINS, 0)
        while server.requests == 0:
            time.sleep(0.01)
        client.cancel()
        with pytest.raises(ServerLostError):
            answer.result(timeout=4)
        with pytest.raises(ServerLostError):
            client.stain_tiles(TILES, ORIGINS, 0)


def test_requests_in_flight_are_bounded() -> None:
    now, most, lock = 0, 0, threading.Lock()

    def paint(tensor: str, tiles: np.ndarray, origins: np.ndarray) -> np.ndarray:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.05)
        with lock:
            now -= 1
        return tiles

    with FakeTriton(paint) as server, StainClient(server.url, in_flight=2) as client, ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(client.stain_tiles, TILES, ORIGINS, 0, stains=["cd3"], cells=False) for _ in range(8)]
        for answer in answers:
            answer.result()
    assert most == 2


def test_a_busy_server_is_asked_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than a lost one is waited for: it works, but for others."""
    monkeypatch.setattr("staindiffuser.client.connection.BUSY_PAUSE", 0.02)
    with FakeTriton() as server, StainClient(server.url, patience=0) as client:
        server.busy = 4
        np.testing.assert_array_equal(client.stain_tiles(TILES, ORIGINS)["STAIN_CD3"], TILES)
        assert server.requests == 5
        server.hurried = 4
        np.testing.assert_array_equal(client.stain_tiles(TILES, ORIGINS)["STAIN_CD3"], TILES)
        assert server.requests == 10
    with FakeTriton() as server, StainClient(server.url, busy_patience=0) as client:
        server.busy = 1
        with pytest.raises(ServerBusyError, match=r"has more to do than it can \(.*Exceeds maximum queue size\)"):
            client.stain_tiles(TILES, ORIGINS)


def test_cancelling_ends_the_waiting_for_a_busy_server() -> None:
    with FakeTriton() as server, StainClient(server.url) as client, ThreadPoolExecutor(1) as pool:
        server.busy = 1000
        future = pool.submit(client.stain_tiles, TILES, ORIGINS)
        while not server.requests:
            time.sleep(0.01)
        client.cancel()
        with pytest.raises(ServerError):
            future.result(timeout=5)


def test_urgent_requests_say_so() -> None:
    with FakeTriton() as server, StainClient(server.url) as ordinary, StainClient(server.url, urgent=True) as urgent:
        ordinary.stain_tiles(TILES, ORIGINS)
        urgent.stain_tiles(TILES, ORIGINS)
        assert server.priorities == [2, 1]  # for Triton's own queues
        assert server.urgent == [False, True]


def test_urgent_requests_to_a_server_without_queues_are_refused() -> None:
    with FakeTriton() as server:
        del server.parameters["priority_levels"]
        with pytest.raises(UsageError, match="leave out --urgent, or build its repository with --flavour single"):
            StainClient(server.url, urgent=True)
        StainClient(server.url).close()
