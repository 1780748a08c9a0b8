"""One training step of all branches together, as a Lightning module: the teacher's recipe."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from staindiffuser.errors import StainDiffuserError
from staindiffuser.training.config import ModelConfig, TrainConfig
from staindiffuser.training.data.dataset import NEGATIVE, POSITIVE
from staindiffuser.training.diffusion.edm import Uncertainty, draw_sigma, edm_loss
from staindiffuser.training.model.layers import normalize_weight_
from staindiffuser.training.model.network import DualDiffusion, Task, he_to_network, standardize

__all__ = ["TASKS", "DivergedError", "TeacherModule", "learning_rate"]

TASKS: tuple[Task, ...] = ("pictures", "cells")


class DivergedError(StainDiffuserError):
    """The loss is not a number any more; the batch that did it is saved beside the run."""


def learning_rate(step: int, config: TrainConfig) -> float:
    """Factor of the peak learning rate: linear warm-up, constant, linear cool-down to zero (ours)."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    left = (config.steps - step) / max(1.0, config.cooldown * config.steps)
    return warm * max(0.0, min(1.0, left))


class TeacherModule(L.LightningModule):
    """The network, its moving average, and one learned uncertainty per branch."""

    def __init__(self, model: ModelConfig, config: TrainConfig) -> None:
        super().__init__()
        self.config = config
        self.net = DualDiffusion(model)
        self.ema = copy.deepcopy(self.net).requires_grad_(False).eval()
        self.uncertainty = nn.ModuleDict({_key(t, s.name): Uncertainty() for s in model.stains for t in TASKS})

    def losses(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """The loss of a batch; per branch the weighted squared error [B] and the noise levels [B] it was at.

        The loss is the sum over branches of the mean over samples.
        """
        model, config = self.net.config, self.config
        features = self.net.encoder(he_to_network(batch["he"]))
        total = torch.zeros((), device=batch["noise"].device)
        errors, sigmas = {}, {}
        for s, stain in enumerate(model.stains):
            mask = batch[f"{stain.name}_mask"][:, None]
            for t, task in enumerate(TASKS):
                if task == "pictures":
                    target, valid = batch[stain.name].permute(0, 3, 1, 2), None
                    noise, share = batch["noise"][:, s, :3], config.picture_max_share
                else:
                    target, valid = mask, ((mask <= NEGATIVE) | (mask >= POSITIVE)).float()
                    noise, share = batch["noise"][:, s, 3:], config.cells_max_share
                key = _key(task, stain.name)
                draws = batch["draws"][:, s, t]
                sigmas[key] = draw_sigma(
                    draws[:, 0],
                    draws[:, 1],
                    p_mean=config.p_mean,
                    p_std=config.p_std,
                    max_share=share,
                    sigma_max=model.sigma_max,
                )
                loss, errors[key] = edm_loss(
                    self.net.denoiser(task, stain.name, features),
                    standardize(target.float() / 255, stain, task, model.sigma_data),
                    noise,
                    sigmas[key],
                    self.uncertainty[key],  # type: ignore[arg-type]
                    valid,
                )
                total = total + loss.mean()
        return total, errors, sigmas

    def training_step(self, batch: dict[str, Any], _index: int) -> Tensor:
        loss, errors, sigmas = self.losses(batch)
        if not torch.isfinite(loss):
            self._refuse(batch)
        self.log("loss", loss, prog_bar=True)
        for key, error in errors.items():
            error = error.detach()
            self.log(f"error/{key}", error.mean())
            for name, low, high in (("low", 0.0, 0.2), ("middle", 0.2, 2.0), ("high", 2.0, 1e9)):
                inside = (sigmas[key] >= low) & (sigmas[key] < high)
                if inside.any():
                    self.log(f"error_{name}_sigma/{key}", error[inside].mean())
        return loss

    def _refuse(self, batch: dict[str, Any]) -> None:
        path = Path(self.trainer.default_root_dir) / "diverged-batch.pt"
        torch.save({"batch": batch, "step": self.global_step}, path)
        raise DivergedError(
            f"the loss is not finite at step {self.global_step}: the batch is in {path}; lower the learning rate"
        )

    def on_train_batch_end(self, *_: Any) -> None:
        normalize_weight_(self.net)
        normalize_weight_(self.uncertainty)
        n = self.global_step
        decay = min(self.config.ema, (1 + n) / (10 + n))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.net.parameters()), 1 - decay)

    def configure_optimizers(self) -> Any:
        parameters = [*self.net.parameters(), *self.uncertainty.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=self.config.learning_rate, betas=self.config.betas, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, self.config))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _key(task: str, stain: str) -> str:
    return f"{task}-{stain}"
