"""The models as Triton sees them: links to the verified files, under names that are unique in the server.

Triton holds models by their names, and every repository calls its ensemble ``staindiffuser`` and its encoder
``he_encoder``. So the models of a server's first repository keep their names, and those of each further one get its
model's name and version behind theirs: ``staindiffuser-colon-3fa81b2c``, ``he_encoder-colon-3fa81b2c``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from staindiffuser.errors import UsageError
from staindiffuser.export import triton_config
from staindiffuser.export.manifest import Manifest
from staindiffuser.export.wire import ENSEMBLE

__all__ = ["MODELS", "SERVER_ID", "ServedModel", "link_models", "named"]

SERVER_ID = "server_id"
"""The ensembles' parameter that tells which start of which server answers."""
MODELS = "models"
"""The ensembles' parameter that lists a server's models, where it has several."""


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A verified repository, and what its models are called in the server."""

    repository: Path
    manifest: Manifest
    suffix: str
    """Behind the names of its models; empty for the first repository."""

    @property
    def ensemble(self) -> str:
        """Name of its ensemble."""
        return ENSEMBLE + self.suffix


def named(repositories: Iterable[tuple[Path, Manifest]]) -> tuple[ServedModel, ...]:
    """Give the models of verified repositories their names in the server.

    Raises:
        UsageError: two repositories hold the same version of the same model, which no client could tell apart.
    """
    models: list[ServedModel] = []
    for repository, manifest in repositories:
        for other in models:
            if other.manifest.model_version == manifest.model_version:
                raise UsageError(
                    f"{other.repository} and {repository} hold the same model {manifest.model_name} "
                    f"({manifest.model_version[:12]}): serve one of them"
                )
        slug = re.sub(r"[^a-z0-9]+", "_", manifest.model_name.lower())
        suffix = f"-{slug}-{manifest.model_version[:8]}" if models else ""
        models.append(ServedModel(repository=repository, manifest=manifest, suffix=suffix))
    return tuple(models)


def link_models(models: Sequence[ServedModel], folder: Path, *, identity: str) -> Path:
    """Make a repository of links to exactly the files that were verified.

    The Python backend writes compiled files beside its models and would run any it finds there. With links, the
    repositories stay as they were built, may be read-only, and nothing unverified is executed. Only configurations are
    copies: of ensembles, to which the server's identity and a list of its models are added, and of models with other
    names.

    Args:
        models: what the server is to hold.
        folder: where the links are made.
        identity: value of the parameter :data:`SERVER_ID`.

    Returns:
        ``folder``.
    """
    offered = [
        {"name": m.manifest.model_name, "version": m.manifest.model_version, "ensemble": m.ensemble} for m in models
    ]
    for model in models:
        for file in model.manifest.files:
            name, _, path = file.partition("/")
            link = folder / f"{name}{model.suffix}" / path
            link.parent.mkdir(parents=True, exist_ok=True)
            if path != "config.pbtxt" or (name != ENSEMBLE and not model.suffix):
                link.symlink_to(model.repository / file)
                continue
            message = triton_config.parse((model.repository / file).read_text(encoding="utf-8"))
            message.name += model.suffix
            for step in message.ensemble_scheduling.step:
                step.model_name += model.suffix
            if name == ENSEMBLE:
                message.parameters[SERVER_ID].string_value = identity
                if len(models) > 1:
                    message.parameters[MODELS].string_value = json.dumps(offered, ensure_ascii=False)
            link.write_text(triton_config.to_text(message), encoding="utf-8")
    return folder
