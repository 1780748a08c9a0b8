"""Loading a repository's engines into this process as the server does, for parity and benchmarks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from staindiffuser.export.builders.base import Builder, Engine, Joins
from staindiffuser.export.description import QUALITY

__all__ = ["joined_engines", "load_engines"]


def joined_engines(builder: Builder, engines: Iterable[str], flavour: str) -> list[str]:
    """Names of the engines that are loaded as one graph, the encoder first: in the flavour ``single``, if the target
    joins, all that decide pixels. What judges tiles stays apart, in float32."""
    joins = flavour == "single" and isinstance(builder, Joins)
    return [name for name in engines if joins and not name.startswith(QUALITY)]


def load_engines(
    builder: Builder, files: Mapping[str, Path], *, threads: int, flavour: str = "python"
) -> dict[str, Engine]:
    """Load engines as a server of this flavour does.

    Args:
        builder: of their target.
        files: by name, the encoder first, and what judges tiles last.
        threads: of each.
        flavour: of the repository.

    Returns:
        Engines by name; those that are one graph are one engine, under each of their names.

    Raises:
        BuilderMissingError: this machine cannot run them.
    """
    together = joined_engines(builder, files, flavour)
    engines: dict[str, Engine] = {}
    if together and isinstance(builder, Joins):
        engines = dict.fromkeys(together, builder.load_joined([files[name] for name in together], threads=threads))
    return engines | {name: builder.load(file, threads=threads) for name, file in files.items() if name not in engines}
