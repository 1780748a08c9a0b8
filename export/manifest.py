"""``manifest.json``: the contents of a model repository, and the check that they are unchanged.

The manifest records every file's SHA-256 and, for each engine, its source graph, target, builder and measured parity
with torch. A server starts only from a repository that :func:`verify` accepts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass

from staindiffuser.export import builders, wire
from staindiffuser.export.builders import Device, Profile
from staindiffuser.export.choosing import Choice
from staindiffuser.export.description import ExportedStain, Quality, TensorSpec
from staindiffuser.export.errors import ManifestError
from staindiffuser.export.parity import EngineParity
from staindiffuser.files import file_sha256
from staindiffuser.records import STRICT, RecordError, decode, read_json

__all__ = [
    "MANIFEST_JSON",
    "EngineRecord",
    "FileRecord",
    "Manifest",
    "PlanRecord",
    "content_sha256",
    "hash_files",
    "verify",
]

MANIFEST_JSON = "manifest.json"
FORMAT = 2
SAMPLER = "few-step"
"""x_1 = sigma_1 z_1; x_{i+1} = D(x_i, sigma_i) + sigma_{i+1} z_{i+1}; cells take one step."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FileRecord:
    """One file of the repository."""

    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PlanRecord:
    """The same engine as a TensorRT plan for another kind of GPU, built and checked there."""

    file: str
    """Path relative to the repository."""
    sha256: str
    bytes: int
    key: str
    device: Device
    parity: tuple[EngineParity, ...]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EngineRecord:
    """One engine: its source graph, its target, its builder and its parity with torch."""

    file: str
    """Path relative to the repository."""
    sha256: str
    bytes: int
    key: str
    """Hash of everything that determines the engine's bytes; an engine with the same key is reused."""
    weights_sha256: str
    graph_sha256: str
    sampler: str
    """Empty for the encoder, which has no sampler."""
    steps: int
    sigmas: tuple[float, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[Profile, ...]
    """Smallest, optimal and largest batch of each optimisation profile."""
    precision: str
    builder: str
    """Name and version, such as ``onnxruntime 1.22.0``."""
    device: Device
    parity: tuple[EngineParity, ...]
    """Against torch in float32, one entry per batch size checked."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What else determines the engine, such as ``tf32``: whether float32 convolutions may use TF32."""
    others: tuple[PlanRecord, ...] = ()
    """Plans of other compute capabilities (native flavour only)."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Manifest:
    """The contents of ``manifest.json``."""

    staindiffuser: str
    """Version of the package that wrote the repository."""
    target: str
    flavour: str
    """``python``: Triton's Python backend runs the engines; ``native``: its TensorRT backend does."""
    fingerprint: str
    """Hash of everything the repository was built from; a repository with the same fingerprint is up to date."""
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
    """Batch sizes that engines, CUDA graphs and queues are tuned for."""
    threads: int
    cuda_pool_bytes: int
    """For the server's ``--cuda-memory-pool-byte-size=<gpu>:<bytes>``; with less, tensors between models silently fall
    back to host memory. 0 for a CPU."""
    stains: tuple[ExportedStain, ...]
    engines: Mapping[str, EngineRecord]
    files: Mapping[str, FileRecord]
    """Every file of the repository except the manifest, by relative path with forward slashes."""
    gate: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Per stain that the checkpoint's gate judged, what it fails on; empty if it passed."""
    thresholds: Mapping[str, float] = field(default_factory=dict)
    """By stain, the probability from which on its cell map shows a cell; for the others, one half."""
    choice: Choice | None = None
    """What target ``auto`` measured before it chose; None where the target was named."""
    quality: Quality | None = None
    """What the server says about the quality of each tile; None if it does not."""

    def save(self, repository: Path) -> None:
        """Write ``manifest.json``, sealed with a hash of its own content."""
        data = {"format": FORMAT, **dataclasses.asdict(self)}
        data["content_sha256"] = content_sha256(data)
        text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
        (repository / MANIFEST_JSON).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, repository: Path) -> Manifest:
        """Read ``manifest.json`` without checking any other file.

        Raises:
            ManifestError: it is missing, malformed or in another format; names the file and the field.
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
        BuilderMissingError: this machine cannot run the engines (only with ``environment``).
    """
    manifest, intact = _read(repository)
    _verify_files(repository, manifest.files)
    _verify_engines(repository, manifest)
    _verify_parameters(repository, manifest)
    if environment:
        _verify_environment(repository, manifest)
    if checkpoint is not None:
        weights = checkpoint / "model.safetensors"
        if not weights.is_file():
            raise ManifestError(f"{weights} is missing: {repository} cannot be checked against that checkpoint")
        _require(repository, "checkpoint_sha256", manifest.checkpoint_sha256, file_sha256(weights), f"in {checkpoint}")
    if not intact:
        raise ManifestError(f"{repository / MANIFEST_JSON} was edited (content_sha256 differs): build it again")
    return manifest


def hash_files(repository: Path) -> dict[str, FileRecord]:
    """Hash every file under a folder except the manifest, by relative path."""
    return {
        path.relative_to(repository).as_posix(): FileRecord(sha256=file_sha256(path), bytes=path.stat().st_size)
        for path in sorted(repository.rglob("*"))
        if path.is_file() and path.name != MANIFEST_JSON
    }


def _read(repository: Path) -> tuple[Manifest, bool]:
    """The manifest, and whether its content has the hash that it was sealed with."""
    path = repository / MANIFEST_JSON
    try:
        data = read_json(path)
        sealed = data.pop("content_sha256", None)
        intact = sealed == content_sha256(data)
        if data.pop("format", None) != FORMAT:
            raise RecordError(f"format: this version reads format {FORMAT} only")
        return decode(Manifest, data), intact
    except FileNotFoundError:
        raise ManifestError(
            f"{repository} is not a model repository ({MANIFEST_JSON} is missing): write one with "
            "`staindiffuser export build GRAPHS --output REPO`"
        ) from None
    except RecordError as error:
        raise ManifestError(f"{path}: {error}: build the repository again") from error


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


def _verify_engines(repository: Path, manifest: Manifest) -> None:
    for name, engine in manifest.engines.items():
        record = manifest.files.get(engine.file)
        if record is None:
            _require(repository, f"engines.{name}.file", engine.file, None)
            continue
        _require(repository, f"engines.{name}.sha256", engine.sha256, record.sha256)
        _require(repository, f"engines.{name}.bytes", engine.bytes, record.bytes)
        for other in engine.others:
            found = manifest.files.get(other.file)
            _require(repository, f"engines.{name}.others", other.sha256, found.sha256 if found else None)
        if engine.sampler and name.startswith("stain_"):
            _require(repository, f"engines.{name}.steps", engine.steps, manifest.steps)
            _require(repository, f"engines.{name}.sigmas", engine.sigmas, manifest.sigmas)
        _require(repository, f"engines.{name}.precision", engine.precision, manifest.precision)


def _verify_environment(repository: Path, manifest: Manifest) -> None:
    """Builder and device are the ones that the engines were built and checked with."""
    if manifest.target not in builders.TARGETS:
        raise ManifestError(
            f"{repository / MANIFEST_JSON}: target is {manifest.target}, but this version knows only "
            f"{', '.join(builders.TARGETS)}: build the repository again"
        )
    builder = builders.get(manifest.target)
    here = builder.device()
    builder.require(manifest.precision)
    for name, engine in manifest.engines.items():
        _require(repository, f"engines.{name}.builder", engine.builder, builder.version(), "here")
        _require(repository, f"engines.{name}.device.kind", engine.device.kind, here.kind, "here")
        if here.kind == "cuda" and here not in [other.device for other in engine.others]:
            _require(repository, f"engines.{name}.device", engine.device, here, "here")


def _verify_parameters(repository: Path, manifest: Manifest) -> None:
    """The ensemble's parameters, from which clients learn the contract, agree with the manifest."""
    from staindiffuser.export import triton_config

    path = repository / wire.ENSEMBLE / "config.pbtxt"
    try:
        told = triton_config.parse(path.read_text(encoding="utf-8")).parameters
    except (OSError, ValueError) as error:
        raise ManifestError(f"{path} cannot be read: {error}: build the repository again") from error
    for name, value in wire.contract_parameters(manifest, manifest.model_name).items():
        _require(repository, name, value, told[name].string_value, f"in {path.parent.name}/{path.name}")


def _require(repository: Path, field: str, recorded: object, actual: object, where: str = "in the repository") -> None:
    if recorded != actual:
        raise ManifestError(
            f"{repository / MANIFEST_JSON}: {field} is {recorded}, but {actual} {where}: build the repository again"
        )


def content_sha256(data: Mapping[str, Any]) -> str:
    """The seal of a manifest: hash of its parsed JSON without the field ``content_sha256``."""
    content = {name: value for name, value in data.items() if name != "content_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
