"""From noise to an image: the teacher's Heun sampler and the few-step sampler that is fused into the engines.

Both are deterministic functions of the noise they are given. Shapes: noise and images [B, C, H, W].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["START_SIGMAS", "few_step", "heun", "karras_sigmas"]

Denoise = Callable[[Tensor, float], Tensor]

START_SIGMAS: dict[int, tuple[float, ...]] = {1: (80.0,), 2: (80.0, 1.5), 4: (80.0, 21.4, 4.2, 0.5)}
"""Noise levels to start a search from, per number of steps (ours)."""


def karras_sigmas(steps: int, *, sigma_max: float, sigma_min: float, rho: float = 7.0) -> list[float]:
    """Noise levels from σ_max down to σ_min, then 0 (EDM, Equation 5)."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return [(high + i / (steps - 1) * (low - high)) ** rho for i in range(steps)] + [0.0]


def heun(
    denoise: Denoise, noise: Tensor, *, steps: int = 18, sigma_max: float = 80.0, sigma_min: float = 0.002
) -> Tensor:
    """Second-order deterministic sampler (EDM, Algorithm 1)."""
    sigmas = karras_sigmas(steps, sigma_max=sigma_max, sigma_min=sigma_min)
    x = sigmas[0] * noise
    for now, after in pairwise(sigmas):
        slope = (x - denoise(x, now)) / now
        stepped = x + (after - now) * slope
        if after > 0:
            slope = (slope + (stepped - denoise(stepped, after)) / after) / 2
            stepped = x + (after - now) * slope
        x = stepped
    return x


def few_step(denoise: Denoise, noises: Tensor | Sequence[Tensor], sigmas: Sequence[float]) -> Tensor:
    """Multistep consistency sampling (Song et al. 2023, Algorithm 1; docs/explanation/mathematics.md):
    ``x_1 = σ_1 z_1;  x_{i+1} = D(x_i, σ_i) + σ_{i+1} z_{i+1}``, and D(x_k, σ_k) is the result.

    Args:
        noises: one noise field [B, C, H, W] per step.
        sigmas: noise level per step, highest first.
    """
    if len(noises) != len(sigmas):
        raise ValueError(f"{len(sigmas)} steps need as many noise fields, got {len(noises)}")
    x = torch.zeros_like(noises[0])
    for noise, sigma in zip(noises, sigmas, strict=True):
        x = denoise(x + sigma * noise, sigma)
    return x
