"""The model repository of the demonstration model that ships with the package."""

from __future__ import annotations

from pathlib import Path

from staindiffuser.export.builders import BuildOptions
from staindiffuser.export.choosing import AUTO, choice_key
from staindiffuser.export.description import GraphSet
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


def demo_repository(progress: Progress = lambda message: None, *, fast: bool = False) -> Path:
    """The demonstration's repository, built in the cache folder on first use.

    The folder's name contains the repository's fingerprint, so that another version of the model, of this package or of
    ONNX Runtime gets its own folder.

    Args:
        progress: called with one line per step.
        fast: with the fastest engines that pass the gate on this machine, measured when they are built, instead of
            ONNX Runtime in float32, which gives the same image on every machine, give or take a grey level.

    Raises:
        StainDiffuserError: see :func:`staindiffuser.export.repository.build`.
    """
    graphs = demo_graphs()
    if fast:
        loaded = GraphSet.load(graphs)
        output = cache_folder() / "repositories" / f"{loaded.name}-fast-{choice_key(loaded, BuildOptions())[:16]}"
        return build(graphs, output, target=AUTO, progress=progress).repository
    if _has_bfloat16():
        progress("this processor has bfloat16: stain --fast and serve --fast measure which engines are fastest here")
    wanted = prepare_build(graphs)
    output = cache_folder() / "repositories" / f"{wanted.graphs.name}-{wanted.fingerprint[:16]}"
    return build(graphs, output, progress=progress).repository


def _has_bfloat16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
