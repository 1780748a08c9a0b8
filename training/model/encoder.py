"""The shared H&E encoder: a tile → the feature pyramid that every branch reads."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from staindiffuser.training.config import Backbone, WidthConfig
from staindiffuser.training.model.layers import BlockList, MPConv, ResidualBlock
from staindiffuser.training.model.pretrained import Lite0

__all__ = ["HEEncoder"]


class HEEncoder(nn.Module):
    """Pixel-unshuffle by 2, then four levels (1/2 … 1/16) of residual blocks (docs/explanation/model.md).

    With a backbone, its features of the same resolutions are appended to the encoder's own. It never sees the noise
    level or the noisy image: it runs once per tile for all stains, steps and cell maps.

    forward: H&E [B, 3, H, W] in [−1, 1], H and W multiples of 16 → four features [B, C_l, H / 2^(l+1), W / 2^(l+1)]
    """

    def __init__(self, config: WidthConfig, backbone: Backbone = "none") -> None:
        super().__init__()
        widths = config.channels
        self.stem = MPConv(12, widths[0], 3, bias=True)
        self.down = nn.ModuleList(MPConv(cin, cout, 2, stride=2) for cin, cout in pairwise(widths))
        self.blocks = nn.ModuleList(
            BlockList(ResidualBlock(channels) for _ in range(config.blocks)) for channels in widths
        )
        self.backbone = Lite0() if backbone == "efficientnet-lite0" else None

    def forward(self, he: Tensor) -> list[Tensor]:
        h = self.stem(F.pixel_unshuffle(he, 2))
        features = []
        for level, blocks in enumerate(self.blocks):
            if level > 0:
                h = self.down[level - 1](h)
            assert isinstance(blocks, BlockList)
            h = blocks.run(h)
            features.append(h)
        if self.backbone is None:
            return features
        return [torch.cat(pair, dim=1) for pair in zip(features, self.backbone(he), strict=True)]
