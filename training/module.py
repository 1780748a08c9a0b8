"""One training step of all branches together, as a Lightning module: the teacher's recipe."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from staindiffuser.errors import StainDiffuserError
from staindiffuser.training.checkpoint import tensors_sha256
from staindiffuser.training.config import ModelConfig, TrainConfig
from staindiffuser.training.data.dataset import NEGATIVE, POSITIVE
from staindiffuser.training.diffusion.edm import Uncertainty, draw_sigma, edm_loss
from staindiffuser.training.model.branch import Branch
from staindiffuser.training.model.layers import normalize_weight_
from staindiffuser.training.model.network import DualDiffusion, Task, he_to_network, standardize

__all__ = ["TASKS", "DivergedError", "TeacherModule", "learning_rate", "stop_if_not_finite"]

TASKS: tuple[Task, ...] = ("images", "cells")


BANDS = {
    "error": (0.0, math.inf),
    "error_low_sigma": (0.0, 0.2),
    "error_middle_sigma": (0.2, 2.0),
    "error_high_sigma": (2.0, math.inf),
}
"""The curves of a branch's error: at all noise levels, and within bands of σ."""


class DivergedError(StainDiffuserError):
    """The loss is not a number any more; the batch that did it is saved beside the run."""


def learning_rate(step: int, config: TrainConfig) -> float:
    """Factor of the peak learning rate: linear warm-up, constant, linear cool-down to zero (ours)."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    left = (config.steps - step) / max(1.0, config.cooldown * config.steps)
    return warm * max(0.0, min(1.0, left))


def stop_if_not_finite(module: L.LightningModule, loss: Tensor, batch: dict[str, Any]) -> None:
    """Stop every process if any one's loss is not a number; that one saves its batch beside the run.

    Raises:
        DivergedError: naming the file.
    """
    finite = bool(torch.isfinite(loss))
    if module.trainer.strategy.reduce_boolean_decision(finite, all=True):
        return
    what = f"the loss is not finite at step {module.global_step}"
    if finite:
        raise DivergedError(f"{what} on another process, which names the batch")
    rank = f"-{module.global_rank}" if module.global_rank else ""
    path = Path(module.trainer.default_root_dir) / f"diverged-batch{rank}.pt"
    torch.save({"batch": batch, "step": module.global_step}, path)
    raise DivergedError(f"{what}: the batch is in {path}; choose another --output with a lower learning rate")


class TeacherModule(L.LightningModule):
    """The network, its moving average, and one learned uncertainty per branch.

    Args:
        tasks: the branches that are trained, of each stain; the others keep their first weights.
        encoder: the state of a trained encoder, which is then left as it is to the bit.
        start: the state of a trained network of this model, whose weights are begun with.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: TrainConfig,
        *,
        tasks: tuple[Task, ...] = TASKS,
        encoder: dict[str, Tensor] | None = None,
        start: dict[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.config, self.tasks = config, tasks
        self.net = DualDiffusion(model)
        if start is not None:
            self.net.load_state_dict(start)
        if encoder is not None:
            self.net.encoder.load_state_dict(encoder)
        self.trained: tuple[str, ...] = tasks if encoder is not None else ("encoder", *tasks)
        """The parts of the network that are trained."""
        for name, part in self.net.named_children():
            part.requires_grad_(name in self.trained)
        self.ema = copy.deepcopy(self.net).requires_grad_(False).eval()
        self.uncertainty = nn.ModuleDict({_key(t, s.name): Uncertainty() for s in model.stains for t in tasks})
        self.starts_from: dict[str, Any] = {
            "model or other data": dataclasses.asdict(model),
            "encoder": tensors_sha256(encoder.items()) if encoder is not None else None,
            "first weights": tensors_sha256(start.items()) if start is not None else None,
            "choice of tasks": tasks,
        }
        """What a resumed run must share with the one that it goes on from."""
        self.shared = False
        """Whether each process holds only a share of the weights."""
        self._sums: dict[str, Tensor] = {}

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
            for t, task in enumerate(TASKS):  # the draws are of both tasks, so that they are the same without one
                if task not in self.tasks:
                    continue
                if task == "images":
                    target, valid = batch[stain.name].permute(0, 3, 1, 2), None
                    noise, share = batch["noise"][:, s, :3], config.image_max_share
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
        stop_if_not_finite(self, loss, batch)
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a helper of Lightning's
        if (self.global_step + 1) % every == 0:
            self._collect(loss, errors, sigmas)
        self.log("loss", loss, prog_bar=True, logger=False)
        return loss

    def _collect(self, loss: Tensor, errors: dict[str, Tensor], sigmas: dict[str, Tensor]) -> None:
        """Add what the curves show, as (sum, count), to what other parts of the same step gave."""
        found = {"loss": torch.stack([loss.detach(), torch.ones_like(loss)])}
        for key, error in errors.items():
            for name, (low, high) in BANDS.items():
                inside = ((sigmas[key] >= low) & (sigmas[key] < high)).float()
                found[f"{name}/{key}"] = torch.stack([(error.detach() * inside).sum(), inside.sum()])
        self._sums = {name: value + self._sums.get(name, 0) for name, value in found.items()}

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """The step, and what follows it: weights normalised, the average moved, a line of the curves."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        step = self.global_step + 1  # Lightning counts this one only after this method
        normalize_weight_(self.uncertainty)
        decay = min(self.config.ema, (1 + step) / (10 + step))
        for name in self.trained:
            part, average = getattr(self.net, name), getattr(self.ema, name)
            normalize_weight_(part)
            with torch.no_grad():
                torch._foreach_lerp_(_local(average), _local(part), 1 - decay)
        if self._sums:
            sums = self.trainer.strategy.reduce(torch.stack(list(self._sums.values())), reduce_op="sum").tolist()
            values = {name: total / n for name, (total, n) in zip(self._sums, sums, strict=True) if n}
            for logger in self.trainer.loggers:
                logger.log_metrics(values, step=step)
            self._sums = {}

    def configure_model(self) -> None:
        """Share the weights over the processes, if that is asked for (FSDP2: ``--strategy fsdp``).

        The encoder and every branch are gathered one at a time, where they are used. The moving average is shared in
        the same way, so that each process averages what it holds. Two processes on a CPU give the curve of one; on
        GPUs this has not been run.
        """
        if self.shared or not isinstance(self.trainer.strategy, ModelParallelStrategy):
            return
        mesh = self.trainer.strategy.device_mesh["data_parallel"]
        for network in (self.net, self.ema):
            for part in (network.encoder, *network.images.values(), *network.cells.values()):
                fully_shard(part, mesh=mesh, reshard_after_forward=True)
                if isinstance(part, Branch):
                    register_fsdp_forward_method(part, "attend")
        for part in self.uncertainty.values():
            fully_shard(part, mesh=mesh)
        self.shared = True

    def averaged(self) -> DualDiffusion:
        """The moving average as a plain network; where the weights are shared, every process must call this."""
        if not self.shared:
            return self.ema
        network = DualDiffusion(self.net.config)
        state = self.ema.state_dict()
        network.load_state_dict({n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in state.items()})
        return network.to(self.device).requires_grad_(False).eval()

    def configure_optimizers(self) -> Any:
        parameters = [p for part in (self.net, self.uncertainty) for p in part.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr=self.config.learning_rate, betas=self.config.betas, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, self.config))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _local(module: nn.Module) -> list[Tensor]:
    """What this process holds of a module's parameters."""
    return [p.to_local() if isinstance(p, DTensor) else p.data for p in module.parameters()]


def _key(task: str, stain: str) -> str:
    return f"{task}-{stain}"
