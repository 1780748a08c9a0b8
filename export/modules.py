"""The engines as torch modules, as ``export graphs`` traces them and as benchmarks compare them with compiled engines.

Needs only torch: a machine with a GPU may lack ONNX.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from staindiffuser.export.folding import FoldedBranch, FoldedEncoder, features_unit
from staindiffuser.training.config import StainConfig
from staindiffuser.training.model.denoiser import precondition
from staindiffuser.training.model.network import DualDiffusion, Task, he_to_network, tempered

__all__ = ["PRECISIONS", "BranchEngine", "EncoderEngine"]

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Dtypes of the trunk."""


class EncoderEngine(nn.Module):
    """HE uint8 [B, T, T, 3] → four features, half precision.

    Args:
        trunk: dtype of the convolutions.
    """

    def __init__(self, network: DualDiffusion, trunk: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.trunk = trunk
        self.encoder = FoldedEncoder(network.encoder).to(trunk)

    def forward(self, HE: Tensor) -> tuple[Tensor, ...]:
        return tuple(f.half() for f in self.encoder(he_to_network(HE).to(self.trunk)))


class BranchEngine(nn.Module):
    """Features and noise → uint8 image or cell map: attention once, then the unrolled sampler.

    Called without noise, its one step begins at x = 0, the noise's mean.

    Args:
        sigmas: noise level of each step; the cell branch has one, σ_max.
        trunk: dtype of the convolutions; the preconditioning is float32.
    """

    def __init__(
        self,
        network: DualDiffusion,
        task: Task,
        stain: StainConfig,
        sigmas: Sequence[float],
        trunk: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        sigma = torch.tensor(sigmas, dtype=torch.float64)
        sd = network.config.sigma_data
        c_skip, c_out, c_in, c_noise = precondition(sigma, sd)
        branch = FoldedBranch(network.branch(task, stain.name), features_unit(network.encoder), c_noise.float())
        self.branch = branch.to(trunk)
        # One value per channel and not one number: numbers end up in the text of TensorRT-RTX's kernels, so that each
        # step has kernels of its own (the engine of k = 4 was 1.18 times the size of k = 1, with this 1.14 times).
        channels = 4 * (3 if task == "images" else 1)
        for name, value in (("c_skip", c_skip), ("c_out", c_out), ("c_in", c_in), ("sigma", sigma)):
            self.register_buffer(name, value.float().view(-1, 1, 1, 1, 1).repeat(1, 1, channels, 1, 1))
        self.c_skip: Tensor
        self.c_out: Tensor
        self.c_in: Tensor
        self.sigma: Tensor
        mean, std = stain.constants(task)
        self.register_buffer("offset", 255 * torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("scale", 255 / sd * torch.tensor(std).view(1, -1, 1, 1))
        self.offset: Tensor
        self.scale: Tensor
        self.temperature = network.temperatures.get(stain.name, 1.0) if task == "cells" else 1.0

    def forward(
        self,
        FEATURES_0: Tensor,
        FEATURES_1: Tensor,
        FEATURES_2: Tensor,
        FEATURES_3: Tensor,
        NOISE: Tensor | None = None,
    ) -> Tensor:
        injections = self.branch.attend([f.to(self.trunk) for f in (FEATURES_0, FEATURES_1, FEATURES_2, FEATURES_3)])
        y = self._sampled(NOISE, injections) if NOISE is not None else self._from_zero(injections)
        shown = (F.pixel_shuffle(y, 2) * self.scale + self.offset).clamp(0, 255)
        if self.temperature != 1:
            shown = 255 * tempered(shown / 255, self.temperature)
        result = shown.round()
        # Permute before the cast: TensorRT's UINT8 tensors may only be cast.
        return result.permute(0, 2, 3, 1).to(torch.uint8)

    def _sampled(self, noise: Tensor, injections: list[Tensor]) -> Tensor:
        # One unshuffle for all steps: [B, k, 3, H, W] as k·3 channels, then cut per step.
        z = F.pixel_unshuffle(noise.flatten(1, 2) if noise.ndim == 5 else noise, 2).chunk(len(self.sigma), dim=1)
        y: Tensor | None = None
        for step, sigma in enumerate(self.sigma):
            x = z[step].float() * sigma if y is None else y + z[step].float() * sigma
            f = self.branch((x * self.c_in[step]).to(self.trunk), step, injections).float()
            y = x * self.c_skip[step] + f * self.c_out[step]
        assert y is not None
        return y

    def _from_zero(self, injections: list[Tensor]) -> Tensor:
        f: Tensor = self.branch(None, 0, injections).float()
        return f * self.c_out[0]
