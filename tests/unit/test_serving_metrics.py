"""What is read of the metrics port."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from staindiffuser.serving.metrics import read_metrics
from tests.metrics_port import metrics_port

TEXT = """\
# HELP staindiffuser_requests_total Requests whose turn came
# TYPE staindiffuser_requests_total counter
staindiffuser_requests_total{model_version="3fa81b2c0000",status="OK"} 5
staindiffuser_requests_total{model_version="3fa81b2c0000",status="INTERNAL"} 2
staindiffuser_requests_total{model_version="aa81b2c00000",status="OK"} 40
nv_pinned_memory_pool_used_bytes 7
"""


@pytest.fixture
def url() -> Iterator[str]:
    with metrics_port(lambda: TEXT) as address:
        yield address


def test_values_are_summed_over_their_labels(url: str) -> None:
    found = read_metrics(url)
    assert found["staindiffuser_requests_total"] == 47
    assert found["nv_pinned_memory_pool_used_bytes"] == 7
    assert found["nothing"] == 0


def test_of_one_model_alone(url: str) -> None:
    """A busy model must not hide that another one of the same server is stuck."""
    found = read_metrics(url, 'model_version="3fa81b2c0000"')
    assert found["staindiffuser_requests_total"] == 7
    assert found["nv_pinned_memory_pool_used_bytes"] == 0
