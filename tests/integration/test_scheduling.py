"""The server's queues: urgent requests first, overload refused as unavailable, every answer the right one.

The real Triton, with synthetic engines that take about a tenth of a second and a queue that is soon full.
"""

from __future__ import annotations

import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton

from staindiffuser.client import StainClient
from staindiffuser.client.errors import ServerBusyError
from staindiffuser.export.builders import BuildOptions
from staindiffuser.export.description import ExportedStain
from staindiffuser.export.repository import build
from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.serving.server import TritonServer
from tests.synthetic_graphs import write_graphs
from tests.unit.test_monitoring import TRITON

TILE = 256
QUEUE_LENGTH, QUEUE_SECONDS = 6, 3.0
BURST = 24
OPTIONS = BuildOptions(max_batch=2, threads=1, queue_length=QUEUE_LENGTH, queue_seconds=QUEUE_SECONDS)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scheduling") / "graphs"
    stains = [ExportedStain(name="cd3", label="CD3")]
    write_graphs(folder, tile=TILE, channels=(32, 8, 8, 8), depth=10, steps=1, stains=stains, samples=1)
    return folder


@pytest.fixture(scope="module")
def server(graphs: Path) -> Iterator[TritonServer]:
    """Of the flavour that has a queue on a CPU."""
    repository = build(graphs, graphs.parent / "single", flavour="single", options=OPTIONS).repository
    with TritonServer(repository) as server:
        yield server


def marked(number: int) -> UInt8Array:
    """A batch of tiles that no other request sends: uint8 [2, T, T, 3]."""
    return np.random.default_rng(number).integers(0, 256, (2, TILE, TILE, 3), dtype=np.uint8)


def metrics(server: TritonServer) -> dict[tuple[str, str], float]:
    """Values by name and labels."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(server.metrics_url, timeout=10) as response:
        text = response.read().decode()
    found = re.findall(r"^(\w+)(?:\{(.*)\})? (\S+)$", text, re.MULTILINE)
    return {(name, labels): float(value) for name, labels, value in found}


def stain(client: StainClient, number: int) -> UInt8Array:
    return client.stain_tiles(marked(number), seed=number, cells=False)["STAIN_CD3"]


@pytest.fixture(scope="module")
def expected(server: TritonServer) -> list[UInt8Array]:
    """What each marked request is answered with when it is alone."""
    with StainClient(server.url) as client:
        answers = [stain(client, number) for number in range(BURST)]
    assert len({answer.tobytes() for answer in answers}) == BURST
    return answers


def test_urgent_requests_go_first(server: TritonServer) -> None:
    finished: list[str] = []
    lock = threading.Lock()

    def send(client: StainClient, name: str, number: int) -> None:
        stain(client, number)
        with lock:
            finished.append(name)

    with (
        StainClient(server.url, in_flight=8) as ordinary,
        StainClient(server.url, urgent=True) as urgent,
        ThreadPoolExecutor(8) as pool,
    ):
        futures = [pool.submit(send, ordinary, f"ordinary {number}", number) for number in range(6)]
        before = ordinary.execution_counts()["staindiffuser"]
        while ordinary.execution_counts()["staindiffuser"] == before and len(finished) < 2:
            time.sleep(0.01)  # until the others wait
        futures.append(pool.submit(send, urgent, "urgent", 6))
        for future in futures:
            future.result()
    assert len(finished) == 7
    assert finished.index("urgent") <= 3, finished  # behind those that were running already


def test_overload_is_refused_and_no_answer_is_another_ones(server: TritonServer, expected: list[UInt8Array]) -> None:
    """Requests beyond the queue are refused as busy at once; none waits much longer than the queue allows."""
    start = threading.Barrier(BURST)

    def send(number: int) -> tuple[float, bool]:
        start.wait()
        began = time.monotonic()
        try:
            answer = stain(client, number)
        except ServerBusyError as error:
            assert "has more to do than it can" in str(error)  # noqa: PT017
            return time.monotonic() - began, False
        np.testing.assert_array_equal(answer, expected[number])
        return time.monotonic() - began, True

    with StainClient(server.url, in_flight=BURST, busy_patience=0) as client, ThreadPoolExecutor(BURST) as pool:
        outcomes = list(pool.map(send, range(BURST)))
        answered = sum(ok for _, ok in outcomes)
        assert QUEUE_LENGTH // 2 <= answered < BURST, answered
        refusals = sorted(seconds for seconds, ok in outcomes if not ok)
        assert refusals[len(refusals) // 2] < QUEUE_SECONDS / 2
        assert refusals[-1] < 2 * QUEUE_SECONDS  # a busy machine; `make test-timing` asks for more
        np.testing.assert_array_equal(stain(client, 0), expected[0])  # and then it works as before
    counted = metrics(server)
    assert {name for name, _ in counted} >= TRITON  # what the dashboard and the alert rules read
    tiles = [value for (name, labels), value in counted.items() if name == "staindiffuser_tiles_total"]
    assert sum(tiles) >= 2 * answered


def test_a_client_that_is_refused_comes_again_until_it_is_served(
    server: TritonServer, expected: list[UInt8Array]
) -> None:
    with StainClient(server.url, in_flight=20) as client, ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda number: stain(client, number), range(20)))
    for answer, wanted in zip(answers, expected, strict=False):
        np.testing.assert_array_equal(answer, wanted)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A request takes a second or more."""
    folder = tmp_path_factory.mktemp("slow")
    stains = [ExportedStain(name="cd3", label="CD3")]
    write_graphs(folder / "graphs", tile=TILE, channels=(32, 8, 8, 8), depth=100, steps=1, stains=stains, samples=1)
    options = BuildOptions(max_batch=2, threads=1, queue_length=QUEUE_LENGTH)  # five may wait for longer than 3 s
    with TritonServer(build(folder / "graphs", folder / "single", flavour="single", options=options).repository) as s:
        yield s


def inputs(number: int) -> list[Any]:
    tiles = marked(number)
    return [
        triton.InferInput(name, list(array.shape), dtype).set_data_from_numpy(array)
        for name, array, dtype in (
            ("HE", tiles, "UINT8"),
            ("ORIGIN", np.zeros((2, 2), np.int64), "INT64"),
            ("SEED", np.zeros((2, 1), np.int64), "INT64"),
        )
    ]


def send(client: triton.InferenceServerClient, number: int, **options: Any) -> None:
    client.infer("staindiffuser", inputs(number), outputs=[triton.InferRequestedOutput("STAIN_CD3")], **options)


def status(counted: dict[tuple[str, str], float], name: str) -> float:
    """Requests that ended so."""
    return sum(
        value
        for (metric, labels), value in counted.items()
        if metric == "staindiffuser_requests_total" and f'status="{name}"' in labels
    )


def came(client: triton.InferenceServerClient) -> int:
    """Requests that the model has been given so far."""
    return int(client.get_inference_statistics().model_stats[0].execution_count)


def all_there(client: triton.InferenceServerClient, number: int) -> None:
    """Come back when the model has been given so many requests."""
    until = time.monotonic() + 60
    while came(client) < number:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_request_is_refused_in_time_though_the_engine_is_busy(slow: TritonServer) -> None:
    """Triton's own queue would refuse it only when the running inference ends."""
    with triton.InferenceServerClient(slow.url) as client, ThreadPoolExecutor(5) as pool:
        begun = came(client)
        others = [pool.submit(send, client, number) for number in range(5)]
        all_there(client, begun + 5)
        with pytest.raises(triton.InferenceServerException, match="Request timeout expired") as refused:
            send(client, 5, timeout=50_000)
        assert "UNAVAILABLE" in str(refused.value.status())
        assert not others[-1].done()
        for future in others:
            future.result()


def test_what_a_client_has_given_up_is_not_computed(slow: TritonServer) -> None:
    with triton.InferenceServerClient(slow.url) as client, ThreadPoolExecutor(5) as pool:
        time.sleep(1)  # until the counts of the tests before are told
        before, sent = metrics(slow), 0
        for _ in range(3):  # on busy cores, its turn may come before it is given up
            begun = came(client)
            others = [pool.submit(send, client, number) for number in range(5)]
            all_there(client, begun + 5)
            given_up = client.async_infer("staindiffuser", inputs(5), callback=lambda result, error: None)
            all_there(client, begun + 6)
            given_up.cancel()
            for future in others:
                future.result()
            send(client, 6)
            sent += 7
            time.sleep(1)
            after = metrics(slow)
            if status(after, "CANCELLED") > status(before, "CANCELLED"):
                break
    assert status(after, "CANCELLED") - status(before, "CANCELLED") == 1
    assert status(after, "OK") - status(before, "OK") == sent - 1


@pytest.mark.timing
def test_ten_times_overload(server: TritonServer) -> None:
    """The 99th percentile of what is accepted is at most three times the unloaded one's plus the queue's limit; the
    rest is refused within a tenth of a second."""
    with StainClient(server.url) as client:
        alone = []
        for number in range(20):
            began = time.monotonic()
            stain(client, number)
            alone.append(time.monotonic() - began)
    stop = time.monotonic() + 15
    accepted: list[float] = []
    refused: list[float] = []

    def keep_sending(number: int) -> None:
        with StainClient(server.url, busy_patience=0) as client:
            while time.monotonic() < stop:
                began = time.monotonic()
                try:
                    stain(client, number)
                    accepted.append(time.monotonic() - began)
                except ServerBusyError:
                    refused.append(time.monotonic() - began)
                    time.sleep(float(np.median(alone)))

    with ThreadPoolExecutor(10 * QUEUE_LENGTH) as pool:
        list(pool.map(keep_sending, range(10 * QUEUE_LENGTH)))
    bound = 3 * float(np.quantile(alone, 0.99)) + QUEUE_SECONDS
    print(f"unloaded p99 {np.quantile(alone, 0.99):.3f} s; accepted {len(accepted)}, p99", np.quantile(accepted, 0.99))
    print(f"refused {len(refused)}, p99 {np.quantile(refused, 0.99):.3f} s, longest {max(refused):.3f} s")
    assert len(refused) > len(accepted)
    assert np.quantile(accepted, 0.99) <= bound
    assert np.quantile(refused, 0.99) <= 0.1
