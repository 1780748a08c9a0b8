"""Easy consistency tuning (ECT: Geng et al. 2024, "Consistency Models Made Easy", arXiv 2406.14548).

A diffusion model is a consistency model whose pairs of noise levels are as far apart as can be (r = 0). So training
starts from the teacher and brings r towards t, stage by stage.

Shapes: y, noise [B, C, H, W]; t, r [B].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from staindiffuser.training.config import StainConfig
from staindiffuser.training.diffusion.edm import draw_sigma
from staindiffuser.training.model.denoiser import precondition, spatial

__all__ = ["ConsistencyLoss", "Weighting", "consistency_loss", "lower_level", "stage_of"]

Denoise = Callable[[Tensor, Tensor], Tensor]
Weighting = Literal["step", "flat"]
"""How the distance d of a pair of predictions is weighted. ``step`` is ECT's d / (t − r). ``flat`` (ours) is
d / c_out(t): equal weight for the network's own output at all noise levels, where ``step`` lets the high ones fade.
Against the real image it is squared, like the teacher's loss: a plain norm takes weight from crops that are hard to
predict, and those hold the rare cells."""

_K, _B = 8.0, 1.0
"""Of ECT's mapping n(t) = 1 + k sigmoid(−b t)."""
_EPSILON = 1e-6
"""Keeps the gradient of the norm finite where both predictions agree (ours); far below any visible difference."""


def stage_of(step: int, steps: int, stages: int) -> int:
    """The stage s = 0 … stages − 1 that optimiser step ``step`` of ``steps`` belongs to: equal parts."""
    return min(stages - 1, step * stages // steps)


def lower_level(t: Tensor, stage: int, *, q: float = 4.0) -> Tensor:
    """r = max(0, t (1 − q^−(s+1) n(t))), n(t) = 1 + 8 sigmoid(−t): the noise level that t is compared with (ECT's
    "mapping function"). Each stage brings r closer to t by the factor q."""
    n = 1 + _K * torch.sigmoid(-_B * t)
    return (t * (1 - q ** -(stage + 1) * n)).clamp(min=0)


def consistency_loss(
    denoise: Denoise, y: Tensor, noise: Tensor, t: Tensor, r: Tensor, *, weighting: Weighting, sigma_data: float
) -> tuple[Tensor, Tensor]:
    """‖D(y + t ε, t) − stopgrad D(y + r ε, r)‖₂, weighted, with the same ε; the target is y where r = 0 (ECT's loss;
    that the norm is not squared is its "adaptive weighting").

    The norm is divided by the square root of the number of values (ours), so that it does not depend on the crop size.

    Returns:
        the loss per sample [B], and the norm alone [B], in units of the standardised target.
    """
    # The prediction comes first: under autocast the casts it makes, which carry a gradient, serve the target too.
    prediction = denoise(y + spatial(t) * noise, t)
    positive = r > 0
    if positive.any():
        with torch.no_grad():
            level = torch.where(positive, r, t)  # anything but 0, whose logarithm the network cannot take
            target = torch.where(spatial(positive), denoise(y + spatial(level) * noise, level), y)
    else:
        target = y
    square = (prediction - target).square().mean(dim=(1, 2, 3))
    distance = (square + _EPSILON**2).sqrt() - _EPSILON
    c_out = precondition(t, sigma_data)[1]
    match weighting:
        case "step":
            loss = distance / (t - r)
        case "flat":
            loss = torch.where(positive, distance / c_out, square / c_out**2)
    return loss, distance.detach()


@dataclass(frozen=True, kw_only=True)
class ConsistencyLoss:
    """The loss of one stain's image branch at an optimiser step."""

    steps: int
    stages: int
    q: float
    p_mean: float
    p_std: float
    max_share: float
    """Share of the draws taken at σ_max (ours; as the teacher does)."""
    consistent_below: float
    """At and above this noise level r = 0 in all stages (see ``DistillConfig``)."""
    r_min: float
    """Lower r count as 0 (see ``DistillConfig``)."""
    sigma_min: float
    sigma_max: float
    sigma_data: float
    weighting: Weighting

    def __call__(
        self, denoise: Denoise, y: Tensor, noise: Tensor, draws: Tensor, stain: StainConfig, step: int
    ) -> tuple[Tensor, Tensor]:
        """y, noise [B, 3, H, W], draws [B, 2] (a uniform and a normal) → the loss [B] and the distance [B]."""
        t = draw_sigma(
            draws[:, 0],
            draws[:, 1],
            p_mean=self.p_mean,
            p_std=self.p_std,
            max_share=self.max_share,
            sigma_max=self.sigma_max,
        ).clamp(min=self.sigma_min)
        r = lower_level(t, stage_of(step, self.steps, self.stages), q=self.q)
        r = torch.where((t < self.consistent_below) & (r >= self.r_min), r, 0.0)
        return consistency_loss(denoise, y, noise, t, r, weighting=self.weighting, sigma_data=self.sigma_data)
