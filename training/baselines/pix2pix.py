"""pix2pix (Isola et al. 2017, arXiv 1611.07004) on the U-Net of :mod:`~staindiffuser.training.baselines.unet`.

The generator's loss is λ · L1 plus an adversarial term from a PatchGAN that sees the H&E and all stains' images.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from staindiffuser.training.baselines.unet import Regression
from staindiffuser.training.config import ModelConfig, TrainConfig
from staindiffuser.training.data.dataset import CropBatch
from staindiffuser.training.learner import Loss
from staindiffuser.training.model.network import he_to_network

__all__ = ["L1_WEIGHT", "PatchDiscriminator", "Pix2Pix"]

L1_WEIGHT = 100.0
"""λ (pix2pix, Section 3.3)."""
_BETAS = (0.5, 0.999)
"""Of Adam, for both networks (pix2pix, Section 3.3)."""


class PatchDiscriminator(nn.Module):
    """Real or not, for each patch of 70 × 70 pixels (pix2pix, Appendix 6.1.2), with instance norm for small batches.

    forward: H&E and images side by side [B, channels, H, W] → logits [B, 1, H / 8 − 2, W / 8 − 2]
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for cin, cout, stride in ((width, 2 * width, 2), (2 * width, 4 * width, 2), (4 * width, 8 * width, 1)):
            layers += [
                nn.Conv2d(cin, cout, 4, stride=stride, padding=1, bias=False),
                nn.InstanceNorm2d(cout, affine=True),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits


class Pix2Pix(Regression):
    """Generator and discriminator, which step at once.

    Both see the same generated images: the generator's gradient passes through the discriminator, the discriminator's
    stops at the images. So one backward pass and one optimiser serve both, and a run resumes, accumulates and counts
    its steps as every other does.
    """

    def __init__(self, model: ModelConfig, config: TrainConfig) -> None:
        super().__init__(model, config)
        # The paper's discriminator (64 channels) suits a generator of 54 M parameters; ours are smaller.
        self.discriminator = PatchDiscriminator(3 + 3 * len(model.stains), self.net.widths[0])

    def forward(self, batch: CropBatch, step: int) -> Loss:
        he, real = he_to_network(batch.he), self.targets(batch)
        virtual = self.net(he).float()
        frozen = {name: value.detach() for name, value in self.discriminator.named_parameters()}
        fooled = _cross_entropy(functional_call(self.discriminator, frozen, (torch.cat([he, virtual], 1),)), real=True)
        distance = F.l1_loss(virtual, real)
        caught = _cross_entropy(self.discriminator(torch.cat([he, virtual.detach()], 1)), real=False)
        believed = _cross_entropy(self.discriminator(torch.cat([he, real], 1)), real=True)
        judged = (caught + believed) / 2  # pix2pix, Section 3.3: the discriminator learns at half the rate
        return Loss(
            value=L1_WEIGHT * distance + fooled + judged,
            errors={"l1": distance[None], "generator": fooled[None], "discriminator": judged[None]},
        )

    def optimizer(self) -> torch.optim.Optimizer:
        trained = [*self.net.parameters(), *self.discriminator.parameters()]
        return torch.optim.Adam(trained, lr=self.config.learning_rate, betas=_BETAS, fused=True)


def _cross_entropy(logits: Tensor, *, real: bool) -> Tensor:
    logits = logits.float()
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)))
