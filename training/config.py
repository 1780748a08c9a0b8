"""What a model is and how it is trained, as frozen data, and the presets. Validation errors name the field."""

from __future__ import annotations

import math
from dataclasses import field
from typing import Any, Literal, TypeVar

from pydantic.dataclasses import dataclass

from staindiffuser.records import STRICT, RecordError, decode
from staindiffuser.training.errors import ConfigError
from staindiffuser.training.tiles.stain_names import is_stain_name

__all__ = [
    "BACKBONE_CHANNELS",
    "LEVELS",
    "PRESETS",
    "Augmentation",
    "Backbone",
    "ModelConfig",
    "Preset",
    "StainConfig",
    "Task",
    "TrainConfig",
    "WidthConfig",
    "from_json",
]


Augmentation = Literal["light", "wide", "wider"]
"""How far the training crops differ from their tiles."""
Backbone = Literal["none", "efficientnet-lite0"]
"""Convolutions with published weights that stand beside the encoder's own; see ``model.pretrained``."""
Task = Literal["images", "cells"]
"""Which of a stain's two branches: its image, or its cells."""
BACKBONE_CHANNELS: dict[Backbone, tuple[int, ...]] = {"none": (0, 0, 0, 0), "efficientnet-lite0": (16, 24, 40, 112)}
"""Channels of a backbone's features per level."""
LEVELS = 4
"""Resolutions of the pyramid: 1/2, 1/4, 1/8, 1/16 of the tile."""


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"{name} is {value!r}, must be {allowed}")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WidthConfig:
    """Size of one network of the model."""

    channels: tuple[int, ...]
    """Channels per level, finest first; four levels."""
    blocks: int = 1
    """Residual blocks per level (in a UNet: on the way down and again on the way up)."""

    def __post_init__(self) -> None:
        _require(len(self.channels) == LEVELS, "channels", self.channels, f"{LEVELS} numbers, finest level first")
        _require(all(c > 0 and c % 8 == 0 for c in self.channels), "channels", self.channels, "multiples of 8")
        _require(self.blocks >= 1, "blocks", self.blocks, "at least 1")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StainConfig:
    """A stain and the constants that standardise its targets to mean 0 and standard deviation 0.5."""

    name: str
    """Matches ``[a-z][a-z0-9_]*``."""
    label: str
    """What is shown to people, such as ``CK8/18``."""
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Mean of the image, per channel, intensities in [0, 1]."""
    image_std: tuple[float, float, float] = (0.25, 0.25, 0.25)
    """Standard deviation of the image, per channel."""
    cells_mean: float = 0.5
    """Mean of the cell mask in [0, 1]."""
    cells_std: float = 0.5
    """Standard deviation of the cell mask."""

    def __post_init__(self) -> None:
        _require(is_stain_name(self.name), "name", self.name, "lower-case: [a-z][a-z0-9_]*")
        for name in ("image_mean", "image_std", "cells_mean", "cells_std"):
            value = getattr(self, name)
            values = value if isinstance(value, tuple) else (value,)
            _require(all(map(math.isfinite, values)), name, value, "finite")
            _require(name.endswith("mean") or min(values) > 0, name, value, "positive")

    def constants(self, task: Task) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation per channel of a task's targets, in [0, 1]."""
        if task == "images":
            return self.image_mean, self.image_std
        return (self.cells_mean,), (self.cells_std,)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    """The architecture and everything the numbers in a checkpoint need to mean something."""

    encoder: WidthConfig
    image: WidthConfig
    cells: WidthConfig
    backbone: Backbone = "none"
    """What stands beside the encoder's own pyramid; its features are appended to it."""
    embedding: int = 128
    """Channels of the noise-level embedding."""
    stains: tuple[StainConfig, ...] = ()
    mpp: float = 0.5
    """Pixel size, µm."""
    sigma_data: float = 0.5
    """Standard deviation of the standardised targets (EDM, Table 1)."""
    sigma_max: float = 80.0
    sigma_min: float = 0.002

    @property
    def features(self) -> tuple[int, ...]:
        """Channels of the encoder's features per level, those of the backbone included."""
        own = self.encoder.channels
        extra = BACKBONE_CHANNELS[self.backbone]
        return tuple(a + b for a, b in zip(own, extra, strict=True))

    @property
    def stain_names(self) -> tuple[str, ...]:
        """The stains' names, in order."""
        return tuple(stain.name for stain in self.stains)

    def __post_init__(self) -> None:
        names = self.stain_names
        _require(len(set(names)) == len(names), "stains", names, "unique names")
        _require(self.embedding >= 1, "embedding", self.embedding, "at least 1")
        _require(0 < self.mpp < math.inf, "mpp", self.mpp, "positive and finite (µm per pixel)")
        _require(0 < self.sigma_data < math.inf, "sigma_data", self.sigma_data, "positive and finite")
        _require(0 < self.sigma_min < self.sigma_max, "sigma_min", self.sigma_min, "between 0 and sigma_max")
        _require(self.sigma_max < math.inf, "sigma_max", self.sigma_max, "finite")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainConfig:
    """One training run."""

    steps: int = 4000
    """Optimiser steps."""
    batch: int = 8
    """Crops per step, over all processes and accumulated parts."""
    gradient_accumulation: int = 1
    """Parts that a step's crops are split into, one after the other, where memory does not hold them all at once."""
    crop: int = 128
    """Height and width of a training crop, pixels; a multiple of 16."""
    augmentation: Augmentation = "light"
    """What is done to a crop besides flips and rotations by 90 degrees: ``light`` jitters the H&E's colour channels by
    about a tenth; ``wide`` rotates, scales by 0.8 to 1.25, stains otherwise and scans otherwise (real tissue needs it);
    ``wider`` resamples every crop, goes further in colours and less far in size, for cells alone (images would become
    soft)."""
    tasks: tuple[Task, ...] = ("images", "cells")
    """Which branches of each stain are trained; the others keep the weights that they begin with. The cells alone cost
    a third, and an encoder that knows them is what images are then painted from (``distill --method e2e``)."""
    rare_share: float = 0.0
    """Share of the crops that are cut from tiles drawn by how much there is to tell in their masks, one stain as often
    as the other; the rest come from all tiles alike. Rare positives are not forgotten then."""
    exclusive: bool = False
    """No cell carries two of the stains: where a tile has no mask of a stain, the positive cells of the others are its
    negatives. So simulated epithelium, of which there are many kinds, teaches a stain that is not simulated."""
    confounders: float = 0.0
    """Share of the crops into which something is pasted that is of no stain, and that networks were seen to paint:
    blood, mucin, pen, tinted glass, keratin, folds."""
    mosaic: float = 0.0
    """Share of the crops that are put together of four (mosaic: Bochkovskiy et al. 2020, arXiv 2004.10934). A cell is
    then told by what it looks like, and not by the gland around it, which another tumour does not have."""
    jigsaw: float = 0.0
    """Share of the crops that are put together anew from pieces of a few cells: see ``data.jigsaw``."""
    white_glass: bool = False
    """Where the H&E shows bare glass, the stains' images that are learned from are white, whatever their scanner made
    of it; else a model paints the mean of its scanners' glass, and that stands out as a grey halo."""
    learning_rate: float = 1e-2
    """Peak learning rate of Adam (magnitude-preserving layers want a large one: EDM2, Table 6)."""
    backbone_rate: float = 0.05
    """The backbone's learning rate as a share of the others' (ours): its weights are not kept at unit magnitude."""
    frozen_blocks: int = 0
    """The backbone's stem and so many of its eleven blocks keep their published weights; at high resolution most of the
    time goes into their gradients."""
    warmup: int = 200
    """Steps of linear warm-up."""
    cooldown: float = 0.4
    """Share of the steps, at the end, over which the learning rate falls linearly to zero (ours)."""
    betas: tuple[float, float] = (0.9, 0.99)
    ema: float = 0.998
    """Decay of the moving average of the weights, ramped up as (1 + n) / (10 + n)."""
    p_mean: float = -0.4
    """Mean of ln σ (ours)."""
    p_std: float = 1.6
    """Standard deviation of ln σ."""
    image_max_share: float = 0.1
    """Share of the image draws taken at σ_max (ours)."""
    cells_max_share: float = 0.5
    """Share of the cell draws taken at σ_max (ours): the only noise level that the cell branch is used at."""
    bf16: bool = True
    """Run the convolutions in bfloat16, where the processor or GPU computes in it; elsewhere, and always for the
    preconditioning and the loss, in float32."""
    seed: int = 0
    workers: int = 1
    """Loader processes."""
    checkpoint_minutes: float = 5.0
    """Minutes between snapshots."""
    checkpoint_steps: int | None = None
    """Steps between snapshots, in addition, if given."""
    validate_every: int = 500
    """Steps between validations."""
    validation_tiles: int = 16
    """Number of tiles per validation, evenly spread over the split."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "gradient_accumulation", "validate_every", "validation_tiles"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        parts = self.gradient_accumulation
        _require(self.batch % parts == 0, "gradient_accumulation", parts, f"a divisor of batch ({self.batch})")
        every = self.checkpoint_steps
        _require(every is None or every >= 1, "checkpoint_steps", every, "at least 1, or not given")
        _require(self.crop >= 32 and self.crop % 16 == 0, "crop", self.crop, "a multiple of 16, at least 32")
        _require(0 < self.learning_rate < math.inf, "learning_rate", self.learning_rate, "positive and finite")
        _require(0 <= self.backbone_rate <= 1, "backbone_rate", self.backbone_rate, "between 0 and 1")
        once = len(set(self.tasks)) == len(self.tasks) > 0
        _require(once, "tasks", self.tasks, "images, cells, or both")
        sharp = self.augmentation != "wider" or "images" not in self.tasks
        _require(sharp, "augmentation", self.augmentation, "light or wide where images are trained: they would be soft")
        for name in ("warmup", "workers", "frozen_blocks"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        _require(0 <= self.seed < 2**32, "seed", self.seed, "between 0 and 2^32 - 1")
        pair = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        _require(pair, "betas", self.betas, "two numbers from 0 to below 1")
        _require(math.isfinite(self.p_mean), "p_mean", self.p_mean, "finite")
        _require(0 <= self.p_std < math.inf, "p_std", self.p_std, "finite and not negative")
        _require(self.checkpoint_minutes > 0, "checkpoint_minutes", self.checkpoint_minutes, "positive")
        _require(0 <= self.ema < 1, "ema", self.ema, "in [0, 1)")
        _require(0 <= self.cooldown <= 1, "cooldown", self.cooldown, "in [0, 1]")
        for name in ("image_max_share", "cells_max_share", "rare_share", "confounders", "mosaic", "jigsaw"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "a share between 0 and 1")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Preset:
    """A named size with the recipe that trains it."""

    model: ModelConfig
    train: TrainConfig = field(default_factory=TrainConfig)


def _model(encoder: tuple[int, ...], image: tuple[int, ...], *, blocks: int = 1, embedding: int = 128) -> ModelConfig:
    return ModelConfig(
        encoder=WidthConfig(channels=encoder, blocks=blocks),
        image=WidthConfig(channels=image, blocks=blocks),
        cells=WidthConfig(channels=tuple(-(-c // 16) * 8 for c in image), blocks=blocks),
        embedding=embedding,
    )


PRESETS: dict[str, Preset] = {
    "debug": Preset(
        model=_model((16, 16, 24, 32), (16, 16, 24, 32), embedding=32),
        train=TrainConfig(steps=60, batch=4, crop=64, warmup=10, validate_every=60, validation_tiles=4, workers=0),
    ),
    "demo": Preset(
        model=_model((32, 48, 64, 96), (32, 64, 96, 128)),
        # For two cores and an hour or two: noise levels are drawn around those of the two-step sampler (80 and 1.5),
        # since a short run learns the lowest ones last.
        train=TrainConfig(
            steps=10_000,
            batch=5,
            crop=128,
            learning_rate=1e-2,
            cooldown=0.6,
            p_mean=0.4,
            p_std=1.4,
            image_max_share=0.2,
            cells_max_share=0.7,
        ),
    ),
    "base": Preset(
        model=_model((64, 128, 192, 256), (144, 288, 432, 576), blocks=2, embedding=512),
        train=TrainConfig(steps=200_000, batch=64, crop=256, learning_rate=1e-2, warmup=5000, ema=0.9998, workers=8),
    ),
    "large": Preset(
        model=_model((96, 192, 256, 384), (192, 384, 512, 768), blocks=3, embedding=768),
        train=TrainConfig(steps=400_000, batch=128, crop=256, learning_rate=7e-3, warmup=10_000, ema=0.9999, workers=8),
    ),
}

T = TypeVar("T")


def from_json(cls: type[T], data: dict[str, Any], where: str) -> T:
    """Build a (nested) configuration from JSON data.

    Args:
        where: the file (and table) that the data come from, for the message.

    Raises:
        ConfigError: ``where`` and the field that is unknown, missing, of the wrong type or out of range.
    """
    try:
        return decode(cls, data)
    except (RecordError, ConfigError) as error:
        raise ConfigError(f"{where}: {error}") from None
