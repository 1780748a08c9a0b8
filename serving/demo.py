"""The model repository of the demonstration model that ships with the package."""

from __future__ import annotations

from pathlib import Path

from staindiffuser.export.errors import GraphsError
from staindiffuser.export.repository import Progress, build, plan_repository
from staindiffuser.files import cache_folder

__all__ = ["demo_graphs", "demo_repository"]

_PACKAGE = Path(__file__).resolve().parent.parent


def demo_graphs() -> Path:
    """The graphs that ship with the package.

    Raises:
        GraphsError: this installation has none.
    """
    import staindiffuser

    folder = Path(next(iter(staindiffuser.__path__))) / "checkpoints" / "demo" / "graphs"
    if not folder.is_dir():
        raise GraphsError(f"{folder} is missing: this installation lacks the demonstration model; install it again")
    return folder


def demo_repository(progress: Progress = lambda message: None) -> Path:
    """Build the demonstration's repository once, in the cache folder, and return it.

    Its name holds the hash of all that it is made from: another version of the model, of this package or of ONNX
    Runtime has another folder, and the same one is not built again.

    Raises:
        StainDiffuserError: see :func:`staindiffuser.export.repository.build`.
    """
    graphs = demo_graphs()
    plan = plan_repository(graphs)
    output = cache_folder() / "repositories" / f"{plan.graphs.name}-{plan.fingerprint[:16]}"
    return build(graphs, output, progress=progress).repository
