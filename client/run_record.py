"""``run.json``: what was stained, with which model and options, how long it took, and what was written."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass

import staindiffuser
from staindiffuser.client.contract import ModelContract, ServedStain
from staindiffuser.client.errors import RunRecordError
from staindiffuser.client.quality import QualityRecord
from staindiffuser.client.scores import Scores
from staindiffuser.files import file_sha256
from staindiffuser.imaging.errors import SlideReadError
from staindiffuser.imaging.slides import DamagedRegion
from staindiffuser.records import STRICT, RecordError, decode, read_json

__all__ = [
    "FORMAT",
    "RUN_JSON",
    "SYNTHETIC",
    "InputRecord",
    "MaskRecord",
    "ModelRecord",
    "Request",
    "ResultRecord",
    "RunRecord",
    "Seconds",
    "ServerRecord",
    "TilesRecord",
    "description",
    "differences",
    "facts",
    "find_run",
    "gate_text",
    "library_versions",
    "model_record",
    "printable",
    "read_run",
    "slide_sha256",
    "utc_now",
    "write_run",
]

RUN_JSON = "run.json"
FORMAT = 3
SYNTHETIC = "Synthetic image, computed from H&E; research use only."
_LIBRARIES = (
    "imagecodecs",
    "numpy",
    "openslide-bin",
    "openslide-python",
    "pillow",
    "scikit-image",
    "scipy",
    "tifffile",
    "tritonclient",
)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class InputRecord:
    """The input slide or tile."""

    path: str | None
    """None unless names are kept: it may say who the patient is."""
    sha256: str
    """Of the file; of a slide of several files, see :func:`slide_sha256`."""
    bytes: int
    """Of all its files."""
    format: str
    """Its format and the library that read it, such as ``aperio (tifffile)``."""
    size: tuple[int, int]
    """Width and height at level 0, pixels."""
    mpp: tuple[float, float]
    """Pixel size at level 0, µm per pixel."""
    mpp_from: str
    """``file``, ``--mpp`` or ``--force-mpp``."""
    level_read: int


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelRecord:
    """The model; see :class:`~staindiffuser.client.contract.ModelContract` for the fields."""

    name: str
    version: str
    notice: str
    mpp: float
    steps: int
    tile: int
    margin: int
    gate: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Also empty in records of earlier versions."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Request:
    """Everything that determines the result, apart from the input's bytes."""

    model_version: str
    stains: tuple[str, ...]
    seed: int
    mpp: float | None
    """The pixel size given for a file without one, or instead of its own, µm per pixel."""
    cells: bool
    allow_damaged: bool
    preview: bool
    keep_names: bool = False
    nuclei: bool = True
    parquet: bool = False
    combined: bool = False
    formats: tuple[str, ...] = ()
    cells_from: str | None = None
    """SHA-256 of the file."""
    mask: str = "auto"
    """``auto``, ``none``, or the SHA-256 of the GeoJSON file."""
    save_mask: bool = False
    icc: str = "ignore"
    thresholds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """By stain, the user's or the model's, where they are not one half."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ResultRecord:
    """The geometry of the stained images."""

    size: tuple[int, int]
    """Width and height, pixels."""
    mpp: tuple[float, float]
    """µm per pixel."""
    resampled: bool
    """Whether the input was resampled to the model's pixel size."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MaskRecord:
    """What was found on the slide, as shares of its area; ``tissue_fraction`` is the share of the tissue that shows."""

    shown_fraction: float
    """What shows in the result: the tissue and what is near it, or the regions that were asked for."""
    pen_fraction: float
    """Marker pen, left out."""
    unscanned_fraction: float
    mpp: tuple[float, float]
    """Pixel size of ``tissue.png``, µm."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TilesRecord:
    """The grid of tiles, and how they were sent."""

    total: int
    stained: int
    side: int
    stride: int
    margin: int
    batch: int
    in_flight: int


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ServerRecord:
    """The server."""

    url: str
    version: str
    id: str = ""
    """Random identity of the server's start."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Seconds:
    """Wall-clock time of the run, and of its stages summed over threads: stages that overlap exceed the total."""

    total: float
    stages_summed_over_threads: dict[str, float]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RunRecord:
    """The contents of ``run.json``."""

    format: int
    notice: str
    """The statement that accompanies every output."""
    input: InputRecord
    model: ModelRecord
    request: Request
    stains: tuple[ServedStain, ...]
    seed: int
    steps: int
    result: ResultRecord
    tiles: TilesRecord
    resumed_rows: int
    """Rows of the result that earlier, interrupted runs had written; times are those of the last run."""
    damaged: tuple[DamagedRegion, ...]
    """Regions of the input that could not be decoded and are left out, in pixels of the level."""
    tissue_fraction: float
    mask: MaskRecord | None = None
    """None in records of earlier versions."""
    cells: dict[str, int]
    """Number of cells per stain label."""
    scores: Scores | None
    """The numbers of each stain; None without cells."""
    warnings: tuple[str, ...]
    server: ServerRecord
    started: str
    """UTC, ISO 8601."""
    seconds: Seconds
    versions: dict[str, str]
    """Of Python, this package and the libraries that touch the pixels."""
    outputs: dict[str, int]
    """Size in bytes of each other file of the result, by name."""
    quality: QualityRecord | None = None
    """What the server said about the tiles; None for a model that does not judge them."""

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"format: this version reads format {FORMAT}, not {self.format}")
        for name in self.outputs:
            if not name or Path(name).name != name:  # an edited record must not make --overwrite delete files elsewhere
                raise ValueError(f"outputs: {name!r} is not a plain file name")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as written to ``run.json``."""
        return dataclasses.asdict(self)


def read_run(folder: Path) -> RunRecord:
    """Read the ``run.json`` of a complete result.

    Raises:
        RunRecordError: it is missing or malformed; the message names the file and the field.
    """
    path = folder / RUN_JSON
    try:
        return decode(RunRecord, read_json(path))
    except FileNotFoundError:
        raise RunRecordError(f"{path} does not exist: {folder} does not hold a complete result") from None
    except RecordError as error:
        raise RunRecordError(f"{path} is not a record that this version reads: {error}") from error


def find_run(folder: Path) -> RunRecord | None:
    """The ``run.json`` of a result, or None if the folder has none.

    Raises:
        RunRecordError: it is malformed.
    """
    return read_run(folder) if (folder / RUN_JSON).exists() else None


def write_run(folder: Path, record: RunRecord) -> None:
    """Write ``run.json`` into ``folder``."""
    text = json.dumps(record.to_dict(), indent=1, ensure_ascii=False)
    (folder / RUN_JSON).write_text(text + "\n", encoding="utf-8")


def slide_sha256(files: Sequence[Path]) -> str:
    """SHA-256 of a slide: of its file, or of the lines ``<hash>  <path>`` of all its files.

    Paths are relative to the folder that holds them all.

    Raises:
        SlideReadError: a file cannot be read.
    """
    try:
        if len(files) == 1:
            return file_sha256(files[0])
        common = os.path.commonpath([path.parent for path in files])
        lines = [f"{file_sha256(path)}  {path.relative_to(common).as_posix()}\n" for path in files]
    except OSError as error:
        raise SlideReadError(f"{files[0]} cannot be read: {error.strerror or error}") from error
    return hashlib.sha256("".join(sorted(lines)).encode(errors="surrogateescape")).hexdigest()


def differences(before: Any, now: Any) -> list[str]:
    """What differs between two records of the same class, for people: ``seed 0 → 1``, ``stains cd3 → ck818``."""
    found = []
    for field in dataclasses.fields(before):
        old, new = getattr(before, field.name), getattr(now, field.name)
        if dataclasses.is_dataclass(old):
            found += differences(old, new)
        elif old != new:
            found.append(f"{field.name} {_brief(old)} → {_brief(new)}")
    return found


def _brief(value: object) -> str:
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return text if len(text) <= 24 else f"{text[:12]}…"


def printable(text: str) -> str:
    """The text with ``?`` for control characters, which neither XML nor a terminal line may hold."""
    return "".join(character if character.isprintable() else "?" for character in text)


def library_versions() -> dict[str, str]:
    """Versions of Python, this package and the libraries that touch the pixels."""
    found = {"staindiffuser": staindiffuser.__version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # OpenSlide may come from the system instead of its wheel
            found[name] = "not a package"
    return found


def utc_now() -> str:
    """The current time in UTC, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def model_record(contract: ModelContract) -> ModelRecord:
    """The part of the contract that identifies the model."""
    return ModelRecord(
        name=contract.model_name,
        version=contract.model_version,
        notice=contract.notice,
        mpp=contract.mpp,
        steps=contract.steps,
        tile=contract.tile,
        margin=contract.margin,
        gate=contract.gate,
    )


def gate_text(gate: Mapping[str, tuple[str, ...]], stains: Sequence[ServedStain]) -> str:
    """What the model's gate said of these stains, for people: ``passed``, ``not passed: CD3 (radial power 0.34)``.

    Args:
        gate: see :class:`~staindiffuser.client.contract.ModelContract`.
        stains: those that are meant.
    """
    failed = [f"{stain.label} ({', '.join(gate[stain.name])})" for stain in stains if gate.get(stain.name)]
    unknown = [stain.label for stain in stains if stain.name not in gate]
    parts = [f"not passed: {', '.join(failed)}"] if failed else []
    if unknown:
        parts.append(f"not judged: {', '.join(unknown)}" if gate else "not judged")
    return "; ".join(parts) or "passed"


def facts(contract: ModelContract, seed: int, source: str, stains: Sequence[ServedStain]) -> dict[str, str]:
    """What a file with these stains says about where it comes from, by name."""
    return {
        "model": f"{contract.model_name} {contract.model_version}",
        "gate": gate_text(contract.gate, stains),
        "steps": str(contract.steps),
        "seed": str(seed),
        "source": printable(source),
        "software": f"StainDiffuser {staindiffuser.__version__}",
    }


def description(contract: ModelContract, seed: int, source: str, stains: Sequence[ServedStain]) -> str:
    """The statement embedded in an image file of these stains."""
    parts = facts(contract, seed, source, stains)
    return " ".join([SYNTHETIC, contract.notice, *(f"{key}: {value};" for key, value in parts.items())])
