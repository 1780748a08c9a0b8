"""The teacher: all branches of the dual-diffusion network, trained together by the EDM loss."""

from __future__ import annotations

import copy
import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from staindiffuser.training.checkpoint import tensors_sha256
from staindiffuser.training.config import ModelConfig, Task, TrainConfig
from staindiffuser.training.data.dataset import CropBatch
from staindiffuser.training.data.targets import NEGATIVE, POSITIVE
from staindiffuser.training.diffusion.edm import Uncertainty, draw_sigma, edm_loss
from staindiffuser.training.learner import Curves, Learner, Loss
from staindiffuser.training.model.branch import Branch
from staindiffuser.training.model.layers import normalize_weight_
from staindiffuser.training.model.network import DualDiffusion, he_to_network, standardize
from staindiffuser.training.model.pretrained import lite0_weights

__all__ = ["TASKS", "Teacher"]

TASKS: tuple[Task, ...] = ("images", "cells")

BANDS = {
    "error": (0.0, math.inf),
    "error_low_sigma": (0.0, 0.2),
    "error_middle_sigma": (0.2, 2.0),
    "error_high_sigma": (2.0, math.inf),
}
"""The curves of a branch's error: at all noise levels, and within bands of σ."""


class Teacher(Learner):
    """The network, its moving average, and one learned uncertainty per branch.

    Args:
        encoder: the state of a trained encoder, which is then kept as it is to the bit.
        start: the state of a trained network of this model, to begin with its weights.
    """

    net: DualDiffusion
    ema: DualDiffusion

    def __init__(
        self,
        model: ModelConfig,
        config: TrainConfig,
        *,
        encoder: dict[str, Tensor] | None = None,
        start: dict[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.config, self.tasks = config, config.tasks
        self.net = DualDiffusion(model)
        if start is not None:
            self.net.load_state_dict(start)
        elif self.net.encoder.backbone is not None and encoder is None:
            self.net.encoder.backbone.load_state_dict(lite0_weights())
        if encoder is not None:
            self.net.encoder.load_state_dict(encoder)
        self.trained: tuple[str, ...] = config.tasks if encoder is not None else ("encoder", *config.tasks)
        """The parts of the network that are trained."""
        for name, part in self.net.named_children():
            part.requires_grad_(name in self.trained)
        if self.net.encoder.backbone is not None:
            self.net.encoder.backbone.freeze(config.frozen_blocks)
        self.ema = copy.deepcopy(self.net).requires_grad_(False).eval()
        self.uncertainty = nn.ModuleDict({_key(t, s.name): Uncertainty() for s in model.stains for t in config.tasks})
        self.starts_from = {
            "model": dataclasses.asdict(model),
            "encoder": tensors_sha256(encoder.items()) if encoder is not None else None,
            "first weights": tensors_sha256(start.items()) if start is not None else None,
            "choice of tasks": list(config.tasks),
        }

    def forward(self, batch: CropBatch, step: int) -> Loss:
        """The loss is the sum over branches of the mean over samples, those without a branch's target counting 0; the
        errors are weighted and squared."""
        model, config = self.net.config, self.config
        features = self.net.encoder(he_to_network(batch.he))
        total = torch.zeros((), device=batch.he.device)
        errors, sigmas = {}, {}
        for s, stain in enumerate(model.stains):
            mask = batch.masks[:, s][:, None]
            for t, task in enumerate(TASKS):  # both tasks have their draws, so a task draws the same without the other
                if task not in self.tasks:
                    continue
                if task == "images":
                    target, valid = batch.images[:, s].permute(0, 3, 1, 2), None
                    noise, share = batch.noise[:, s, :3], config.image_max_share
                else:
                    target, valid = mask, ((mask <= NEGATIVE) | (mask >= POSITIVE)).float()
                    noise, share = batch.noise[:, s, 3:], config.cells_max_share
                key = _key(task, stain.name)
                draws = batch.draws[:, s, t]
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
                # A crop without this target teaches this branch nothing.
                total = total + (loss * batch.known[:, s, t]).mean()
        return Loss(value=total, errors=errors, sigmas=sigmas)

    def curves(self, loss: Loss) -> Curves:
        """Each branch's error, at all noise levels and within :data:`BANDS`."""
        shown = super().curves(dataclasses.replace(loss, errors={}))
        for key, error in loss.errors.items():
            for name, (low, high) in BANDS.items():
                inside = ((loss.sigmas[key] >= low) & (loss.sigmas[key] < high)).float()
                shown[f"{name}/{key}"] = torch.stack([(error.detach() * inside).sum(), inside.sum()])
        return shown

    def after_step(self, step: int) -> None:
        normalize_weight_(self.uncertainty, *(getattr(self.net, name) for name in self.trained))
        self._move_average([(getattr(self.ema, name), getattr(self.net, name)) for name in self.trained], step)
        if "cells" in self.trained:  # images where they are trained in the one step that they are used in: by distill
            for network in (self.net, self.ema):
                network.project_heads_("cells")

    def shard(self, mesh: DeviceMesh) -> None:
        """Split the encoder and every branch, which are gathered one at a time where they are used.

        The moving average is split in the same way, so that each process averages what it holds. Two processes on a
        CPU give the curve of one; this has not been run on GPUs.
        """
        for network in (self.net, self.ema):
            for part in (network.encoder, *network.images.values(), *network.cells.values()):
                fully_shard(part, mesh=mesh, reshard_after_forward=True)
                if isinstance(part, Branch):
                    register_fsdp_forward_method(part, "attend")
        for part in self.uncertainty.values():
            fully_shard(part, mesh=mesh)

    def averaged(self) -> DualDiffusion:
        state = self.ema.state_dict()
        if not any(isinstance(tensor, DTensor) for tensor in state.values()):
            return self.ema
        network = DualDiffusion(self.net.config)
        network.load_state_dict({n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in state.items()})
        return network.to(next(self.parameters()).device).requires_grad_(False).eval()


def _key(task: str, stain: str) -> str:
    return f"{task}-{stain}"
