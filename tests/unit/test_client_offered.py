"""Which of a server's models a client means."""

from __future__ import annotations

import json

import pytest

from staindiffuser.client.errors import ContractError
from staindiffuser.client.offered import OfferedModel, choose_model, offered_models
from staindiffuser.client.testing import FAKE_CONTRACT, FakeTriton
from staindiffuser.errors import UsageError

COLON = OfferedModel(name="colon", version="ab" * 32, ensemble="staindiffuser")
NEWER = OfferedModel(name="colon", version="ac" * 32, ensemble="staindiffuser-colon-acacacac")
BREAST = OfferedModel(name="breast", version="ab" * 32, ensemble="staindiffuser-breast-abababab")


@pytest.mark.parametrize(
    ("offered", "wanted", "chosen"),
    [
        ([COLON], "", COLON),
        ([COLON], "colon", COLON),
        ([COLON], f"colon@{COLON.version}", COLON),
        ([COLON, BREAST], "breast", BREAST),
        ([COLON, NEWER, BREAST], "colon@ac", NEWER),
        ([COLON, NEWER, BREAST], "colon@ab", COLON),
    ],
)
def test_a_name_or_a_version_chooses(offered: list[OfferedModel], wanted: str, chosen: OfferedModel) -> None:
    assert choose_model(offered, wanted, "host:1") is chosen


@pytest.mark.parametrize(
    ("offered", "wanted", "message"),
    [
        ([COLON], "breast", "the server at host:1 serves the model colon, not breast"),
        ([COLON], "colon@ac", "serves the model colon, not colon@ac"),
        ([COLON, BREAST], "", "serves several models: choose one by --model colon, breast"),
        ([COLON, NEWER, BREAST], "colon", "one by --model colon@abababababab, colon@acacacacacac, breast"),
        ([COLON, NEWER, BREAST], "colon@a", "one by --model colon@abababababab, colon@acacacacacac, breast"),
        ([COLON, BREAST], "lung", "serves the models colon, breast, not lung"),
    ],
)
def test_all_else_is_answered_with_a_list(offered: list[OfferedModel], wanted: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose_model(offered, wanted, "host:1")


def test_a_server_that_lists_nothing_has_one_model() -> None:
    with FakeTriton() as server:
        (model,) = offered_models(server.parameters, server.url)
    assert model == OfferedModel(
        name=FAKE_CONTRACT.model_name, version=FAKE_CONTRACT.model_version, ensemble="staindiffuser"
    )


@pytest.mark.parametrize("text", ["colon", json.dumps([{"name": "colon"}]), "7"])
def test_a_list_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ContractError, match="list of models of the server at host:1 cannot be read"):
        offered_models({"models": text}, "host:1")
