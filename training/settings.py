"""What a run is asked to be: a preset, changed by a file, changed by the command line."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Any

from staindiffuser.training.config import PRESETS, Preset, TrainConfig, from_json
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
    fields = {
        part: _merged(getattr(preset, part), settings.get(part, {}), f"{file}: {part}") for part in ("model", "train")
    }
    preset = from_json(Preset, fields, str(file)) if settings else preset
    return name, dataclasses.replace(preset, train=dataclasses.replace(preset.train, **changes))


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
        where = f"{file}: train"
        recipe = from_json(TrainConfig, _merged(recipe, settings.get("train", {}), where), where)
    return dataclasses.replace(recipe, **changes)


def _merged(config: Any, changes: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of a config as JSON data, with changes; :func:`from_json` refuses those that it does not know."""
    fields: dict[str, Any] = dataclasses.asdict(config)
    for name, value in changes.items():
        old = fields.get(name)
        if isinstance(old, dict) and isinstance(value, dict):
            value = _merged(getattr(config, name), value, f"{where}: {name}")
        elif name in fields and not _fits(value, old):
            raise ConfigError(f"{where}: {name} is {value!r}, must be like {old!r}")
        fields[name] = value
    return fields


def _fits(value: Any, old: Any) -> bool:
    """Whether a value from a file is of the kind that the field has."""
    if isinstance(old, tuple):
        return isinstance(value, list) and all(_fits(item, old[0]) for item in value if old)
    if old is None or (isinstance(old, int) and not isinstance(old, bool)):
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(old, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, type(old))
