"""Several servers as one: all are used, a lost one costs nothing but time, and the pixels are the same."""

from __future__ import annotations

import dataclasses
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile

from staindiffuser.client.command import run_command
from staindiffuser.client.errors import ContractError, RefusedRequestError, ServerUnreachableError
from staindiffuser.client.options import StainingOptions
from staindiffuser.client.target import Target
from staindiffuser.client.testing import FAKE_CONTRACT, FakeTriton, identity
from staindiffuser.errors import ServerLostError

TILES = np.random.default_rng(0).integers(0, 256, (2, 256, 256, 3), dtype=np.uint8)
ORIGINS = np.array([[-32, -32], [160, 16]], dtype=np.int64)
NOWHERE = "127.0.0.1:9"


def test_the_work_is_shared() -> None:
    with FakeTriton(delay=0.2) as one, FakeTriton(delay=0.2) as two:
        target = Target(addresses=(one.url, two.url))
        with target.connect(2) as pool, ThreadPoolExecutor(8) as threads:
            assert pool.contract == FAKE_CONTRACT
            assert pool.url == f"{one.url}, {two.url}"
            for answer in [threads.submit(pool.stain_tiles, TILES, ORIGINS, 0) for _ in range(8)]:
                np.testing.assert_array_equal(answer.result()["STAIN_CD3"], TILES)
        assert one.requests == two.requests == 4


def test_a_lost_server_hands_its_requests_on_and_is_used_again() -> None:
    said: list[str] = []
    with (
        FakeTriton(delay=0.3) as one,
        FakeTriton(delay=0.3) as two,
        Target(addresses=(one.url, two.url)).connect(2, said.append) as pool,
        ThreadPoolExecutor(4) as threads,
    ):
        answers = [threads.submit(pool.stain_tiles, TILES, ORIGINS, 0) for _ in range(6)]
        while one.requests == 0:
            time.sleep(0.01)
        one.kill()
        for answer in answers:
            np.testing.assert_array_equal(answer.result()["STAIN_CD3"], TILES)
        with FakeTriton(port=int(one.url.rpartition(":")[2])) as again:
            deadline = time.monotonic() + 60
            while not again.requests and time.monotonic() < deadline:
                for answer in [threads.submit(pool.stain_tiles, TILES, ORIGINS, 0) for _ in range(4)]:
                    answer.result()
            assert again.requests, "it came back"
    assert any("is lost" in line for line in said)


def test_a_server_that_answers_with_failures_is_avoided() -> None:
    def fail(tensor: str, tiles: np.ndarray, origins: np.ndarray) -> np.ndarray:
        raise RuntimeError("Stub process is not healthy")

    with FakeTriton(fail) as broken, FakeTriton() as one:
        with Target(addresses=(broken.url, one.url)).connect(1) as pool:
            for _ in range(4):
                np.testing.assert_array_equal(pool.stain_tiles(TILES, ORIGINS, 0)["STAIN_CD3"], TILES)
        assert one.requests == 4


def test_a_busy_server_hands_its_requests_on() -> None:
    said: list[str] = []
    with FakeTriton() as one, FakeTriton() as two:
        one.busy = 2
        with Target(addresses=(one.url, two.url)).connect(1, said.append) as pool:
            for _ in range(3):
                np.testing.assert_array_equal(pool.stain_tiles(TILES, ORIGINS, 0)["STAIN_CD3"], TILES)
        assert two.requests >= 1
    assert any("is busy" in line for line in said)


def test_servers_that_are_all_busy_are_waited_for() -> None:
    """Longer than lost ones are."""
    with FakeTriton() as one, FakeTriton() as two:
        one.busy = two.busy = 2
        with Target(addresses=(one.url, two.url), patience=0).connect(1) as pool:
            np.testing.assert_array_equal(pool.stain_tiles(TILES, ORIGINS, 0)["STAIN_CD3"], TILES)


def test_without_any_server_the_work_ends() -> None:
    with FakeTriton() as one, FakeTriton() as two:
        with Target(addresses=(one.url, two.url), patience=1).connect(2) as pool:
            one.kill()
            two.kill()
            with pytest.raises(ServerLostError):
                pool.stain_tiles(TILES, ORIGINS, 0)
        with pytest.raises(ServerUnreachableError), Target(addresses=(one.url, two.url)).connect(2):
            pass


def test_a_server_that_is_not_there_is_done_without() -> None:
    said: list[str] = []
    with FakeTriton() as one, Target(addresses=(NOWHERE, one.url)).connect(2, said.append) as pool:
        pool.stain_tiles(TILES, ORIGINS, 0)
    assert "going on without it" in said[0]


def test_servers_of_different_models_are_refused() -> None:
    other = dataclasses.replace(FAKE_CONTRACT, model_version="a" * 64)
    with (
        FakeTriton() as one,
        FakeTriton(contract=other) as two,
        pytest.raises(ContractError, match="same model"),
        Target(addresses=(one.url, two.url)).connect(2),
    ):
        pass


def test_a_refused_request_is_not_tried_elsewhere() -> None:
    with FakeTriton() as one, FakeTriton() as two:
        with Target(addresses=(one.url, two.url)).connect(2) as pool, pytest.raises(RefusedRequestError):
            pool.stain_tiles(TILES, ORIGINS + 1, 0)
        assert one.requests + two.requests == 1


def test_cancel_ends_requests_that_wait_for_a_place() -> None:
    with (
        FakeTriton(delay=5) as one,
        FakeTriton(delay=5) as two,
        Target(addresses=(one.url, two.url)).connect(1) as pool,
        ThreadPoolExecutor(4) as threads,
    ):
        answers = [threads.submit(pool.stain_tiles, TILES, ORIGINS, 0) for _ in range(4)]
        while one.requests + two.requests < 2:
            time.sleep(0.01)
        pool.cancel()
        for answer in answers:
            with pytest.raises(ServerLostError):
                answer.result(timeout=4)


def test_a_slide_survives_one_of_two_servers(tmp_path: Path) -> None:
    y, x = np.mgrid[:1200, :900]
    pixels = np.stack([170 + 30 * np.sin(x / 19), 90 + 30 * np.cos(y / 23), 160 + 0 * x], axis=-1).astype(np.uint8)
    path = tmp_path / "t.tif"
    tifffile.imwrite(path, pixels, photometric="rgb", resolution=(20000, 20000), resolutionunit="CENTIMETER")
    options = StainingOptions(stains=("cd3",), batch=2, in_flight=2)

    def paint(tensor: str, tiles: np.ndarray, origins: np.ndarray) -> np.ndarray:
        if dying.requests == 3:
            threading.Thread(target=dying.kill).start()
            time.sleep(2)
        return identity(tensor, tiles, origins)

    with FakeTriton() as one:
        assert run_command([path], tmp_path / "one", Target(addresses=(one.url,)), options) == 0
        with FakeTriton(paint) as dying:
            assert run_command([path], tmp_path / "two", Target(addresses=(one.url, dying.url)), options) == 0
            assert dying.requests >= 3
    for name in ("cd3.ome.tiff", "cd3.cells.ome.tiff"):
        np.testing.assert_array_equal(
            tifffile.imread(tmp_path / "two" / name), tifffile.imread(tmp_path / "one" / name)
        )
