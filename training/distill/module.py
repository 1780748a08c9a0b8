"""A few-step student as a Lightning module: the teacher's network, of which the image branches alone are trained."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import lightning as L
import torch
from torch import Tensor

from staindiffuser.training.checkpoint import tensors_sha256
from staindiffuser.training.config import StainConfig, TrainConfig
from staindiffuser.training.distill.e2e import OneStepLoss, forget_noise_
from staindiffuser.training.distill.ect import ConsistencyLoss, Denoise, Weighting
from staindiffuser.training.errors import ConfigError
from staindiffuser.training.model.layers import normalize_weight_
from staindiffuser.training.model.network import DualDiffusion, he_to_network, standardize
from staindiffuser.training.module import learning_rate, stop_if_not_finite

__all__ = ["DistillConfig", "Method", "StudentModule"]

Method = Literal["ect", "e2e"]


@dataclass(frozen=True, kw_only=True)
class DistillConfig(TrainConfig):
    """One distillation run."""

    steps: int = 1000
    learning_rate: float = 1e-3
    warmup: int = 100
    bf16: bool = False
    """Off: late stages compare predictions that differ by less than bfloat16 can hold."""
    p_mean: float = -1.0
    """Mean of ln t (ours; ECT's are −1.1 and −0.8)."""
    p_std: float = 0.9
    """Its standard deviation (ours; ECT's are 2.0 and 1.6): most draws at the levels of the sampler's last steps."""
    image_max_share: float = 0.1
    """Share of the draws taken at σ_max, where every sampler starts (ours)."""
    method: Method = "ect"
    """``ect``: easy consistency tuning; ``e2e``: end-to-end one-step fine-tuning."""
    stages: int = 3
    """Stages of consistency tuning, of equal length (ours; ECT's are 4 and more: the last ones of a short run added
    nothing)."""
    q: float = 4.0
    """How much closer each stage brings the two noise levels."""
    consistent_below: float = 1.5
    """Noise level from which up the student goes on learning the expected image, as the teacher does (r = 0), and
    below which it learns a consistent one (ours; above σ_max is ECT as it was published). The sampler's first step then
    gives what is likely, and the next ones its detail: with our c_in the noise at σ_max is too faint to make an image
    from."""
    r_min: float = 0.1
    """Lower levels r below this are 0: the target is the real image (ours; ECT has 0). Otherwise the noise that is
    left at r is passed up from level to level, and the student's images are grainy."""
    weighting: Weighting = "flat"
    """How the consistency loss weighs noise levels and samples (ECT: ``step``)."""
    density_weight: float = 10.0
    """Weight of the optical-density loss of one-step fine-tuning, against that of the standardised pixels (ours)."""
    detail_weight: float = 30.0
    """Weight of one-step fine-tuning's loss on the local spectra, against that of the standardised pixels (ours; with 3
    the radial power stayed below the gate's, with 30 the Dice was no worse)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("method", get_args(Method)), ("weighting", get_args(Weighting))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}, must be one of {', '.join(allowed)}")
        if self.stages < 1:
            raise ConfigError(f"stages is {self.stages}, must be at least 1")
        if not self.consistent_below > 0:
            raise ConfigError(f"consistent_below is {self.consistent_below}, must be positive")
        if not self.r_min >= 0:
            raise ConfigError(f"r_min is {self.r_min}, must not be negative")
        if self.q <= 1:
            raise ConfigError(f"q is {self.q}, must be above 1")
        for name in ("density_weight", "detail_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, must not be negative")


class StudentLoss(Protocol):
    """What a method minimises, for one stain: see :class:`ConsistencyLoss`."""

    def __call__(
        self, denoise: Denoise, y: Tensor, noise: Tensor, draws: Tensor, stain: StainConfig, step: int
    ) -> tuple[Tensor, Tensor]: ...


class StudentModule(L.LightningModule):
    """The student and the moving average of its image branches.

    Encoder and cell branches are the teacher's, bit for bit: they get no gradient, no renormalisation, no averaging.
    """

    def __init__(self, teacher: DualDiffusion, config: DistillConfig) -> None:
        super().__init__()
        self.config = config
        self.teacher_sha256 = tensors_sha256(teacher.state_dict().items())
        self.starts_from = {"teacher's weights": self.teacher_sha256}
        self.net = copy.deepcopy(teacher).requires_grad_(False)
        self.net.images.requires_grad_(True)
        model = self.net.config
        self.loss: StudentLoss
        if config.method == "e2e":
            forget_noise_(self.net.images)
            self.loss = OneStepLoss(
                sigma_max=model.sigma_max,
                sigma_data=model.sigma_data,
                density_weight=config.density_weight,
                detail_weight=config.detail_weight,
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

    def losses(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch (summed over stains, mean over samples); per stain the distance [B] between the pair of
        predictions, or to the real stain."""
        model = self.net.config
        with torch.no_grad():
            features = self.net.encoder(he_to_network(batch["he"]))
        total = torch.zeros((), device=batch["noise"].device)
        distances = {}
        for s, stain in enumerate(model.stains):
            image = batch[stain.name].permute(0, 3, 1, 2).float() / 255
            loss, distances[stain.name] = self.loss(
                self.net.denoiser("images", stain.name, features),
                standardize(image, stain, "images", model.sigma_data),
                batch["noise"][:, s, :3],
                batch["draws"][:, s, 0],
                stain,
                self.global_step,
            )
            total = total + loss.mean()
        return total, distances

    def training_step(self, batch: dict[str, Any], _index: int) -> Tensor:
        loss, distances = self.losses(batch)
        stop_if_not_finite(self, loss, batch)
        self.log("loss", loss, prog_bar=True, sync_dist=True)
        for name, distance in distances.items():
            self.log(f"error/images-{name}", distance.mean(), sync_dist=True)
        return loss

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """The step, and what follows it: weights normalised, the average moved."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        normalize_weight_(self.net.images)
        step = self.global_step + 1  # Lightning counts this one only after this method
        decay = min(self.config.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.images.parameters()), list(self.net.images.parameters()), 1 - decay)

    def configure_optimizers(self) -> Any:
        config = self.config
        trained = [parameter for parameter in self.net.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=config.learning_rate, betas=config.betas, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, config))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
