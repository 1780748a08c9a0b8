"""Whether a server that only refuses is busy or stuck: a stuck one's queue refuses as a busy one's does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from staindiffuser.client.testing import FAKE_CONTRACT, FakeTriton
from staindiffuser.errors import ServerLostError
from staindiffuser.serving.readiness import require_answer
from tests.metrics_port import metrics_port

MODEL: Any = SimpleNamespace(
    ensemble="staindiffuser",
    manifest=SimpleNamespace(
        model_name="fake",
        model_version=FAKE_CONTRACT.model_version,
        flavour="single",
        tile=FAKE_CONTRACT.tile,
        stains=FAKE_CONTRACT.stains,
        quality=FAKE_CONTRACT.quality,
    ),
)


@contextmanager
def metrics(finished: Callable[[], float]) -> Iterator[str]:
    """A metrics port that says how many requests are finished."""
    labels = f'status="OK",model_version="{FAKE_CONTRACT.model_version[:12]}"'
    others = 'staindiffuser_requests_total{status="OK",model_version="another"} 1000'

    def text() -> str:
        return f'x_bytes{{gpu="0"}} nan\nstaindiffuser_requests_total{{{labels}}} {finished()}\n{others}\n'

    with metrics_port(text) as url:
        yield url


def test_one_that_refuses_and_finishes_nothing_is_lost() -> None:
    with FakeTriton() as server, metrics(lambda: 7) as url:
        require_answer(server.url, url, MODEL, 2)
        server.busy = 1000
        with pytest.raises(ServerLostError, match="finished nothing for 2 s"):
            require_answer(server.url, url, MODEL, 2)


def test_one_that_refuses_because_it_is_busy_with_others_is_not() -> None:
    counts = iter(range(1000))
    with FakeTriton() as server, metrics(lambda: next(counts)) as url:
        server.busy = 1000
        require_answer(server.url, url, MODEL, 2)
        assert server.requests == 1


def test_one_that_does_not_say_what_it_has_finished_is_not() -> None:
    with FakeTriton() as server:
        server.busy = 1000
        require_answer(server.url, "http://127.0.0.1:1/metrics", MODEL, 2)
