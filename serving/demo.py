"""The repositories of the models that ship with the package: the demonstration model, and others by their names."""

from __future__ import annotations

import os
from pathlib import Path

from staindiffuser.errors import UsageError
from staindiffuser.export.builders import BuildOptions
from staindiffuser.export.choosing import AUTO, choice_key
from staindiffuser.export.description import GraphSet
from staindiffuser.export.errors import GraphsError
from staindiffuser.export.repository import Progress, build, prepare_build
from staindiffuser.files import cache_folder

__all__ = ["DEMO", "demo_graphs", "repository_of", "shipped_models"]

DEMO = "demo"
"""The model that is served where none is named."""
EXACT = "STAINDIFFUSER_EXACT"
"""Environment variable for machines that are to agree."""
FAST_FLAVOUR = "single"
"""One process, in which OpenVINO's engines are one graph."""


def shipped_models() -> dict[str, Path]:
    """The models that come with this installation: name → folder of its graphs."""
    import staindiffuser

    folder = Path(next(iter(staindiffuser.__path__))) / "checkpoints"
    return {graphs.parent.name: graphs for graphs in sorted(folder.glob("*/graphs")) if graphs.is_dir()}


def demo_graphs() -> Path:
    """Folder of the demonstration model's graphs.

    Raises:
        GraphsError: this installation lacks them.
    """
    graphs = shipped_models().get(DEMO)
    if graphs is None:
        raise GraphsError("this installation lacks the demonstration model: install the package again")
    return graphs


def repository_of(asked: Path | None, progress: Progress = lambda message: None, *, fast: bool | None = None) -> Path:
    """The repository that a command is to serve: the folder that was named, or that of a model that ships.

    The repository of a model that ships is built in the cache folder on first use. The folder's name contains the
    repository's fingerprint, so that another version of the model, of this package or of ONNX Runtime gets its own.
    One whose gate was not passed is served as well: it was asked for by its name, and its outputs say so.

    Args:
        asked: a folder, or the name of a model that ships (a folder of that name goes first); None: the demonstration.
        progress: called with one line per step.
        fast: of a model that ships, the fastest engines that pass the gate on this machine, measured when they are
            built; False: ONNX Runtime in float32, which gives the same image on every machine, give or take a grey
            level. None: the fastest, unless the environment sets ``STAINDIFFUSER_EXACT``.

    Raises:
        StainDiffuserError: see :func:`staindiffuser.export.repository.build`.
    """
    if asked is None:
        graphs = demo_graphs()
    elif asked.exists() or str(asked) not in shipped_models():
        if fast:
            raise UsageError(f"--fast is for models that ship: build {asked} with `export build --target auto`")
        return asked
    else:
        graphs = shipped_models()[str(asked)]
    if fast is None:
        fast = os.environ.get(EXACT, "") in ("", "0")
    if fast:
        loaded = GraphSet.load(graphs)
        key = choice_key(loaded, BuildOptions(), FAST_FLAVOUR)
        output = cache_folder() / "repositories" / f"{loaded.name}-fast-{key[:16]}"
        return build(
            graphs, output, target=AUTO, flavour=FAST_FLAVOUR, progress=progress, allow_ungated=True
        ).repository
    wanted = prepare_build(graphs)
    output = cache_folder() / "repositories" / f"{wanted.graphs.name}-{wanted.fingerprint[:16]}"
    return build(graphs, output, progress=progress, allow_ungated=True).repository
