"""The models that one server holds, and the one of them that a client means."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence

from pydantic.dataclasses import dataclass

from staindiffuser.client.contract import ENSEMBLE
from staindiffuser.client.errors import ContractError
from staindiffuser.errors import UsageError
from staindiffuser.records import STRICT, RecordError, decode

__all__ = ["OfferedModel", "choose_model", "offered_models"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OfferedModel:
    """One model of a server."""

    name: str
    """Such as ``demo``."""
    version: str
    """Hash of everything that determines the pixels."""
    ensemble: str
    """What it is called in requests."""

    def matches(self, wanted: str) -> bool:
        """Whether this is what ``NAME`` or ``NAME@VERSION`` means; the version's first digits are enough."""
        return wanted == self.name or (
            wanted.startswith(f"{self.name}@") and self.version.startswith(wanted.removeprefix(f"{self.name}@"))
        )


def offered_models(parameters: Mapping[str, str], url: str) -> tuple[OfferedModel, ...]:
    """What a server offers, as its first ensemble's parameters say.

    Raises:
        ContractError: they are malformed.
    """
    if "models" not in parameters:
        alone = {"name": parameters.get("model_name", ""), "version": parameters.get("model_version", "")}
        return (OfferedModel(**alone, ensemble=ENSEMBLE),)
    try:
        return tuple(decode(OfferedModel, entry) for entry in json.loads(parameters["models"]))
    except (RecordError, TypeError, ValueError) as error:
        raise ContractError(f"the list of models of the server at {url} cannot be read: {error}") from error


def choose_model(offered: Sequence[OfferedModel], wanted: str, url: str) -> OfferedModel:
    """The model that ``wanted`` (``NAME``, ``NAME@VERSION``) means; if it is empty, the only one.

    Raises:
        UsageError: none or several match; lists what the server has.
    """
    found = [model for model in offered if not wanted or model.matches(wanted)]
    if len(found) == 1:
        return found[0]
    names = Counter(model.name for model in offered)
    labels = [m.name if names[m.name] == 1 else f"{m.name}@{m.version[:12]}" for m in offered]
    if found:
        raise UsageError(f"the server at {url} serves several models: choose one by --model {', '.join(labels)}")
    several = "models" if len(offered) > 1 else "model"
    raise UsageError(f"the server at {url} serves the {several} {', '.join(labels)}, not {wanted}")
