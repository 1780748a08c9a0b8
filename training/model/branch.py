"""A task branch: attention over the encoder's features, and the denoising UNet that they steer."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from staindiffuser.training.config import WidthConfig
from staindiffuser.training.model.layers import BlockList, MPConv, NoiseEmbedding, ResidualBlock, mp_sum

__all__ = ["Branch", "TaskAttention"]


class TaskAttention(nn.Module):
    """Task-specific attention over the pyramid (cf. MTAN: Liu, Johns and Davison 2019, arXiv 1803.10704).

    Finest level first: ``a_l = sigmoid(conv(silu(conv([f_l, down2(a_{l−1} ⊙ f_{l−1})]))))``. It depends on the
    features alone, so it is computed once per tile, outside the step loop.

    forward: features [B, C_l, H_l, W_l] × 4 → attended features a_l ⊙ f_l of the same shapes
    """

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        above = (0, *widths[:-1])
        self.mix = nn.ModuleList(MPConv(c + up, c, 1, bias=True) for c, up in zip(widths, above, strict=True))
        self.gate = nn.ModuleList(MPConv(c, c, 1, after_silu=True, bias=True) for c in widths)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        attended: list[Tensor] = []
        for level, f in enumerate(features):
            x = torch.cat([f, F.avg_pool2d(attended[-1], 2)], dim=1) if level else f
            attended.append(torch.sigmoid(self.gate[level](F.silu(self.mix[level](x)))) * f)
        return attended


class Branch(nn.Module):
    """A denoising UNet with its own weights: a stain's image (3 channels) or its cells (1 channel).

    ``attend`` once per tile, then ``forward`` once per step. Skip connections are sums, not concatenations: half the
    work on the way up at the finest levels, where the time goes.
    """

    def __init__(self, config: WidthConfig, features: tuple[int, ...], channels: int, embedding: int) -> None:
        super().__init__()
        widths = config.channels
        self.channels = channels
        self.attention = TaskAttention(features)
        self.embedding = NoiseEmbedding(embedding)
        self.stem = MPConv(4 * channels, widths[0], 3, bias=True)
        # The gains start at 1, not at 0 (ours): at high noise the features are all there is to paint from.
        self.inject = nn.ModuleList(MPConv(f, c, 1, gain=1.0) for f, c in zip(features, widths, strict=True))
        self.down = nn.ModuleList(MPConv(a, b, 2, stride=2) for a, b in pairwise(widths))
        self.up = nn.ModuleList(MPConv(b, a, 1) for a, b in pairwise(widths))
        self.encode = nn.ModuleList(
            BlockList(ResidualBlock(c, embedding) for _ in range(config.blocks)) for c in widths
        )
        self.decode = nn.ModuleList(
            BlockList(ResidualBlock(c, embedding) for _ in range(config.blocks)) for c in widths[:-1]
        )
        self.head = MPConv(widths[0], 4 * channels, 3, after_silu=True, bias=True, gain=0.0)
        # The four pixels of a cell begin alike (ICNR: Aitken et al. 2017), so that there is no grid to unlearn.
        self.head.weight.data = self.head.weight.data[::4].repeat_interleave(4, dim=0)

    def attend(self, features: list[Tensor]) -> list[Tensor]:
        """Features [B, C_l, H_l, W_l] × 4 → what is added to each level on the way down."""
        return [inject(a) for inject, a in zip(self.inject, self.attention(features), strict=True)]

    def forward(self, x: Tensor, c_noise: Tensor, injections: list[Tensor]) -> Tensor:
        """x [B, C, H, W] (scaled by c_in), c_noise [B], injections from :meth:`attend` → F(x) [B, C, H, W]."""
        embedding = self.embedding(c_noise)
        h = self.stem(F.pixel_unshuffle(x, 2))
        skips: list[Tensor] = []
        for level, blocks in enumerate(self.encode):
            if level > 0:
                h = self.down[level - 1](h)
            h = h + injections[level]
            assert isinstance(blocks, BlockList)
            h = blocks.run(h, embedding)
            skips.append(h)
        for level in reversed(range(len(self.decode))):
            h = F.interpolate(self.up[level](h), scale_factor=2.0, mode="nearest")
            h = mp_sum(h, skips[level])
            blocks = self.decode[level]
            assert isinstance(blocks, BlockList)
            h = blocks.run(h, embedding)
        return F.pixel_shuffle(self.head(F.silu(h)), 2)
