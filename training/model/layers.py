"""Magnitude-preserving layers (EDM2: Karras et al. 2024, arXiv 2312.02696).

Each layer keeps the expected magnitude of what passes through it, so that no activation needs normalising: nothing
mixes statistics across a tile, and every weight normalisation folds into a plain convolution at export.

Shapes: B batch, C channels, H and W pixels of the level, E channels of the noise embedding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

__all__ = ["SILU_GAIN", "BlockList", "MPConv", "NoiseEmbedding", "ResidualBlock", "mp_sum", "normalize_weight_"]

SILU_GAIN = 1 / 0.596
"""Brings SiLU of a unit Gaussian back to unit magnitude (EDM2, Equation 81)."""
RESIDUAL = 0.3
"""Weight of the residual path in a block (EDM2, Table 6)."""


def mp_weights(t: float) -> tuple[float, float]:
    """Factors (a, b) of the magnitude-preserving sum a·x + b·y (EDM2, Equation 88)."""
    norm = math.hypot(1 - t, t)
    return (1 - t) / norm, t / norm


def mp_sum(x: Tensor, y: Tensor, t: float = 0.5) -> Tensor:
    """Magnitude-preserving sum (EDM2, Equation 88)."""
    a, b = mp_weights(t)
    return a * x + b * y


def unit_variance(weight: Tensor) -> Tensor:
    """Each filter scaled to unit variance of its elements (EDM2, Equation 47)."""
    norm: Tensor = torch.linalg.vector_norm(weight.flatten(1), dim=1) / math.sqrt(weight[0].numel())
    return weight / (norm + 1e-4).view(-1, *([1] * (weight.ndim - 1)))


class BlockList(nn.ModuleList):
    """Residual blocks in a row; a type that checkers can iterate."""

    def run(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """x [B, C, H, W] through every block."""
        for block in self:
            x = block(x, embedding)
        return x


class MPConv(nn.Module):
    """Convolution (or, with ``kernel=0``, a linear layer) with normalised weights (EDM2, Equation 47).

    Args:
        cin, cout: channels.
        kernel: side of the kernel; 0 for a linear layer on [B, C].
        stride: of the convolution; with a stride, no padding (a 2x2 kernel of stride 2 halves the resolution).
        after_silu: the input is a plain SiLU, whose magnitude the weights then restore.
        bias: add a learned bias (ours: it stands for EDM2's constant input channel, which zero padding would turn
            into a frame around the tile).
        gain: initial value of a learned gain per output channel; None for no gain.
    """

    def __init__(
        self,
        cin: int,
        cout: int,
        kernel: int,
        *,
        stride: int = 1,
        after_silu: bool = False,
        bias: bool = False,
        gain: float | None = None,
    ) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.scale = SILU_GAIN if after_silu else 1.0
        self.weight = nn.Parameter(torch.randn(cout, cin, kernel, kernel) if kernel else torch.randn(cout, cin))
        self.bias = nn.Parameter(torch.zeros(cout)) if bias else None
        self.gain = nn.Parameter(torch.full((cout,), gain)) if gain is not None else None

    def plain_weight(self) -> Tensor:
        """The weight of the equivalent plain convolution: normalisation, SiLU's gain and the learned gain folded in."""
        weight = unit_variance(self.weight) * (self.scale / math.sqrt(self.weight[0].numel()))
        if self.gain is not None:
            weight = weight * self.gain.view(-1, *([1] * (weight.ndim - 1)))
        return weight

    def forward(self, x: Tensor) -> Tensor:
        weight = self.plain_weight()
        if self.kernel == 0:
            return F.linear(x, weight, self.bias)
        padding = self.kernel // 2 if self.stride == 1 else 0
        return F.conv2d(x, weight, self.bias, stride=self.stride, padding=padding)


@torch.no_grad()
def normalize_weight_(*modules: nn.Module) -> None:
    """Forced weight normalisation after an optimiser step, so that the learning rate means the same throughout a run
    (EDM2, Equation 66). In place, on every :class:`MPConv` within ``modules``.

    Weights of one shape are normalised together: a large GPU waits for launches, and there are hundreds of layers in a
    dozen shapes. Weights that are split over processes (FSDP2) are normalised one by one.
    """
    groups: dict[tuple[int, ...], list[Tensor]] = {}
    for layer in (layer for module in modules for layer in module.modules()):
        if isinstance(layer, MPConv):
            if isinstance(layer.weight, DTensor):
                layer.weight.copy_(unit_variance(layer.weight))
            else:
                groups.setdefault(tuple(layer.weight.shape), []).append(layer.weight)
    for weights in groups.values():
        together = unit_variance(torch.cat(weights))
        torch._foreach_copy_(weights, list(together.chunk(len(weights))))


class NoiseEmbedding(nn.Module):
    """Noise level → embedding: magnitude-preserving Fourier features (EDM2, Equation 75) and a linear layer.

    forward: ``c_noise`` [B] → [B, E]
    """

    freqs: Tensor
    phases: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels, generator=generator))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels, generator=generator))
        self.linear = MPConv(channels, channels, 0)

    def forward(self, c_noise: Tensor) -> Tensor:
        features = torch.cos(c_noise[:, None] * self.freqs + self.phases) * math.sqrt(2)
        return F.silu(self.linear(features))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions on a magnitude-preserving residual path.

    The noise level enters as a shift per channel before the second SiLU (ours; EDM2 scales instead): at export a shift
    is the bias of the first convolution, so the unrolled sampler shares its weights between steps and nothing of the
    noise level is left to compute.

    forward: x [B, C, H, W], shift [B, C] or None → [B, C, H, W]
    """

    def __init__(self, channels: int, embedding: int | None = None) -> None:
        super().__init__()
        self.conv0 = MPConv(channels, channels, 3, after_silu=True)
        self.conv1 = MPConv(channels, channels, 3, after_silu=True)
        self.shift = MPConv(embedding, channels, 0, after_silu=True, gain=0.0) if embedding else None

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        y = self.conv0(F.silu(x))
        if self.shift is not None and embedding is not None:
            y = y + self.shift(embedding)[:, :, None, None]
        return mp_sum(x, self.conv1(F.silu(y)), RESIDUAL)
