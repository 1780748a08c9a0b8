"""The preconditioned denoiser around a branch (EDM: Karras et al. 2022, arXiv 2206.00364).

Shapes: x [B, C, H, W]; σ [B].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Denoiser", "precondition", "spatial"]


def precondition(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(c_skip, c_out, c_in, c_noise) of EDM, Table 1, except c_in; each of σ's shape.

    c_in is c_skip / sd instead of 1 / √(σ² + sd²) (ours): the network sees the best linear estimate of y from x, in
    units of sd, which fades as the noise grows. EDM's fills every channel of the stem with unit noise at σ_max, where
    x carries no information, and the features have to compete with it.
    """
    total = sigma**2 + sigma_data**2
    c_skip = sigma_data**2 / total
    return c_skip, sigma * sigma_data / total.sqrt(), c_skip / sigma_data, sigma.log() / 4


class Denoiser:
    """D(x; σ) = c_skip x + c_out F(c_in x, c_noise) (EDM, Equation 7), the preconditioning in float32.

    Args:
        network: F; takes (c_in x) [B, C, H, W] and c_noise [B].
        sigma_data: standard deviation of the standardised targets.
    """

    def __init__(self, network: Callable[[Tensor, Tensor], Tensor], sigma_data: float) -> None:
        self.network = network
        self.sigma_data = sigma_data

    def __call__(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(x.shape[0])
        c_skip, c_out, c_in, c_noise = precondition(sigma, self.sigma_data)
        f = self.network(spatial(c_in) * x, c_noise)
        return spatial(c_skip) * x + spatial(c_out) * f.float()


def spatial(value: Tensor) -> Tensor:
    """[B] → [B, 1, 1, 1], to be multiplied with images."""
    return value.view(-1, 1, 1, 1)
