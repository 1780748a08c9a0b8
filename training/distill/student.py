"""A few-step student: the teacher's network, of which only the image branches are trained."""

from __future__ import annotations

import copy
from typing import Literal, Protocol

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from staindiffuser.records import STRICT
from staindiffuser.training.checkpoint import tensors_sha256
from staindiffuser.training.config import StainConfig, TrainConfig
from staindiffuser.training.data.dataset import CropBatch
from staindiffuser.training.distill.e2e import OneStepLoss, forget_noise_
from staindiffuser.training.distill.ect import ConsistencyLoss, Denoise, Weighting
from staindiffuser.training.errors import ConfigError
from staindiffuser.training.learner import Learner, Loss
from staindiffuser.training.model.layers import normalize_weight_
from staindiffuser.training.model.network import DualDiffusion, he_to_network, standardize

__all__ = ["DistillConfig", "Method", "Student"]

Method = Literal["ect", "e2e"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DistillConfig(TrainConfig):
    """One distillation run."""

    steps: int = 1000
    learning_rate: float = 1e-3
    warmup: int = 100
    bf16: bool = False
    """Off: late stages of consistency tuning compare predictions that differ by less than bfloat16 resolves. One-step
    fine-tuning by the command does as its teacher's training did."""
    p_mean: float = -1.0
    """Mean of ln t (ours; ECT's are −1.1 and −0.8)."""
    p_std: float = 0.9
    """Standard deviation of ln t (ours; ECT's are 2.0 and 1.6): most draws are at the levels of the last steps."""
    image_max_share: float = 0.1
    """Share of the draws taken at σ_max, where every sampler starts (ours)."""
    white_glass: bool = True
    method: Method = "ect"
    """``ect``: easy consistency tuning; ``e2e``: end-to-end one-step fine-tuning."""
    stages: int = 3
    """Stages of consistency tuning, of equal length (ours; ECT has 4 and more, of which the last added nothing to a
    short run)."""
    q: float = 4.0
    """Factor by which each stage brings the two noise levels closer."""
    consistent_below: float = 1.5
    """At and above this noise level the student learns the expected image, as the teacher does (r = 0); below it, a
    consistent one (ours; a value above σ_max is ECT as published). The sampler's first step then gives the likely image
    and the next ones its detail: with our c_in the noise at σ_max is too faint to make an image from."""
    r_min: float = 0.1
    """Levels r below this count as 0: the target is the real image (ours; ECT has 0). Otherwise the noise left at r is
    passed on from level to level, and the student's images are grainy."""
    weighting: Weighting = "flat"
    """How the consistency loss weighs noise levels and samples (ECT: ``step``)."""
    density_weight: float = 3.0
    """Weight of the loss on the stains' optical densities of one-step fine-tuning; the pixel loss has 1 (ours)."""
    detail_weight: float = 30.0
    """Weight of the loss on local spectra of one-step fine-tuning; the pixel loss has 1 (ours; with 3 the radial power
    stayed below the gate's, with 30 the Dice was no worse)."""

    edge_weight: float = 3.0
    """Weight of the loss on edges of one-step fine-tuning; the pixel loss has 1 (ours)."""
    positive_weight: float = 2.0
    """Weight of positive pixels in both: a place is painted brown if it is positive with a probability above
    1 / (1 + this). With 2 that is a third, about where the F1 of CD3's and CK8/18's cells is best (ours)."""
    images_from: str = ""
    """Begin every stain's image branch with the teacher's of this stain: it knows nuclei, brown and glass already, and
    has only to learn where the brown is. By default each begins with its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stages < 1:
            raise ConfigError(f"stages is {self.stages}, must be at least 1")
        if not self.consistent_below > 0:
            raise ConfigError(f"consistent_below is {self.consistent_below}, must be positive")
        if not self.r_min >= 0:
            raise ConfigError(f"r_min is {self.r_min}, must not be negative")
        if self.q <= 1:
            raise ConfigError(f"q is {self.q}, must be above 1")
        for name in ("density_weight", "detail_weight", "edge_weight", "positive_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, must not be negative")


class StudentLoss(Protocol):
    """What a method minimises, for one stain: see :class:`ConsistencyLoss`."""

    def __call__(
        self, denoise: Denoise, y: Tensor, noise: Tensor, draws: Tensor, stain: StainConfig, step: int
    ) -> tuple[Tensor, Tensor]: ...


class Student(Learner):
    """The student and the moving average of its image branches.

    Encoder and cell branches are the teacher's, bit for bit: no gradient, no renormalisation, no averaging.
    """

    config: DistillConfig
    net: DualDiffusion
    ema: DualDiffusion

    def __init__(self, teacher: DualDiffusion, config: DistillConfig) -> None:
        super().__init__()
        self.config = config
        self.teacher_sha256 = tensors_sha256(teacher.state_dict().items())
        self.starts_from = {"teacher's weights": self.teacher_sha256}
        self.net = copy.deepcopy(teacher).requires_grad_(False)
        model = self.net.config
        if config.images_from:
            if config.images_from not in model.stain_names:
                raise ConfigError(f"images_from is {config.images_from}, must be one of {', '.join(model.stain_names)}")
            start = teacher.images[config.images_from].state_dict()
            for branch in self.net.images.values():
                branch.load_state_dict(start)
        self.net.images.requires_grad_(True)
        self.loss: StudentLoss
        if config.method == "e2e":
            forget_noise_(self.net.images)
            self.loss = OneStepLoss(
                sigma_max=model.sigma_max,
                sigma_data=model.sigma_data,
                density_weight=config.density_weight,
                detail_weight=config.detail_weight,
                edge_weight=config.edge_weight,
                positive_weight=config.positive_weight,
            )
        else:
            self.loss = ConsistencyLoss(
                steps=config.steps,
                stages=config.stages,
                q=config.q,
                p_mean=config.p_mean,
                p_std=config.p_std,
                max_share=config.image_max_share,
                consistent_below=config.consistent_below,
                r_min=config.r_min,
                sigma_min=model.sigma_min,
                sigma_max=model.sigma_max,
                sigma_data=model.sigma_data,
                weighting=config.weighting,
            )
        self.ema = copy.deepcopy(self.net).requires_grad_(False).eval()

    def forward(self, batch: CropBatch, step: int) -> Loss:
        """The loss is summed over stains; a stain's error is the distance between the pair of predictions, or to the
        real stain."""
        model = self.net.config
        with torch.no_grad():
            features = self.net.encoder(he_to_network(batch.he))
        total = torch.zeros((), device=batch.he.device)
        errors = {}
        for s, stain in enumerate(model.stains):
            image = batch.images[:, s].permute(0, 3, 1, 2).float() / 255
            loss, error = self.loss(
                self.net.denoiser("images", stain.name, features),
                standardize(image, stain, "images", model.sigma_data),
                batch.noise[:, s, :3],
                batch.draws[:, s, 0],
                stain,
                step,
            )
            known = batch.known[:, s, 0]
            total = total + (loss * known).mean()
            errors[f"images-{stain.name}"] = error * known
        return Loss(value=total, errors=errors)

    def after_step(self, step: int) -> None:
        normalize_weight_(self.net.images)
        self._move_average([(self.ema.images, self.net.images)], step)
        if self.config.method == "e2e":
            for network in (self.net, self.ema):
                network.project_heads_("images")

    def averaged(self) -> DualDiffusion:
        return self.ema
