"""``manifest.json``: what a model repository holds, and the check that it still does.

Every file's SHA-256, and per engine what it was made from, for what, by what, and how far it is from torch. A server
is only started from a repository that :func:`verify` accepts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from staindiffuser.export import builders
from staindiffuser.export.builders import Device, Profile
from staindiffuser.export.description import ExportedStain, TensorSpec
from staindiffuser.export.errors import ManifestError
from staindiffuser.export.parity import EngineParity
from staindiffuser.files import file_sha256

__all__ = ["MANIFEST_JSON", "EngineRecord", "FileRecord", "Manifest", "PlanRecord", "hash_files", "verify"]

MANIFEST_JSON = "manifest.json"
FORMAT = 2
SAMPLER = "few-step"
"""x_1 = sigma_1 z_1; x_{i+1} = D(x_i, sigma_i) + sigma_{i+1} z_{i+1}; cells take one step."""


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """One file of the repository."""

    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class PlanRecord:
    """The same engine for another kind of GPU, built and checked there."""

    file: str
    """Path relative to the repository."""
    sha256: str
    bytes: int
    key: str
    device: Device
    parity: tuple[EngineParity, ...]


@dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """One engine: what it was made from, for what, by what, and how well it does."""

    file: str
    """Path relative to the repository."""
    sha256: str
    bytes: int
    key: str
    """Hash of what decides the engine's bytes: an engine with the same key is not built again."""
    weights_sha256: str
    graph_sha256: str
    sampler: str
    """Empty for the encoder, which has no noise level."""
    steps: int
    sigmas: tuple[float, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[Profile, ...]
    """Smallest, preferred and largest batch of each optimisation profile."""
    precision: str
    builder: str
    """Name and version, such as ``onnxruntime 1.22.0``."""
    device: Device
    parity: tuple[EngineParity, ...]
    """Against torch in float32, one entry a checked batch size."""
    others: tuple[PlanRecord, ...] = ()
    """Plans of other compute capabilities (native flavour only)."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything ``manifest.json`` says."""

    staindiffuser: str
    """Version of this package that wrote the repository."""
    target: str
    flavour: str
    """``python``: Triton's Python backend runs the engines; ``native``: its TensorRT backend does."""
    fingerprint: str
    """Hash of all that the repository was made from; the same fingerprint needs no second build."""
    model_name: str
    model_version: str
    notice: str
    checkpoint_sha256: str
    golden_sha256: str
    tile: int
    margin: int
    mpp: float
    steps: int
    sigmas: tuple[float, ...]
    precision: str
    max_batch: int
    batches: tuple[int, ...]
    """Batches that engines, CUDA graphs and queues are tuned for."""
    threads: int
    cuda_pool_bytes: int
    """What the server must be given (``--cuda-memory-pool-byte-size=<gpu>:<bytes>``), lest tensors between models fall
    back to host memory; 0 for a CPU."""
    stains: tuple[ExportedStain, ...]
    engines: Mapping[str, EngineRecord]
    files: Mapping[str, FileRecord]
    """Every file of the repository but this one, by its path with forward slashes."""

    def save(self, repository: Path) -> None:
        """Write ``manifest.json``, closed by a hash of its own content."""
        data = {"format": FORMAT, **dataclasses.asdict(self)}
        data["content_sha256"] = _content_sha256(data)
        text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
        (repository / MANIFEST_JSON).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, repository: Path) -> Manifest:
        """Read ``manifest.json`` without checking any other file.

        Raises:
            ManifestError: it is missing, malformed or of another format.
        """
        manifest, _ = _read(repository)
        return manifest


def verify(repository: Path, *, checkpoint: Path | None = None, environment: bool = True) -> Manifest:
    """Check a model repository against its manifest.

    Args:
        repository: the folder that ``export build`` wrote.
        checkpoint: a checkpoint folder that the engines must come from, or None.
        environment: also require the builder version and device that the engines were built and checked with.

    Returns:
        The manifest.

    Raises:
        ManifestError: names the file or the field that differs.
    """
    manifest, intact = _read(repository)
    _verify_files(repository, manifest.files)
    for name, engine in manifest.engines.items():
        _require(
            repository, f"engines.{name}.file", engine.file, engine.file if engine.file in manifest.files else None
        )
        record = manifest.files[engine.file]
        _require(repository, f"engines.{name}.sha256", engine.sha256, record.sha256)
        _require(repository, f"engines.{name}.bytes", engine.bytes, record.bytes)
        for other in engine.others:
            found = manifest.files.get(other.file)
            _require(repository, f"engines.{name}.others", other.sha256, found.sha256 if found else None)
        for field in ("steps", "sigmas"):
            if engine.sampler and name.startswith("stain_"):
                _require(repository, f"engines.{name}.{field}", getattr(engine, field), getattr(manifest, field))
        _require(repository, f"engines.{name}.precision", engine.precision, manifest.precision)
    _verify_parameters(repository, manifest)
    if environment:
        if manifest.target not in builders.TARGETS:
            raise ManifestError(
                f"{repository / MANIFEST_JSON}: target is {manifest.target}, but this version knows only "
                f"{', '.join(builders.TARGETS)}: build the repository again"
            )
        builder = builders.get(manifest.target)
        here = builder.device()
        for name, engine in manifest.engines.items():
            _require(repository, f"engines.{name}.builder", engine.builder, builder.version(), "here")
            _require(repository, f"engines.{name}.device.kind", engine.device.kind, here.kind, "here")
            if here.kind == "cuda" and here not in [other.device for other in engine.others]:
                _require(repository, f"engines.{name}.device", engine.device, here, "here")
    if checkpoint is not None:
        weights = checkpoint / "model.safetensors"
        if not weights.is_file():
            raise ManifestError(f"{weights} is missing: {repository} cannot be checked against that checkpoint")
        _require(repository, "checkpoint_sha256", manifest.checkpoint_sha256, file_sha256(weights), f"in {checkpoint}")
    if not intact:
        raise ManifestError(f"{repository / MANIFEST_JSON} was edited (content_sha256 differs): build it again")
    return manifest


def hash_files(repository: Path) -> dict[str, FileRecord]:
    """Hash every file under a folder but the manifest, by relative path."""
    return {
        path.relative_to(repository).as_posix(): FileRecord(sha256=file_sha256(path), bytes=path.stat().st_size)
        for path in sorted(repository.rglob("*"))
        if path.is_file() and path.name != MANIFEST_JSON
    }


def _read(repository: Path) -> tuple[Manifest, bool]:
    path = repository / MANIFEST_JSON
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ManifestError(
            f"{repository} is no model repository ({MANIFEST_JSON} is missing): write one with "
            "`staindiffuser export build GRAPHS --output REPO`"
        ) from None
    except (OSError, ValueError) as error:
        raise ManifestError(f"{path} cannot be read: {error}: build the repository again") from error
    try:
        intact = data.pop("content_sha256") == _content_sha256(data)
        if data.pop("format") != FORMAT:
            raise ValueError("another format")
        return _manifest(data), intact
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ManifestError(
            f"{path} is not one this version reads (format {FORMAT}): {error}: build it again"
        ) from error


def _manifest(data: dict[str, Any]) -> Manifest:
    data["stains"] = tuple(ExportedStain(**stain) for stain in data["stains"])
    data["sigmas"] = tuple(data["sigmas"])
    data["batches"] = tuple(data["batches"])
    data["files"] = {name: FileRecord(**record) for name, record in data["files"].items()}
    data["engines"] = {name: _engine(engine) for name, engine in data["engines"].items()}
    return Manifest(**data)


def _engine(data: dict[str, Any]) -> EngineRecord:
    parsed: dict[str, Any] = {
        "sigmas": tuple(data["sigmas"]),
        "profiles": tuple((smallest, preferred, largest) for smallest, preferred, largest in data["profiles"]),
        **_checked(data),
        "others": tuple(PlanRecord(**{**other, **_checked(other)}) for other in data["others"]),
    }
    for side in ("inputs", "outputs"):
        parsed[side] = tuple(
            TensorSpec(name=tensor["name"], dtype=tensor["dtype"], shape=tuple(tensor["shape"]))
            for tensor in data[side]
        )
    return EngineRecord(**{**data, **parsed})


def _checked(data: dict[str, Any]) -> dict[str, Any]:
    return {
        "device": Device(**data["device"]),
        "parity": tuple(EngineParity(**entry) for entry in data["parity"]),
    }


def _verify_files(repository: Path, expected: Mapping[str, FileRecord]) -> None:
    found = hash_files(repository)
    for name, record in expected.items():
        if name not in found:
            raise ManifestError(f"{repository / name} is missing: build the repository again")
        if found[name].sha256 != record.sha256:
            raise ManifestError(
                f"{repository / name} differs from {MANIFEST_JSON} (sha256): build the repository again"
            )
    for name in found:
        if name not in expected:
            raise ManifestError(
                f"{repository / name} is not in {MANIFEST_JSON}: remove it or build the repository again"
            )


def _verify_parameters(repository: Path, manifest: Manifest) -> None:
    """What the server tells its clients is what the manifest says."""
    from staindiffuser.export import triton_config

    path = repository / triton_config.ENSEMBLE / "config.pbtxt"
    try:
        told = triton_config.parse(path.read_text(encoding="utf-8")).parameters
    except (OSError, ValueError) as error:
        raise ManifestError(f"{path} cannot be read: {error}: build the repository again") from error
    for name, value in triton_config.contract_parameters(manifest, manifest.model_name).items():
        _require(repository, name, value, told[name].string_value, f"in {path.parent.name}/{path.name}")


def _require(repository: Path, field: str, recorded: object, actual: object, where: str = "in the repository") -> None:
    if recorded != actual:
        raise ManifestError(
            f"{repository / MANIFEST_JSON}: {field} is {recorded}, but {actual} {where}: build the repository again"
        )


def _content_sha256(data: Mapping[str, Any]) -> str:
    content = {name: value for name, value in data.items() if name != "content_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
