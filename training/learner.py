"""What the loop trains: a network, the moving average of its weights, and the loss of a batch."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from staindiffuser.errors import UsageError
from staindiffuser.training.config import TrainConfig
from staindiffuser.training.data.dataset import CropBatch

__all__ = ["Curves", "Learner", "Loss", "learning_rate"]

Curves = dict[str, Tensor]
"""Name of a curve → its sum and the number of values in it, [2]; parts of a step and processes add up."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The loss of a batch, and what is shown of it."""

    value: Tensor
    """Scalar, with its graph."""
    errors: dict[str, Tensor] = field(default_factory=dict)
    """Per branch a measure of its error, of each sample [B]."""
    sigmas: dict[str, Tensor] = field(default_factory=dict)
    """Per branch the noise levels of the samples [B]."""


class Learner(nn.Module, abc.ABC):
    """A network under training. Its state dict, with that of its optimiser, is all that a snapshot needs.

    forward: a batch and the optimiser step → :class:`Loss`
    """

    config: TrainConfig
    net: nn.Module
    """What is trained."""
    ema: nn.Module
    """The moving average of its weights: what is validated and saved."""
    starts_from: dict[str, Any]
    """What a resumed run must have in common with the one that left the snapshot; JSON data."""

    @abc.abstractmethod
    def forward(self, batch: CropBatch, step: int) -> Loss: ...

    @abc.abstractmethod
    def after_step(self, step: int) -> None:
        """Called when the optimiser has done ``step`` steps: normalise the weights, move the average."""

    def optimizer(self) -> torch.optim.Optimizer:
        """Adam over all that is trained, at the peak learning rate; a backbone has a lower one."""
        trained = [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]
        config, slow = self.config, [parameter for name, parameter in trained if ".backbone." in name]
        groups: list[dict[str, Any]] = [{"params": [p for name, p in trained if ".backbone." not in name]}]
        if slow:
            groups.append({"params": slow, "lr": config.learning_rate * config.backbone_rate})
        return torch.optim.Adam(groups, lr=config.learning_rate, betas=config.betas, fused=True)

    def curves(self, loss: Loss) -> Curves:
        """What the curves show of a batch."""
        shown = {"loss": torch.stack([loss.value.detach(), torch.ones_like(loss.value)])}
        for name, error in loss.errors.items():
            shown[f"error/{name}"] = torch.stack([error.detach().sum(), torch.full_like(error[0], len(error))])
        return shown

    def shard(self, mesh: DeviceMesh) -> None:
        """Split the weights over the processes of ``mesh`` (FSDP2).

        Raises:
            UsageError: this kind of network cannot be split.
        """
        raise UsageError(f"--strategy fsdp: {type(self).__name__} cannot split its weights over processes; use ddp")

    def averaged(self) -> nn.Module:
        """The moving average as a plain network; where the weights are split, every process must call this."""
        return self.ema

    def _move_average(self, parts: Sequence[tuple[nn.Module, nn.Module]], step: int) -> None:
        """Move the averages of (average, trained) towards the weights; the decay is ramped up as (1 + n) / (10 + n)."""
        decay = min(self.config.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for average, trained in parts:
                torch._foreach_lerp_(_local(average), _local(trained), 1 - decay)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Factor of the peak learning rate: linear warm-up, constant, linear cool-down to zero (ours)."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    left = (config.steps - step) / max(1.0, config.cooldown * config.steps)
    return warm * max(0.0, min(1.0, left))


def _local(module: nn.Module) -> list[Tensor]:
    """This process's share of a module's parameters."""
    return [p.to_local() if isinstance(p, DTensor) else p.data for p in module.parameters()]
