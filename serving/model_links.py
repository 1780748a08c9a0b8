"""The model repository as Triton sees it: links to the verified files, and the identity of the server."""

from __future__ import annotations

from pathlib import Path

from staindiffuser.export import triton_config
from staindiffuser.export.manifest import Manifest

__all__ = ["SERVER_ID", "link_models"]

SERVER_ID = "server_id"
"""The ensemble's parameter that tells which start of which server answers."""


def link_models(repository: Path, manifest: Manifest, folder: Path, *, identity: str) -> Path:
    """Make a repository of links to exactly the files that were verified.

    The Python backend writes compiled files beside its models and would run any it finds there. With links, the
    repository stays as it was built, may be read-only, and nothing unverified is executed. Only the ensemble's
    configuration is a copy, to which the server's identity is added.

    Args:
        repository: a verified model repository.
        manifest: its manifest.
        folder: where the links are made.
        identity: value of the parameter :data:`SERVER_ID`.

    Returns:
        ``folder``.
    """
    config = f"{triton_config.ENSEMBLE}/config.pbtxt"
    for name in manifest.files:
        link = folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if name != config:
            link.symlink_to(repository / name)
    message = triton_config.parse((repository / config).read_text(encoding="utf-8"))
    message.parameters[SERVER_ID].string_value = identity
    (folder / config).write_text(triton_config.to_text(message), encoding="utf-8")
    return folder
