"""The model repository of the demonstration model that ships with the package."""

from __future__ import annotations

from pathlib import Path

from staindiffuser.export.errors import GraphsError
from staindiffuser.export.repository import Progress, build, prepare_build
from staindiffuser.files import cache_folder

__all__ = ["demo_graphs", "demo_repository"]

_PACKAGE = Path(__file__).resolve().parent.parent


def demo_graphs() -> Path:
    """Folder of the graphs that ship with the package.

    Raises:
        GraphsError: this installation lacks them.
    """
    import staindiffuser

    folder = Path(next(iter(staindiffuser.__path__))) / "checkpoints" / "demo" / "graphs"
    if not folder.is_dir():
        raise GraphsError(f"{folder} is missing: this installation lacks the demonstration model; install it again")
    return folder


def demo_repository(progress: Progress = lambda message: None) -> Path:
    """The demonstration's repository, built in the cache folder on first use.

    The folder's name contains the repository's fingerprint, so that another version of the model, of this package or of
    ONNX Runtime gets its own folder.

    Raises:
        StainDiffuserError: see :func:`staindiffuser.export.repository.build`.
    """
    graphs = demo_graphs()
    wanted = prepare_build(graphs)
    output = cache_folder() / "repositories" / f"{wanted.graphs.name}-{wanted.fingerprint[:16]}"
    return build(graphs, output, progress=progress).repository
