"""Models that Triton runs; their files are copied into model repositories, and nothing here imports the project."""

from pathlib import Path

__all__ = ["engine_files", "noise_files", "origin_files", "pipeline_files"]

_FOLDER = Path(__file__).resolve().parent
_SHARED = tuple(_FOLDER / "shared" / name for name in ("gate.py", "cpus.py", "meters.py"))


def engine_files(runner: str) -> tuple[Path, ...]:
    """The files in the version folder of an engine's model, besides the engine; ``runner`` as in its parameters."""
    return (_FOLDER / "engine" / "model.py", _FOLDER / "engine" / f"{runner}.py", *_SHARED)


def noise_files() -> tuple[Path, ...]:
    """The files in the version folder of the noise model."""
    names = ("model.py", "philox.py", "philox_gpu.py", "philox.cu", "normal_quantiles.npy")
    return (*(_FOLDER / "noise" / name for name in names), *_SHARED)


def origin_files() -> tuple[Path, ...]:
    """The files that a model needs to check origins."""
    return (_FOLDER / "noise" / "philox.py",)


def pipeline_files(runner: str) -> tuple[Path, ...]:
    """The files in the version folder of the model that holds all engines in one process, besides the engines."""
    noise = [path for path in noise_files() if path.parent.name == "noise" and path.name != "model.py"]
    own = [_FOLDER / "shared" / name for name in ("request_log.py", "request_queue.py")]
    return (_FOLDER / "pipeline" / "model.py", _FOLDER / "engine" / f"{runner}.py", *noise, *_SHARED, *own)
