"""Magnitude-preserving layers → plain convolutions and SiLU, exactly.

At inference nothing needs normalising any more, so every constant factor moves into a convolution's weights:

- weight normalisation, learned gains and SiLU's gain go into the weight of the convolution that follows;
- what depends on σ alone (embedding, shifts) is computed here, once per step, and becomes a bias;
- the magnitude-preserving sum ``a x + b y`` becomes a plain sum ``x̃ + ỹ``. The stream is kept in units of ``s``,
  ``x = s x̃``: a sum multiplies ``s`` by ``a`` and the second convolution of the block is divided by it. SiLU then
  reads ``silu(x) = s · x̃ sigmoid(s x̃)``, which runtimes fuse into one operation, and whose outer ``s`` the next
  convolution takes. Sums without factors fuse into the convolution before them.

What is left to run is convolutions, sums and ``x sigmoid(s x)``.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from staindiffuser.training.model.branch import Branch
from staindiffuser.training.model.encoder import HEEncoder
from staindiffuser.training.model.layers import RESIDUAL, BlockList, MPConv, ResidualBlock, mp_weights

__all__ = ["FoldedBranch", "FoldedEncoder", "features_unit"]

_A, _B = mp_weights(RESIDUAL)
_HALF, _ = mp_weights(0.5)


class FoldedConv(nn.Module):
    """A plain convolution; its bias may differ from step to step while its weight is shared.

    Args:
        unit_in: the input is in units of this.
        unit_out: the output is wanted in units of this.
        shifts: bias per step [S, C], instead of the layer's own.
    """

    def __init__(
        self, layer: nn.Module, unit_in: float = 1.0, unit_out: float = 1.0, shifts: Tensor | None = None
    ) -> None:
        super().__init__()
        assert isinstance(layer, MPConv)
        self.stride, self.padding = layer.stride, layer.kernel // 2 if layer.stride == 1 else 0
        self.weight = nn.Parameter(layer.plain_weight().detach() * (unit_in / unit_out), requires_grad=False)
        if shifts is None:
            shifts = self.weight.new_zeros(1, len(self.weight)) if layer.bias is None else layer.bias.detach()[None]
        self.biases = nn.ParameterList(nn.Parameter(s / unit_out, requires_grad=False) for s in shifts)

    def forward(self, x: Tensor, step: int = 0) -> Tensor:
        bias = self.biases[step if len(self.biases) > 1 else 0]
        return F.conv2d(x, self.weight, bias, stride=self.stride, padding=self.padding)


def scaled_silu(x: Tensor, unit: float) -> Tensor:
    """``silu(unit · x) / unit``."""
    return x * torch.sigmoid(x if unit == 1.0 else x * unit)


class FoldedBlock(nn.Module):
    """A residual block whose input is in units of ``unit`` and whose output is in units of ``unit_out``."""

    def __init__(self, block: ResidualBlock, unit: float, embeddings: Tensor | None) -> None:
        super().__init__()
        self.unit, self.unit_out = unit, _A * unit
        shifts = block.shift(embeddings) if block.shift is not None and embeddings is not None else None
        self.conv0 = FoldedConv(block.conv0, unit_in=unit, shifts=shifts)
        self.conv1 = FoldedConv(block.conv1, unit_out=_A * unit / _B)

    def forward(self, x: Tensor, step: int = 0) -> Tensor:
        y: Tensor = self.conv0(scaled_silu(x, self.unit), step)
        y = self.conv1(scaled_silu(y, 1.0))
        return x + y


class _Blocks(nn.Module):
    """Residual blocks in a row."""

    def __init__(self, blocks: nn.Module, unit: float, embeddings: Tensor | None = None) -> None:
        super().__init__()
        assert isinstance(blocks, BlockList)
        self.unit_out = unit
        self.blocks = nn.ModuleList()
        for block in blocks:
            assert isinstance(block, ResidualBlock)
            folded = FoldedBlock(block, self.unit_out, embeddings)
            self.blocks.append(folded)
            self.unit_out = folded.unit_out

    def forward(self, x: Tensor, step: int = 0) -> Tensor:
        for block in self.blocks:
            x = block(x, step)
        return x


def features_unit(encoder: HEEncoder) -> float:
    """The unit in which the folded encoder gives its features, the same at every level."""
    blocks = encoder.blocks[0]
    assert isinstance(blocks, BlockList)
    return float(_A ** len(blocks))


class FoldedEncoder(nn.Module):
    """:class:`HEEncoder` with its features in units of :func:`features_unit`."""

    def __init__(self, encoder: HEEncoder) -> None:
        super().__init__()
        unit = features_unit(encoder)
        self.stem = FoldedConv(encoder.stem)
        self.down = nn.ModuleList(FoldedConv(layer, unit_in=unit) for layer in encoder.down)
        self.blocks = nn.ModuleList(_Blocks(blocks, 1.0) for blocks in encoder.blocks)
        self.unit, self.backbone = unit, copy.deepcopy(encoder.backbone)  # which may be cast, and the network not

    def forward(self, he: Tensor) -> list[Tensor]:
        h = self.stem(F.pixel_unshuffle(he, 2))
        features = []
        for level, blocks in enumerate(self.blocks):
            if level > 0:
                h = self.down[level - 1](h)
            h = blocks(h)
            features.append(h)
        if self.backbone is None:
            return features
        return [torch.cat([f, b / self.unit], dim=1) for f, b in zip(features, self.backbone(he), strict=True)]


class FoldedBranch(nn.Module):
    """:class:`Branch` for a fixed list of noise levels: ``attend`` once, then ``forward`` with the number of the step.

    Args:
        branch: the trained branch.
        unit: of the features it is given.
        c_noise: ln σ / 4 of each step [S].
    """

    def __init__(self, branch: Branch, unit: float, c_noise: Tensor) -> None:
        super().__init__()
        embeddings = branch.embedding(c_noise).detach()
        attention = branch.attention
        self.mix = nn.ModuleList(FoldedConv(layer, unit_in=unit) for layer in attention.mix)
        self.gate = nn.ModuleList(FoldedConv(layer) for layer in attention.gate)
        self.inject = nn.ModuleList(FoldedConv(layer, unit_in=unit) for layer in branch.inject)
        self.stem = FoldedConv(branch.stem)
        encode = [_Blocks(blocks, 1.0, embeddings) for blocks in branch.encode]
        units = [blocks.unit_out for blocks in encode]
        self.encode = nn.ModuleList(encode)
        self.down = nn.ModuleList(FoldedConv(layer, unit_in=u) for layer, u in zip(branch.down, units, strict=False))
        up, decode, unit = [], [], units[-1]
        for level in reversed(range(len(branch.up))):
            up.append(FoldedConv(branch.up[level], unit_in=unit, unit_out=units[level]))
            decode.append(_Blocks(branch.decode[level], units[level] * _HALF, embeddings))
            unit = decode[-1].unit_out
        self.up, self.decode = nn.ModuleList(up), nn.ModuleList(decode)  # coarsest level first
        self.unit_head: float = unit
        self.head = FoldedConv(branch.head, unit_in=unit)

    def attend(self, features: list[Tensor]) -> list[Tensor]:
        """Features in units of ``unit`` → what is added to each level."""
        attended: list[Tensor] = []
        for level, f in enumerate(features):
            x = torch.cat([f, F.avg_pool2d(attended[-1], 2)], dim=1) if level else f
            gate = self.gate[level](scaled_silu(self.mix[level](x), 1.0))
            attended.append(torch.sigmoid(gate) * f)
        return [inject(a) for inject, a in zip(self.inject, attended, strict=True)]

    def forward(self, x: Tensor | None, step: int, injections: list[Tensor]) -> Tensor:
        """x [B, 4C, H/2, W/2] (pixel-unshuffled, scaled by c_in), or None for zeros → F(x), pixel-unshuffled too.

        The sampler works on pixels one by one, so between two steps nothing needs to be shuffled back.
        """
        h = self.stem(x) if x is not None else self.stem.biases[0].view(1, -1, 1, 1)
        skips: list[Tensor] = []
        for level, blocks in enumerate(self.encode):
            if level > 0:
                h = self.down[level - 1](h)
            h = blocks(h + injections[level], step)
            skips.append(h)
        for up, decode, skip in zip(self.up, self.decode, reversed(skips[:-1]), strict=True):
            h = decode(F.interpolate(up(h), scale_factor=2.0, mode="nearest") + skip, step)
        f: Tensor = self.head(scaled_silu(h, self.unit_head))
        return f
