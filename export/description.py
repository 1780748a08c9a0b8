"""``graphs.json``: the contents of a graphs folder.

``staindiffuser export graphs`` (torch) writes the folder and ``staindiffuser export build`` (no torch) reads it: one
ONNX file per engine, ``golden.npz``, and this description. Shapes omit the batch dimension, which comes first and is
dynamic in every tensor.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path

from pydantic.dataclasses import dataclass

from staindiffuser.export.errors import GraphsError, ManifestError
from staindiffuser.files import file_sha256
from staindiffuser.records import STRICT, RecordError, decode, read_json

__all__ = [
    "GRAPHS_JSON",
    "INT8",
    "QUALITY",
    "EightBits",
    "EngineGraph",
    "ExportedStain",
    "GraphSet",
    "Quality",
    "TensorSpec",
]

GRAPHS_JSON = "graphs.json"
FORMAT = 1
INT8 = "int8"
"""The precision of the copies in 8 bits; what they leave in float is bfloat16."""
QUALITY = "quality"
"""The engine that judges tiles, and the prefix of the ones that judge stains: they decide no pixel."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TensorSpec:
    """One input or output of an engine."""

    name: str
    """Its name in the ONNX graph and on the wire: ``HE``, ``FEATURES_0``, ``NOISE``, ``STAIN_CD3``, …"""
    dtype: str
    """NumPy's name: ``uint8``, ``float16``, ``float32``, ``int64``."""
    shape: tuple[int, ...]
    """Without the batch dimension."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
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


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EightBits:
    """A copy of an engine's graph that computes in 8 bits; see :mod:`staindiffuser.export.int8`."""

    file: str
    """Path relative to the graphs folder."""
    graph_sha256: str
    """Of the file's bytes."""
    float_layers: tuple[str, ...]
    """Convolutions of residual blocks that stayed in float, because the image suffered."""
    dab_dice: float | None = None
    """Of a stain's image against the real stain, on fields that did not calibrate it."""
    dab_dice_fp32: float | None = None
    """The same of float32."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ExportedStain:
    """A stain's identifier (``ck818``) and its display name (``CK8/18``)."""

    name: str
    """Matches ``[a-z][a-z0-9_]*``."""
    label: str
    """The name shown to people."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Quality:
    """What the engines ``quality`` and ``quality_<stain>`` measure of each tile."""

    tile: tuple[str, ...]
    """Names of the values of ``QUALITY``, in order."""
    stain: tuple[str, ...]
    """Names of the values of ``QUALITY_<NAME>``, in order."""
    limits: Mapping[str, float]
    """Values above which a tile is flagged, by measure: see :mod:`staindiffuser.export.quality`."""
    reference: str
    """The tissue that ``unlike`` compares with, and how many tiles of it."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GraphSet:
    """The contents of ``graphs.json``."""

    name: str
    """The checkpoint's name, such as ``demo``."""
    notice: str
    """The statement that accompanies every output, such as "for research use only"."""
    checkpoint_sha256: str
    """Of the checkpoint's ``model.safetensors``."""
    tile: int
    """Height and width of a tile, pixels."""
    margin: int
    """Default context around the part of a tile that is kept, pixels."""
    mpp: float
    """Pixel size the model was trained at, µm per pixel."""
    steps: int
    """Sampler steps k of the image branches."""
    sigmas: tuple[float, ...]
    """Noise levels of those steps, highest first."""
    precision: str
    """Of the trunk: ``fp32``, ``fp16`` or ``bf16``."""
    stains: tuple[ExportedStain, ...]
    engines: Mapping[str, EngineGraph]
    """``he_encoder``, then ``stain_<name>`` and ``cells_<name>`` per stain, then what judges them."""
    golden_sha256: str
    """Of ``golden.npz``."""
    golden: str = "golden.npz"
    gate: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Per stain that the gate of ``distill`` judged at this number of steps, what it fails on; empty if it passed."""
    thresholds: Mapping[str, float] = field(default_factory=dict)
    """By stain, the probability from which on its cell map shows a cell; for the others, one half."""
    quality: Quality | None = None
    """None for graphs without the engines ``quality`` and ``quality_<name>``."""
    int8: Mapping[str, EightBits] = field(default_factory=dict)
    """Copies in 8 bits, by engine name; empty where ``export int8`` made none."""
    int8_reference: str = ""
    """The tissue that calibrated and judged them."""

    @property
    def model_version(self) -> str:
        """Hash of what determines the pixels: the engines' weights and graphs, and the sampler; 64 hex digits."""
        parts = [
            f"{name} {engine.weights_sha256} {engine.graph_sha256}"
            for name, engine in sorted(self.engines.items())
            if not name.startswith(QUALITY)
        ]
        parts.append(json.dumps([self.steps, list(self.sigmas), self.precision, self.tile, self.mpp]))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def at(self, precision: str) -> GraphSet:
        """These graphs as engines of a precision compute them; empty: their own.

        Raises:
            GraphsError: there are no copies in 8 bits.
        """
        if precision != INT8:
            return dataclasses.replace(self, precision=precision or self.precision)
        if not self.int8:
            raise GraphsError(f"the graphs of {self.name} have no copies in 8 bits: make them with `export int8`")
        engines = {
            name: dataclasses.replace(engine, file=copy.file, graph_sha256=copy.graph_sha256)
            if (copy := self.int8.get(name))
            else engine
            for name, engine in self.engines.items()
        }
        return dataclasses.replace(self, precision=precision, engines=engines)

    def save(self, folder: Path) -> None:
        """Write ``graphs.json`` into ``folder``."""
        data = {"format": FORMAT, **dataclasses.asdict(self)}
        (folder / GRAPHS_JSON).write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, *, verify: bool = True) -> GraphSet:
        """Read ``graphs.json`` from ``folder``; with ``verify``, also check the hash of every file it names.

        Raises:
            GraphsError: the description is missing or malformed; names the file and the field.
            ManifestError: a file is missing, or its bytes have changed.
        """
        path = folder / GRAPHS_JSON
        try:
            data = read_json(path)
            if data.pop("format", None) != FORMAT:
                raise RecordError(f"format: this version reads format {FORMAT} only")
            graphs = decode(cls, data)
        except FileNotFoundError:
            raise GraphsError(f"{path} is missing: write it with `staindiffuser export graphs CHECKPOINT`") from None
        except RecordError as error:
            raise GraphsError(f"{path}: {error}: export the graphs again") from error
        if verify:
            named: list[EngineGraph | EightBits] = [*graphs.engines.values(), *graphs.int8.values()]
            expected = {engine.file: engine.graph_sha256 for engine in named}
            for name, sha256 in {**expected, graphs.golden: graphs.golden_sha256}.items():
                if not (folder / name).is_file():
                    raise ManifestError(f"{folder / name} is missing: export the graphs again")
                if file_sha256(folder / name) != sha256:
                    raise ManifestError(f"{folder / name} differs from {GRAPHS_JSON} (sha256): export the graphs again")
        return graphs
