"""What a graphs folder holds, as data: ``graphs.json``.

A graphs folder is what ``staindiffuser export graphs`` (torch) hands to ``staindiffuser export build`` (no torch): one
ONNX file per engine, ``golden.npz``, and this description. Shapes are without the batch dimension, which comes first
and is dynamic in every tensor.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from staindiffuser.export.errors import GraphsError, ManifestError
from staindiffuser.files import file_sha256

__all__ = ["GRAPHS_JSON", "EngineGraph", "ExportedStain", "GraphSet", "TensorSpec"]

GRAPHS_JSON = "graphs.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output of an engine."""

    name: str
    """As in the ONNX graph and on the wire, such as ``HE``, ``FEATURES_0``, ``NOISE``, ``STAIN_CD3``."""
    dtype: str
    """NumPy's name: ``uint8``, ``float16``, ``float32``, ``int64``."""
    shape: tuple[int, ...]
    """Without the batch dimension."""


@dataclass(frozen=True, kw_only=True)
class EngineGraph:
    """One ONNX graph."""

    file: str
    """Path relative to the graphs folder."""
    graph_sha256: str
    """Of the file's bytes."""
    weights_sha256: str
    """Of this engine's own checkpoint tensors: sorted name, dtype, shape, bytes."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, kw_only=True)
class ExportedStain:
    """A stain as machines (``ck818``) and as people (``CK8/18``) name it."""

    name: str
    """Matches ``[a-z][a-z0-9_]*``."""
    label: str
    """What is shown to people."""


@dataclass(frozen=True, kw_only=True)
class GraphSet:
    """Everything ``graphs.json`` says."""

    name: str
    """The checkpoint's name, such as ``demo``."""
    notice: str
    """What every output must say of itself; a demonstration model says that it means nothing medically."""
    checkpoint_sha256: str
    """Of the checkpoint's ``model.safetensors``."""
    tile: int
    """Height and width of a tile, pixels."""
    margin: int
    """Default context around the part of a tile that is kept, pixels."""
    mpp: float
    """Pixel size the model was trained at, µm."""
    steps: int
    """Sampler steps k of the image branches."""
    sigmas: tuple[float, ...]
    """Noise levels of those steps, highest first."""
    precision: str
    """``fp32``, ``fp16`` or ``bf16``: the trunk's."""
    stains: tuple[ExportedStain, ...]
    engines: Mapping[str, EngineGraph]
    """``he_encoder``, then ``stain_<name>`` and ``cells_<name>`` per stain."""
    golden_sha256: str
    """Of ``golden.npz``."""
    golden: str = "golden.npz"

    @property
    def model_version(self) -> str:
        """Hash of what decides the pixels: every engine's weights and graph, and the sampler. 64 hex digits."""
        parts = [
            f"{name} {engine.weights_sha256} {engine.graph_sha256}" for name, engine in sorted(self.engines.items())
        ]
        parts.append(json.dumps([self.steps, list(self.sigmas), self.precision, self.tile, self.mpp]))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write ``graphs.json`` into ``folder``."""
        data = {"format": FORMAT, **dataclasses.asdict(self)}
        (folder / GRAPHS_JSON).write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, *, verify: bool = True) -> GraphSet:
        """Read ``graphs.json`` from ``folder``; with ``verify``, hash every file it names.

        Raises:
            GraphsError: the folder or the description is missing or malformed.
            ManifestError: a file is missing or its bytes are not those that were described.
        """
        path = folder / GRAPHS_JSON
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise GraphsError(f"{path} is missing: write it with `staindiffuser export graphs CHECKPOINT`") from None
        except (OSError, ValueError) as error:
            raise GraphsError(f"{path} cannot be read: {error}") from error
        try:
            graphs = cls._from_json(data)
        except (KeyError, TypeError, ValueError) as error:
            raise GraphsError(f"{path} is not a description this version reads (format {FORMAT}): {error}") from error
        if verify:
            expected = {engine.file: engine.graph_sha256 for engine in graphs.engines.values()}
            for name, sha256 in {**expected, graphs.golden: graphs.golden_sha256}.items():
                if not (folder / name).is_file():
                    raise ManifestError(f"{folder / name} is missing: export the graphs again")
                if file_sha256(folder / name) != sha256:
                    raise ManifestError(f"{folder / name} differs from {GRAPHS_JSON} (sha256): export the graphs again")
        return graphs

    @classmethod
    def _from_json(cls, data: dict[str, Any]) -> GraphSet:
        if data.pop("format") != FORMAT:
            raise ValueError("unknown format")
        data["sigmas"] = tuple(data["sigmas"])
        data["stains"] = tuple(ExportedStain(**stain) for stain in data["stains"])
        data["engines"] = {name: _engine(engine) for name, engine in data["engines"].items()}
        return cls(**data)


def _engine(data: dict[str, Any]) -> EngineGraph:
    tensors = {
        side: tuple(TensorSpec(name=t["name"], dtype=t["dtype"], shape=tuple(t["shape"])) for t in data[side])
        for side in ("inputs", "outputs")
    }
    return EngineGraph(**{**data, **tensors})
