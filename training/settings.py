"""What a run is asked to be: a preset, changed by a file, changed by the command line."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Any, TypeVar

from staindiffuser.training.config import PRESETS, ModelConfig, Preset, TrainConfig, from_json
from staindiffuser.training.errors import ConfigError

__all__ = ["choose_preset", "choose_recipe", "read_settings"]


def read_settings(path: Path) -> dict[str, Any]:
    """Read a settings file: TOML, or JSON if its name ends so. It may have ``preset``, ``train`` and ``model``.

    Raises:
        ConfigError: naming the file, and the field that is unknown.
    """
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # JSON's and TOML's errors, and bad UTF-8
        raise ConfigError(f"{path} is not valid: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold fields, such as train = {{…}}")
    known = ("preset", "train", "model")
    for name, value in data.items():
        if name not in known:
            raise ConfigError(f"{path}: unknown field {name!r}; known: {', '.join(known)}")
        if not isinstance(value, str if name == "preset" else dict):
            raise ConfigError(f"{path}: {name} must be {'a name' if name == 'preset' else 'a table of fields'}")
    return data


def choose_preset(name: str | None, file: Path | None, changes: dict[str, Any]) -> tuple[str, Preset]:
    """The preset that is asked for, and its name.

    Args:
        name: of the preset; otherwise the file's, otherwise ``demo``.
        file: fields of :class:`TrainConfig` and :class:`ModelConfig` that are to be otherwise.
        changes: fields of :class:`TrainConfig` that have the last word.

    Raises:
        ConfigError: naming the file and the field.
    """
    settings = read_settings(file) if file else {}
    name = name or settings.get("preset", "demo")
    if name not in PRESETS:
        raise ConfigError(f"{file}: preset is {name!r}, must be one of {', '.join(PRESETS)}")
    preset = PRESETS[name]
    model = _changed(preset.model, settings.get("model"), f"{file}: model")
    train = _changed(preset.train, settings.get("train"), f"{file}: train")
    return name, Preset(model=model, train=dataclasses.replace(train, **changes))


def choose_recipe(recipe: TrainConfig, file: Path | None, changes: dict[str, Any]) -> TrainConfig:
    """A recipe, changed by a file that has only ``train``, and by ``changes``.

    Raises:
        ConfigError: naming the file and the field.
    """
    if file:
        settings = read_settings(file)
        for name in settings:
            if name != "train":
                raise ConfigError(f"{file}: {name} is the checkpoint's; only train can be changed")
        recipe = _changed(recipe, settings.get("train"), f"{file}: train")
    return dataclasses.replace(recipe, **changes)


T = TypeVar("T", ModelConfig, TrainConfig)


def _changed(config: T, changes: dict[str, Any] | None, where: str) -> T:
    """The configuration with the fields of a file."""
    if not changes:
        return config
    for old, new in _RENAMED.items():
        if old in changes:
            raise ConfigError(f"{where}: {old} is now called {new}")
    return from_json(type(config), _merged(dataclasses.asdict(config), changes), where)


_RENAMED = {"accumulate": "gradient_accumulation", "picture_max_share": "image_max_share"}


def _merged(fields: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Fields with changes, table by table."""
    both = {name: (fields[name], changes[name]) for name in changes if name in fields}
    tables = {n: _merged(old, new) for n, (old, new) in both.items() if isinstance(old, dict) and isinstance(new, dict)}
    return {**fields, **changes, **tables}
