"""Settings from a file: options of commands that are not on the command line and not in the environment.

The file is TOML, a table per command and in it the options by their long names::

    [stain]
    server = ["stain-1.hospital:8001", "stain-2.hospital:8001"]
    parquet = true

    [bench.slide]
    side = 8192

An option on the command line wins over ``STAINDIFFUSER_<COMMAND>_<OPTION>``, which wins over the file.
"""

from __future__ import annotations

import contextlib
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import platformdirs
import typer

from staindiffuser.errors import UsageError

__all__ = ["default_file", "in_force", "read_settings"]

_SOURCES = {"ENVIRONMENT": "environment", "DEFAULT_MAP": "file", "DEFAULT": "default"}


def default_file() -> Path:
    """Where the file is looked for unless one is named."""
    return platformdirs.user_config_path("staindiffuser", appauthor=False) / "config.toml"


def read_settings(path: Path, root: Any) -> dict[str, Any]:
    """The settings of a file, as click's ``default_map``: parameters by command.

    Args:
        path: the file.
        root: the click group whose commands and options the file may name.

    Raises:
        UsageError: the file cannot be read, or a key or value is wrong; names the file and the key.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"settings {path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # of TOML and of UTF-8
        raise UsageError(f"settings {path} are not TOML: {error}") from error
    return _of_group(data, root, path, "")


def in_force(context: Any, root: Any) -> Iterator[tuple[str, str, Any, str]]:
    """Every option of every command: command, long name, value, and where it is from."""
    for command, inner in _commands(root, context):
        for option in _options(inner.command):
            value, source = option.consume_value(inner, {})
            with contextlib.suppress(typer.BadParameter):  # the command itself will say so
                value = option.process_value(inner, value)
            origin = _SOURCES[source.name]
            if origin == "environment":
                origin = f"{inner.auto_envvar_prefix}_{option.name.upper()}"
            yield command, _long(option), value, origin


def _of_group(data: Mapping[str, Any], group: Any, path: Path, prefix: str) -> dict[str, Any]:
    found = {}
    for name, table in data.items():
        key = f"{prefix}{name}"
        command = group.commands.get(name)
        if command is None:
            raise UsageError(f"settings {path}: {key}: no such command; there are {', '.join(sorted(group.commands))}")
        if not isinstance(table, dict):
            raise UsageError(f"settings {path}: {key}: must be a table, [{key}]")
        if hasattr(command, "commands"):
            tables = {k: v for k, v in table.items() if k in command.commands}
            own = {k: v for k, v in table.items() if k not in command.commands}
            found[name] = _of_command(own, command, path, key) | _of_group(tables, command, path, f"{key}.")
        else:
            found[name] = _of_command(table, command, path, key)
    return found


def _of_command(table: Mapping[str, Any], command: Any, path: Path, key: str) -> dict[str, Any]:
    options = {_long(option): option for option in _options(command)}
    found = {}
    for name, value in table.items():
        where = f"settings {path}: {key}.{name}"
        option = options.get(name.replace("_", "-"))
        if option is None:
            raise UsageError(f"{where}: no such option of `staindiffuser {key.replace('.', ' ')}`; see its --help")
        found[option.name] = _checked(value, option, command, where)
    return found


def _checked(value: Any, option: Any, command: Any, where: str) -> Any:
    """The value as click takes it, if the option accepts it."""
    if option.is_flag and not isinstance(value, bool):
        raise UsageError(f"{where}: must be true or false, not {value!r}")
    if not option.is_flag and isinstance(value, bool | dict):
        raise UsageError(f"{where}: {value!r} is not a value of this option")
    if isinstance(value, list) != bool(option.multiple):
        raise UsageError(f"{where}: must {'' if option.multiple else 'not '}be a list")
    text = [str(one) for one in value] if option.multiple else value if option.is_flag else str(value)
    context = typer.Context(command, info_name=command.name)
    try:
        option.process_value(context, text)
    except typer.BadParameter as error:
        raise UsageError(f"{where}: {error.message}") from error
    return text


def _commands(group: Any, context: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        inner = typer.Context(command, info_name=name, parent=context)
        yield f"{prefix}{name}", inner
        if hasattr(command, "commands"):
            yield from _commands(command, inner, f"{prefix}{name}.")


def _options(command: Any) -> list[Any]:
    return [p for p in command.params if p.param_type_name == "option" and p.name not in ("help", "version", "config")]


def _long(option: Any) -> str:
    return str(max(option.opts, key=len)).removeprefix("--")
