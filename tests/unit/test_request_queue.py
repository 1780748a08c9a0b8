"""The queue in which the flavour ``single`` keeps its requests."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from staindiffuser.triton_models.shared.request_queue import RequestQueue

LONG = 60.0


@contextmanager
def requests(
    *, length: int = 8, seconds: float = LONG, expired: Callable[[int], None] = lambda request: None
) -> Iterator[RequestQueue[int]]:
    made: RequestQueue[int] = RequestQueue(length=length, seconds=seconds, expired=expired)
    try:
        yield made
    finally:
        made.close()


def taken(waiting: RequestQueue[int]) -> int:
    found = waiting.take()
    assert found is not None
    return found.request


def test_urgent_ones_first_and_else_in_the_order_in_which_they_came() -> None:
    with requests() as waiting:
        for number in range(6):
            assert waiting.put(number, urgent=number in (3, 5))
        assert len(waiting) == 6
        assert [taken(waiting) for _ in range(6)] == [3, 5, 0, 1, 2, 4]
        assert len(waiting) == 0


def test_what_finds_no_room_is_refused_and_urgent_ones_have_room_of_their_own() -> None:
    with requests(length=2) as waiting:
        assert [waiting.put(number) for number in range(3)] == [True, True, False]
        assert [waiting.put(number, urgent=True) for number in range(3, 6)] == [True, True, False]
        assert [taken(waiting) for _ in range(3)] == [3, 4, 0]
        assert waiting.put(6)


def test_whoever_waits_for_a_request_gets_it_at_once() -> None:
    with requests() as waiting, ThreadPoolExecutor(3) as pool:
        takers = [pool.submit(taken, waiting) for _ in range(3)]
        time.sleep(0.05)
        for number in range(3):
            waiting.put(number)
        assert sorted(taker.result(timeout=5) for taker in takers) == [0, 1, 2]


def test_what_has_waited_too_long_is_taken_out_while_nobody_takes_anything() -> None:
    late: queue.SimpleQueue[tuple[int, float]] = queue.SimpleQueue()
    with requests(seconds=0.4, expired=lambda request: late.put((request, time.monotonic()))) as waiting:
        began = time.monotonic()
        assert waiting.put(1)
        assert waiting.put(2, seconds=LONG)  # no more than others
        assert waiting.put(3, urgent=True, seconds=0.1)
        found = [late.get(timeout=5) for _ in range(3)]
        assert [request for request, _ in found] == [3, 1, 2]
        assert found[0][1] - began >= 0.1
        assert found[1][1] - began >= 0.4
        assert len(waiting) == 0
        assert waiting.put(4)
        assert taken(waiting) == 4


def test_how_long_a_request_has_waited_is_known() -> None:
    with requests() as waiting:
        waiting.put(1)
        time.sleep(0.1)
        found = waiting.take()
        assert found is not None
        assert 0.1 <= time.monotonic() - found.since < LONG
        assert found.until == pytest.approx(found.since + LONG)


def test_closing_hands_back_what_waits_and_ends_those_who_take() -> None:
    with requests() as waiting, ThreadPoolExecutor(2) as pool:
        takers = [pool.submit(waiting.take) for _ in range(2)]
        time.sleep(0.05)
        assert waiting.close() == []
        assert [taker.result(timeout=5) for taker in takers] == [None, None]
        assert not waiting.put(1)
    with requests() as waiting:
        waiting.put(1)
        waiting.put(2, urgent=True)
        assert waiting.close() == [2, 1]
        assert waiting.take() is None


def test_many_threads_lose_nothing_and_get_nothing_twice() -> None:
    late: list[int] = []
    with requests(length=10_000, seconds=0.5, expired=late.append) as waiting:
        found: list[int] = []

        def take() -> None:
            while (one := waiting.take()) is not None:
                found.append(one.request)
                time.sleep(0.001)  # slower than they come: some are late

        takers = [threading.Thread(target=take) for _ in range(3)]
        for taker in takers:
            taker.start()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda number: waiting.put(number, urgent=number % 7 == 0), range(4000)))
        left = waiting.close()
        for taker in takers:
            taker.join()
    assert sorted([*found, *late, *left]) == list(range(4000))
