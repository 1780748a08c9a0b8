"""A checkpoint folder (DESIGN, contract 2): safetensors weights, what they mean, how good they are, a card."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from staindiffuser.errors import UsageError
from staindiffuser.files import finite
from staindiffuser.training.config import ModelConfig, from_json
from staindiffuser.training.curves import CURVES
from staindiffuser.training.diffusion.samplers import START_SIGMAS
from staindiffuser.training.distill.gate import gate_lines, shown
from staindiffuser.training.errors import CheckpointError, ConfigError
from staindiffuser.training.model.network import DualDiffusion

__all__ = ["WEIGHTS", "Checkpoint", "CheckpointConfig", "model_card", "tensors_sha256"]

CONFIG, WEIGHTS, METRICS, CARD = "config.json", "model.safetensors", "metrics.json", "MODEL_CARD.md"
FORMAT = 3
"""2 said picture where 3 says image; 1 had the c_in of EDM, so its weights mean something else."""
NOTICE = (
    "The model was trained on {trained_on}. For research use only: what it paints has no medical meaning and must not "
    "be used for diagnosis."
)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """``config.json``."""

    name: str
    """The model's name, such as ``demo``."""
    model: ModelConfig
    notice: str
    """What every output of this model must say of itself."""
    tile: int = 512
    """Tile size it is served at unless an export says otherwise, pixels."""
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
    provenance: dict[str, Any] = field(default_factory=dict)
    """How the weights came to be: recipe, data, steps, time, versions."""
    format: int = FORMAT


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model in memory with its config; the network holds the EMA weights."""

    config: CheckpointConfig
    network: DualDiffusion
    metrics: dict[str, Any] = field(default_factory=dict)
    curves: Path | None = None
    """An image of how the training went, which the card shows."""

    def save(self, folder: Path, *, dtype: torch.dtype = torch.float16) -> None:
        """Write the folder; each file under a temporary name first, ``config.json`` last.

        Args:
            dtype: of the stored weights. The layers renormalise their weights, so half precision costs nothing
                that can be measured; the file is half as large.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{folder} cannot be written: {error.strerror}; choose another folder") from error
        state = {name: tensor.to(dtype).contiguous() for name, tensor in self.network.state_dict().items()}
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            draft = Path(temporary)
            save_file(state, draft / WEIGHTS)
            (draft / WEIGHTS).chmod(0o644)  # safetensors makes it private
            (draft / METRICS).write_text(json.dumps(finite(self.metrics), indent=1) + "\n")
            if self.curves:
                shutil.copyfile(self.curves, draft / CURVES)
            (draft / CARD).write_text(model_card(self.config, self.metrics, curves=bool(self.curves)))
            config = json.dumps(dataclasses.asdict(self.config), indent=1, ensure_ascii=False)
            (draft / CONFIG).write_text(config + "\n", encoding="utf-8")
            for name in (WEIGHTS, METRICS, *([CURVES] if self.curves else []), CARD, CONFIG):
                (draft / name).replace(folder / name)

    @classmethod
    def load(cls, folder: Path) -> Checkpoint:
        """Read a checkpoint folder into float32 on the CPU, in evaluation mode.

        Raises:
            CheckpointError: a file is missing or unreadable, or weights and config disagree.
        """
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder / name} is missing: {folder} is not a checkpoint folder")
        try:
            data = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            metrics = json.loads((folder / METRICS).read_text()) if (folder / METRICS).is_file() else {}
            state = load_file(folder / WEIGHTS)
        except Exception as error:
            raise CheckpointError(f"{folder} cannot be read: {error}") from error
        for name, value in ((CONFIG, data), (METRICS, metrics)):
            if not isinstance(value, dict):
                raise CheckpointError(f"{folder / name} must hold fields")
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
        if not isinstance(config.sigmas, dict) or not all(
            k.isdecimal() and isinstance(v, list | tuple) and len(v) == int(k) for k, v in config.sigmas.items()
        ):
            raise CheckpointError(f"{folder / CONFIG}: sigmas must be, per number of steps, as many noise levels")
        if str(config.steps) not in config.sigmas:
            raise CheckpointError(f"{folder / CONFIG}: steps is {config.steps}, but sigmas has none for it")
        config = dataclasses.replace(config, sigmas={k: tuple(v) for k, v in config.sigmas.items()})
        network = DualDiffusion(config.model)
        try:
            network.load_state_dict({name: tensor.float() for name, tensor in state.items()})
        except RuntimeError as error:
            first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
            raise CheckpointError(f"{folder / WEIGHTS} does not fit {CONFIG}: {first}") from None
        curves = folder / CURVES
        return cls(
            config=config,
            network=network.eval().requires_grad_(False),
            metrics=metrics,
            curves=curves if curves.is_file() else None,
        )


def _from_format_2(data: Any) -> Any:
    """``config.json`` of format 2 as format 3 has it: its fields said ``picture`` for ``image``."""
    if isinstance(data, dict):
        return {name.replace("picture", "image"): _from_format_2(value) for name, value in data.items()}
    return [_from_format_2(value) for value in data] if isinstance(data, list) else data


def tensors_sha256(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash of tensors: sorted name, dtype, shape, bytes (DESIGN, contract 3). 64 hex digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{name}\0{array.dtype}\0{tuple(array.shape)}\0".encode())
        digest.update(array.numpy().tobytes())
    return digest.hexdigest()


def model_card(config: CheckpointConfig, metrics: dict[str, Any], *, curves: bool = False) -> str:
    """``MODEL_CARD.md``: what it is, what it was trained on, how good it is, and what it must not be used for.

    Args:
        curves: show the image of the training's curves that lies beside it.
    """
    stains = ", ".join(f"{s.label} (`{s.name}`)" for s in config.model.stains)
    lines = [
        f"# {config.name}",
        "",
        f"**{config.notice}**",
        "",
        f"- Stains: {stains}",
        f"- Pixel size: {config.model.mpp} µm; served tile {config.tile} px with a margin of {config.margin} px",
        f"- Receptive radius: {config.receptive_radius} px in theory, {config.effective_radius} px in effect"
        " (influence above one grey level)",
        f"- Sampler steps: {config.steps}, at σ = {list(config.sigmas[str(config.steps)])}",
        "",
        "## How it was trained",
        "",
        *_account(config.provenance),
        "",
        *([f"![The curves of its last training]({CURVES})", ""] if curves else []),
    ]
    scores = metrics.get("stains", {})
    if scores:
        lines += [
            f"## Measured on {metrics.get('tiles')} tiles of the split `{metrics.get('split')}` "
            f"(sampler steps: {metrics.get('steps')}), none of which it was trained on",
            "",
            "| | " + " | ".join(scores) + " |",
            "|---" * (len(scores) + 1) + "|",
        ]
        for name in next(iter(scores.values())):
            values = (stain.get(name) for stain in scores.values())
            lines.append(f"| {name} | " + " | ".join(shown(v) for v in values) + " |")
        lines.append("")
    if "gate" in metrics:
        lines += gate_lines(metrics["gate"])
    return "\n".join(lines)


def _account(provenance: Mapping[str, Any], depth: int = 0) -> list[str]:
    """Bullets: a group of plain values is one line, a group of groups (what a run was begun with) a list of its own."""
    lines = []
    for key, value in provenance.items():
        bullet = f"{'  ' * depth}- {key}:"
        if not isinstance(value, Mapping):
            lines.append(f"{bullet} {value}")
        elif any(isinstance(part, Mapping) for part in value.values()):
            lines += [bullet, *_account(value, depth + 1)]
        else:
            lines.append(f"{bullet} " + ", ".join(f"{name} {part}" for name, part in value.items()))
    return lines
