"""What the client learns of a model, and what it refuses to believe."""

import dataclasses

import pytest

from staindiffuser.client.contract import ModelContract
from staindiffuser.client.errors import ContractError, UnknownStainError
from staindiffuser.client.testing import FAKE_CONTRACT, FakeTriton


def test_parameters_become_a_contract() -> None:
    parameters = FakeTriton(contract=FAKE_CONTRACT).parameters
    assert ModelContract.from_config(parameters, max_batch=8, server="x") == FAKE_CONTRACT


@pytest.mark.parametrize("name", ["stains", "tile", "margin", "mpp", "steps", "model_version", "notice"])
def test_a_missing_parameter_is_named(name: str) -> None:
    parameters = FakeTriton().parameters
    del parameters[name]
    with pytest.raises(ContractError, match=name):
        ModelContract.from_config(parameters, max_batch=8, server="somewhere:1")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stains", "[]"),
        ("stains", '[{"name": "../x", "label": "X"}]'),
        ("tile", "250"),
        ("margin", "128"),
        ("mpp", "nan"),
        ("thresholds", '{"cd3": 2}'),
        ("thresholds", '["cd3"]'),
    ],
)
def test_a_contract_that_cannot_be_is_refused(name: str, value: str) -> None:
    with pytest.raises(ContractError, match=name):
        ModelContract.from_config({**FakeTriton().parameters, name: value}, max_batch=8, server="somewhere:1")


def test_stains_are_selected_in_the_models_order() -> None:
    assert [stain.name for stain in FAKE_CONTRACT.select(("ck818", "cd3"))] == ["cd3", "ck818"]
    assert FAKE_CONTRACT.select(None) == FAKE_CONTRACT.stains


@pytest.mark.parametrize("names", [("her2",), ("cd3", "her2"), ()])
def test_an_unknown_stain_is_refused_with_those_that_exist(names: tuple[str, ...]) -> None:
    with pytest.raises(UnknownStainError, match="cd3, ck818"):
        FAKE_CONTRACT.select(names)


def test_stains_have_the_thresholds_of_the_model_unless_the_user_says_others() -> None:
    told = dataclasses.replace(FAKE_CONTRACT, thresholds={"cd3": 0.23})
    parameters = FakeTriton(contract=told).parameters
    assert ModelContract.from_config(parameters, max_batch=8, server="x") == told
    assert "thresholds" not in FakeTriton().parameters  # as of an older server
    assert [stain.threshold for stain in FAKE_CONTRACT.select(None)] == [0.5, 0.5]
    assert [stain.threshold for stain in told.select(None)] == [0.23, 0.5]
    assert [stain.threshold for stain in told.select(None, {"cd3": 0.5, "ck818": 0.4})] == [0.5, 0.4]
    with pytest.raises(UnknownStainError, match="her2"):
        told.select(("cd3",), {"her2": 0.4})


def test_names_of_tensors() -> None:
    assert FAKE_CONTRACT.stains[1].image_tensor == "STAIN_CK818"
    assert FAKE_CONTRACT.stains[1].cells_tensor == "CELLS_CK818"
    with pytest.raises(ValueError, match="max_batch"):
        dataclasses.replace(FAKE_CONTRACT, max_batch=0)


def test_a_request_has_as_many_tiles_as_suit_the_server_unless_the_user_says_otherwise() -> None:
    parameters = FakeTriton().parameters
    older = ModelContract.from_config(parameters, max_batch=8, server="x")
    assert [older.tiles_per_request(asked) for asked in (None, 1, 8, 64)] == [4, 1, 8, 8]
    told = ModelContract.from_config({**parameters, "batch": "1"}, max_batch=8, server="x")
    assert [told.tiles_per_request(asked) for asked in (None, 3)] == [1, 3]
    assert told == older, "servers that differ in it alone serve the same model"
