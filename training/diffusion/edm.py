"""EDM's training loss (Karras et al. 2022, arXiv 2206.00364; EDM2: Karras et al. 2024, arXiv 2312.02696).

Shapes: x, y, n [B, C, H, W]; σ [B].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from staindiffuser.training.model.denoiser import Denoiser, spatial
from staindiffuser.training.model.layers import MPConv, NoiseEmbedding

__all__ = ["Uncertainty", "draw_sigma", "edm_loss"]


class Uncertainty(nn.Module):
    """The learned log variance u(σ) that weights a branch's loss per noise level (EDM2, Equation 21).

    It is also the weighting between tasks; there is no second one. Used in training only.
    """

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        self.embedding = NoiseEmbedding(channels)
        self.linear = MPConv(channels, 1, 0, after_silu=True, gain=0.0)

    def forward(self, sigma: Tensor) -> Tensor:
        """σ [B] → u(σ) [B]"""
        with torch.autocast(sigma.device.type, enabled=False):
            u: Tensor = self.linear(self.embedding(sigma.log() / 4))
        return u.squeeze(1)


def draw_sigma(
    uniform: Tensor, normal: Tensor, *, p_mean: float, p_std: float, max_share: float, sigma_max: float
) -> Tensor:
    """Noise levels for a training batch: ln σ ~ N(p_mean, p_std²) (EDM, Table 1), σ = σ_max for a share (ours).

    Args:
        uniform, normal: one draw per sample [B] from U(0, 1) and N(0, 1).
    """
    sigma = (p_mean + p_std * normal).exp().clamp(max=sigma_max)
    return torch.where(uniform < max_share, sigma_max, sigma)


def edm_loss(
    denoiser: Denoiser, y: Tensor, noise: Tensor, sigma: Tensor, uncertainty: Uncertainty, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """w(σ) / exp(u(σ)) · mean((D − y)²) + u(σ), with w = (σ² + sd²) / (σ sd)² (EDM2, Equation 21).

    Args:
        valid: weight per pixel [B, 1, H, W]; pixels of weight 0 (the ignore band of coarse masks) do not count.

    Returns:
        the loss per sample [B], and the weighted squared error w · mean((D − y)²) per sample [B], which is near 1
        for an untrained branch at every σ and falls as it learns.
    """
    sd = denoiser.sigma_data
    square = (denoiser(y + spatial(sigma) * noise, sigma) - y) ** 2
    if valid is None:
        error = square.mean(dim=(1, 2, 3))
    else:
        error = (square * valid).mean(dim=(1, 2, 3)) / valid.mean(dim=(1, 2, 3)).clamp(min=1e-3)
    weighted = (sigma**2 + sd**2) / (sigma * sd) ** 2 * error
    u = uncertainty(sigma)
    return weighted / u.exp() + u, weighted
