"""The server to use: impossible combinations are refused by the option's name."""

from pathlib import Path
from typing import Any

import pytest

from staindiffuser.client.target import Target
from staindiffuser.client.testing import FakeTriton


@pytest.mark.parametrize(
    ("values", "option"),
    [
        ({"addresses": ("host",)}, "--server"),
        ({"addresses": ("h:1", "http://host:1")}, "--server"),
        ({"addresses": ("h:1",), "repository": Path("r")}, "--repository"),
        ({"addresses": ("h:1", "h:1")}, "twice"),
        ({"addresses": ("h:1",), "fast": True}, "--fast"),
        ({"timeout": 0.0}, "--timeout"),
        ({"patience": -1.0}, "--patience"),
    ],
)
def test_an_impossible_target_is_refused(values: dict[str, Any], option: str) -> None:
    with pytest.raises(ValueError, match=option):
        Target(**values)


def test_a_running_server_is_connected_to() -> None:
    said: list[str] = []
    with FakeTriton() as fake, Target(addresses=(fake.url,)).connect(2, said.append) as client:
        assert client.url == fake.url
    assert said == []
