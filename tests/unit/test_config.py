"""Configurations: every preset holds, and every mistake names its field."""

import dataclasses
import json
import math
from typing import Any

import pytest

from staindiffuser.training.config import PRESETS, ModelConfig, StainConfig, TrainConfig, WidthConfig, from_json
from staindiffuser.training.errors import ConfigError


@pytest.mark.parametrize("name", PRESETS)
def test_preset_survives_json(name: str) -> None:
    model = PRESETS[name].model
    assert from_json(ModelConfig, json.loads(json.dumps(dataclasses.asdict(model))), "config.json: model") == model


def test_unknown_field_is_named_with_its_file() -> None:
    data = dataclasses.asdict(PRESETS["debug"].model)
    data["encoder"]["chanels"] = [1]
    with pytest.raises(ConfigError, match=r"config\.json: encoder\.chanels: unknown field"):
        from_json(ModelConfig, data, "config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop": 100}, "crop is 100, must be a multiple of 16"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0, must be positive"),
        ({"cells_max_share": 1.5}, "cells_max_share is 1.5"),
        ({"steps": 0}, "steps is 0"),
        ({"augmentation": "wider"}, "augmentation is 'wider', must be light or wide where images are trained"),
        ({"validation_tiles": 0}, "validation_tiles is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"workers": -1}, "workers is -1, must be 0 or more"),
        ({"betas": (0.9, 1.0)}, "betas is"),
        ({"p_std": math.nan}, "p_std is nan"),
        ({"learning_rate": math.inf}, "learning_rate is inf"),
    ],
)
def test_impossible_recipe_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(TrainConfig(), **change)


def test_impossible_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="channels"):
        WidthConfig(channels=(16, 16))
    with pytest.raises(ConfigError, match="name is 'CK8/18'"):
        StainConfig(name="CK8/18", label="CK8/18")
    with pytest.raises(ConfigError, match="unique"):
        dataclasses.replace(PRESETS["debug"].model, stains=(StainConfig(name="a", label="A"),) * 2)
