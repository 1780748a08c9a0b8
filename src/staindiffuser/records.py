"""Reading descriptions (JSON, TOML) into frozen dataclasses: the one way this package decodes a file.

A record is a pydantic dataclass whose configuration is :data:`STRICT`::

    @dataclass(frozen=True, kw_only=True, config=STRICT)
    class TensorSpec:
        name: str
        shape: tuple[int, ...]

Unknown fields, missing fields and wrong types are refused with the field's path, when a record is made in code as well
as when it is read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

__all__ = ["STRICT", "RecordError", "decode", "read_json"]

Record = TypeVar("Record")

STRICT = ConfigDict(extra="forbid", strict=True)
"""No unknown fields and no conversions: ``"3"`` is not a number, ``1`` is not a boolean."""


class RecordError(ValueError):
    """Data that is not the record it should be; the message names the field: ``engines.he_encoder.bytes: …``."""


def decode(kind: type[Record], data: object) -> Record:
    """Make a record of parsed JSON or TOML.

    Args:
        kind: the record's class.
        data: what the parser returned; lists stand for tuples.

    Raises:
        RecordError: names the first field that is unknown, missing, of the wrong type or out of range.
    """
    try:
        # As JSON, in which strict validation accepts an array for a tuple.
        return TypeAdapter(kind).validate_json(json.dumps(data))
    except ValidationError as error:
        raise RecordError(_first(error)) from error
    except TypeError as error:  # a TOML date, say, which JSON does not have
        raise RecordError(str(error)) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Raises:
        FileNotFoundError: there is no such file.
        RecordError: it cannot be read, or is not one JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise RecordError(f"cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise RecordError(f"holds {type(data).__name__} where an object is expected")
    return data


def _first(error: ValidationError) -> str:
    """One line for the first thing that is wrong."""
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    problem = {
        "unexpected_keyword_argument": "unknown field",
        "extra_forbidden": "unknown field",
        "missing": "missing",
        "missing_argument": "missing",
        "missing_keyword_only_argument": "missing",
    }.get(first["type"])
    if problem is None:
        if first["type"] == "value_error":  # raised by the record itself, which says all there is to say
            return first["msg"].removeprefix("Value error, ")
        problem = f"{first['msg'][0].lower()}{first['msg'][1:]}, not {_shown(first['input'])}"
    return f"{field}: {problem}" if field else problem


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."
