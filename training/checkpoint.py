"""A checkpoint folder: safetensors weights, the configuration that gives them meaning, scores, and a model card."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

import torch
from pydantic.dataclasses import dataclass
from safetensors.torch import load_file, save
from torch import Tensor

from staindiffuser.errors import UsageError
from staindiffuser.files import finite
from staindiffuser.records import STRICT, RecordError, read_json
from staindiffuser.training.config import ModelConfig, from_json
from staindiffuser.training.curves import CURVES
from staindiffuser.training.diffusion.samplers import START_SIGMAS
from staindiffuser.training.errors import CheckpointError, ConfigError, DivergedError
from staindiffuser.training.model.network import DualDiffusion
from staindiffuser.training.model_card import CARD, model_card
from staindiffuser.training.tiles.seen import SEEN_JSON, SeenTiles

__all__ = ["WEIGHTS", "Checkpoint", "CheckpointConfig", "not_finite", "tensors_sha256"]

CONFIG, WEIGHTS, METRICS = "config.json", "model.safetensors", "metrics.json"
FORMAT = 3
"""2 said ``picture`` for ``image`` and ``accumulate`` for ``gradient_accumulation``; 1 had the c_in of EDM, so its
weights mean something else."""
NOTICE = (
    "The model was trained on {trained_on}. For research use only: what it paints has no medical meaning and must not "
    "be used for diagnosis."
)
_DRAFT = ".partial-"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointConfig:
    """``config.json``."""

    name: str
    """The model's name, such as ``demo``."""
    model: ModelConfig
    notice: str
    """The statement that accompanies every output of this model."""
    tile: int = 512
    """Tile size it is served at unless an export says otherwise, pixels; a multiple of 16."""
    margin: int = 64
    """Context cropped from each side of a served tile, pixels; a multiple of 16."""
    receptive_radius: int = 0
    """Largest distance at which an input pixel can reach an output pixel, pixels (from the architecture)."""
    effective_radius: int = 0
    """Distance beyond which context changes the result by less than one grey level (measured)."""
    steps: int = 2
    """Sampler steps k that the checkpoint is meant to be served with."""
    sigmas: dict[str, tuple[float, ...]] = field(
        default_factory=lambda: {str(k): sigmas for k, sigmas in START_SIGMAS.items()}
    )
    """Noise levels of the few-step sampler, by number of steps."""
    temperatures: dict[str, float] = field(default_factory=dict)
    """By what the logit of a stain's cell map is divided (``evaluate --calibrate``), by the stain's name; else 1."""
    thresholds: dict[str, float] = field(default_factory=dict)
    """Probability from which on a stain's cell map shows a cell (``evaluate --thresholds``), by its name; else 0.5."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """How the weights were made: recipe, data, steps, time, versions."""
    format: int = FORMAT

    def __post_init__(self) -> None:
        for name, lowest in (("tile", 32), ("margin", 0)):
            value = getattr(self, name)
            if value < lowest or value % 16:
                raise ConfigError(f"{name} is {value}, must be a multiple of 16, at least {lowest}")
        if 2 * self.margin >= self.tile:
            raise ConfigError(f"margin is {self.margin}, must be less than half of tile ({self.tile})")
        for k, sigmas in self.sigmas.items():
            if not k.isdecimal() or len(sigmas) != int(k) or not all(0 < sigma < math.inf for sigma in sigmas):
                raise ConfigError("sigmas must be, per number of steps, as many positive noise levels")
        for stain, temperature in self.temperatures.items():
            if stain not in self.model.stain_names or not 0 < temperature < math.inf:
                raise ConfigError(
                    f"temperatures: {stain} {temperature}: must be positive numbers of the model's stains"
                )
        for stain, threshold in self.thresholds.items():
            if stain not in self.model.stain_names or not 0 < threshold < 1:
                raise ConfigError(f"thresholds: {stain} {threshold}: must be between 0 and 1, of the model's stains")
        if str(self.steps) not in self.sigmas:
            raise ConfigError(f"steps is {self.steps}, but sigmas has none for it")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model in memory with its configuration; the network holds the moving average of the weights."""

    config: CheckpointConfig
    network: DualDiffusion
    metrics: dict[str, Any] = field(default_factory=dict)
    curves: Path | None = None
    """An image of the training curves, for the card."""
    seen: SeenTiles | None = None
    """The tiles it was trained on; None if that is not known."""

    def save(self, folder: Path, *, dtype: torch.dtype = torch.float16) -> None:
        """Write the folder; each file under a temporary name first, ``config.json`` last.

        Args:
            dtype: of the stored weights. The layers renormalise their weights, so half precision costs nothing
                that can be measured; the file is half as large.

        Raises:
            DivergedError: a weight is not finite; nothing is written.
            UsageError: the folder cannot be written, or the disk is full; what was there before stays.
        """
        state = {name: tensor.to(dtype).contiguous() for name, tensor in self.network.state_dict().items()}
        if bad := not_finite(state):
            raise DivergedError(f"{folder} is not written: {bad}; train again with a lower learning rate")
        texts = {
            METRICS: json.dumps(finite(self.metrics), indent=1) + "\n",
            CARD: model_card(self.config, self.metrics, curves=bool(self.curves)),
            CONFIG: json.dumps(dataclasses.asdict(self.config), indent=1, ensure_ascii=False) + "\n",
        }
        if self.seen:
            texts = {SEEN_JSON: self.seen.to_json(), **texts}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for stale in folder.glob(f"{_DRAFT}*"):  # of a process that was killed
                shutil.rmtree(stale)
            with tempfile.TemporaryDirectory(dir=folder, prefix=_DRAFT) as temporary:
                draft = Path(temporary)
                (draft / WEIGHTS).write_bytes(save(state))
                if self.curves:
                    shutil.copyfile(self.curves, draft / CURVES)
                for name, text in texts.items():
                    (draft / name).write_text(text, encoding="utf-8")
                for name in (WEIGHTS, *([CURVES] if self.curves else []), *texts):
                    (draft / name).replace(folder / name)
        except OSError as error:
            raise UsageError(
                f"{folder} cannot be written: {error.strerror}; make room, or choose another folder"
            ) from error

    @classmethod
    def load(cls, folder: Path) -> Checkpoint:
        """Read a checkpoint folder into float32 on the CPU, in evaluation mode.

        Raises:
            CheckpointError: a file is missing or unreadable, weights and configuration disagree, or a weight is not
                finite.
        """
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder / name} is missing: {folder} is not a checkpoint folder")
        data = _read(folder / CONFIG)
        metrics = _read(folder / METRICS) if (folder / METRICS).is_file() else {}
        try:
            seen = SeenTiles.read(folder / SEEN_JSON)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{folder / SEEN_JSON} cannot be read: {error}") from error
        try:
            state = load_file(folder / WEIGHTS)
        except Exception as error:
            raise CheckpointError(f"{folder / WEIGHTS} cannot be read: {error}") from error
        if bad := not_finite(state):
            raise CheckpointError(f"{folder / WEIGHTS}: {bad}: the training had diverged; use another checkpoint")
        if data.get("format") == 2:
            data = {**_from_format_2(data), "format": FORMAT}
            state = {name.replace("pictures.", "images.", 1): tensor for name, tensor in state.items()}
        if data.get("format") != FORMAT:
            raise CheckpointError(
                f"{folder / CONFIG}: format is {data.get('format')!r}, this version reads 2 and {FORMAT}"
            )
        try:
            config = from_json(CheckpointConfig, data, str(folder / CONFIG))
        except ConfigError as error:
            raise CheckpointError(str(error)) from None
        network = DualDiffusion(config.model)
        try:
            network.load_state_dict({name: tensor.float() for name, tensor in state.items()})
        except RuntimeError as error:
            first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
            raise CheckpointError(f"{folder / WEIGHTS} does not fit {CONFIG}: {first}") from None
        network.temperatures = dict(config.temperatures)
        curves = folder / CURVES
        return cls(
            config=config,
            network=network.eval().requires_grad_(False),
            metrics=metrics,
            curves=curves if curves.is_file() else None,
            seen=seen,
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except RecordError as error:
        raise CheckpointError(f"{path} {error}") from error


_RENAMED = {"accumulate": "gradient_accumulation"}


def _from_format_2(data: Any) -> Any:
    """``config.json`` of format 2 with the names of format 3."""
    if isinstance(data, dict):
        return {
            _RENAMED.get(name, name.replace("picture", "image")): _from_format_2(value) for name, value in data.items()
        }
    return [_from_format_2(value) for value in data] if isinstance(data, list) else data


def not_finite(state: Mapping[str, Tensor]) -> str | None:
    """Which tensors hold NaN or infinity, in words; None if all are finite."""
    bad = [n for n, tensor in state.items() if tensor.is_floating_point() and not bool(tensor.isfinite().all())]
    return f"{len(bad)} of {len(state)} tensors are not finite ({bad[0]}, …)" if bad else None


def tensors_sha256(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash of tensors: sorted name, dtype, shape, bytes. 64 hex digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{name}\0{array.dtype}\0{tuple(array.shape)}\0".encode())
        digest.update(array.numpy().tobytes())
    return digest.hexdigest()
