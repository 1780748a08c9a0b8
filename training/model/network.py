"""The whole model: the encoder, and per stain a pair of branches with the constants that standardise its targets."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from staindiffuser.training.config import ModelConfig, StainConfig, Task
from staindiffuser.training.model.branch import Branch
from staindiffuser.training.model.denoiser import Denoiser
from staindiffuser.training.model.encoder import HEEncoder
from staindiffuser.training.model.subpixel import without_grid_

__all__ = ["DualDiffusion", "Task", "he_to_network", "standardize", "tempered", "unstandardize"]


class DualDiffusion(nn.Module):
    """A shared H&E encoder and a pair of diffusion branches per stain (StainDiffuser, arXiv 2403.11340)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.temperatures: dict[str, float] = {}
        """By what the logit of a stain's cell map is divided; of these weights, so not of the architecture."""
        features = config.features
        self.encoder = HEEncoder(config.encoder, config.backbone)
        self.images = nn.ModuleDict(
            {s.name: Branch(config.image, features, 3, config.embedding) for s in config.stains}
        )
        self.cells = nn.ModuleDict({s.name: Branch(config.cells, features, 1, config.embedding) for s in config.stains})

    def branch(self, task: Task, stain: str) -> Branch:
        """One branch."""
        branch = (self.images if task == "images" else self.cells)[stain]
        assert isinstance(branch, Branch)
        return branch

    def denoiser(self, task: Task, stain: str, features: list[Tensor]) -> Denoiser:
        """The preconditioned denoiser D(x; σ) of one branch, given the encoder's features of a batch of tiles."""
        branch = self.branch(task, stain)
        injections = branch.attend(features)
        return Denoiser(lambda x, c_noise: branch(x, c_noise, injections), self.config.sigma_data)

    def project_heads_(self, task: Task) -> None:
        """Project the last layer of each branch of a task, in place, so that its outputs have no grid."""
        for stain in self.config.stain_names:
            without_grid_(self.branch(task, stain).head)


def tempered(probability: Tensor, temperature: float) -> Tensor:
    """Probabilities in [0, 1] with their logit divided by ``temperature``: where they say 0.8, it is 80 % then."""
    yes, no = probability ** (1 / temperature), (1 - probability) ** (1 / temperature)
    return yes / (yes + no)


def he_to_network(he: Tensor) -> Tensor:
    """H&E uint8 [B, H, W, 3] → float32 [B, 3, H, W] in [−1, 1]."""
    # Cast before the permute: TensorRT's UINT8 tensors may only be cast.
    return he.float().permute(0, 3, 1, 2) / 127.5 - 1


def _constants(stain: StainConfig, task: Task, like: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = stain.constants(task)
    shape = (1, -1, 1, 1)
    return torch.as_tensor(mean).to(like).view(shape), torch.as_tensor(std).to(like).view(shape)


def standardize(value: Tensor, stain: StainConfig, task: Task, sigma_data: float) -> Tensor:
    """Intensities in [0, 1], [B, C, H, W] → targets of mean 0 and standard deviation ``sigma_data``."""
    mean, std = _constants(stain, task, value)
    return (value - mean) / std * sigma_data


def unstandardize(value: Tensor, stain: StainConfig, task: Task, sigma_data: float) -> Tensor:
    """The inverse of :func:`standardize`; not clamped."""
    mean, std = _constants(stain, task, value)
    return value / sigma_data * std + mean
