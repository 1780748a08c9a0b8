"""End-to-end one-step fine-tuning: the network is trained as it is used, in one step from x = 0.

After Garcia et al. 2024 (arXiv 2409.11355), who found that a diffusion model fine-tuned without noise is hard to beat
where the condition decides the image: x = 0 at σ = 80, and losses on the image.

Errors of pixels alone give the mean or the median of all plausible images, which is blurred: where the grain of a cell
lies cannot be known, but how much of it there is can. So the amplitudes of local spectra are compared as well, which do
not depend on where within a window a detail lies (the "multi-resolution STFT loss" of speech synthesis: Yamamoto et al.
2020, arXiv 1910.11480; here in two dimensions, and weighted).

Shapes: y [B, 3, H, W] standardised; draws and noise are not used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import EllipsisType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from staindiffuser.imaging.optical_density import DAB_THRESHOLD, STAIN_MATRIX
from staindiffuser.training.config import StainConfig
from staindiffuser.training.model.branch import Branch
from staindiffuser.training.model.network import unstandardize

__all__ = [
    "OneStepLoss",
    "detail_distance",
    "edge_distance",
    "forget_noise_",
    "ignores_noise",
    "local_spectra",
    "quarter",
    "stain_densities",
]

Denoise = Callable[[Tensor, Tensor], Tensor]

WINDOWS = (8, 16, 32)
"""Sides of the windows of the local spectra, pixels: from a nucleus' rim to a few cells (ours)."""
MISSING = 1.5
"""Weight of detail that is missing; of detail that is too much it is 1 (ours: grain that is like the real one but lies
elsewhere is then best at its power)."""
_EPSILON = 1e-8
"""Keeps the gradient of the root finite on bare glass (ours); far below the grain of any scan."""


def stain_densities(intensity: Tensor) -> Tensor:
    """Optical densities of hematoxylin, DAB and the residual, of images in [0, 1]; differentiable.

    As :func:`staindiffuser.imaging.optical_density.unmix` has them. The residual is what no mixture of the two stains
    looks like: where it is wrong, so is the hue.

    Args:
        intensity: [B, 3, H, W].

    Returns:
        [B, 3, H, W].
    """
    unmix = torch.linalg.inv(torch.from_numpy(STAIN_MATRIX)).to(intensity)
    density = -torch.log10((intensity.clamp(0, 1) * 255 + 1) / 256)
    return torch.einsum("bchw,cs->bshw", density, unmix)


def local_spectra(images: Tensor, window: int) -> Tensor:
    """Amplitudes of the spectra of overlapping windows (Hann, half a window apart), each times its frequency.

    Spectra of tissue fall roughly as the inverse of the frequency, so fine and coarse detail then have equal weight,
    and the window's mean has none. Each amplitude is the root mean square over a frequency and its neighbours: the
    amplitudes of grain are Rayleigh-distributed, and a branch that gives each its mean has only π / 4 of the power.

    Args:
        images: [B, C, H, W], sides of at least ``window``.

    Returns:
        [B, C, rows, columns, window, window // 2 + 1].
    """
    hann = torch.hann_window(window, device=images.device)
    tiles = images.unfold(2, window, window // 2).unfold(3, window, window // 2)
    # The Hann window spreads a window's mean over its neighbours, and an amplitude has no sign: a branch that begins
    # from nothing would learn a colour's mirror image.
    tiles = tiles - tiles.mean(dim=(-2, -1), keepdim=True)
    power = torch.fft.rfft2(tiles * (hann[:, None] * hann), norm="ortho").abs().square()
    flat = F.pad(power.flatten(0, 3)[:, None], (0, 0, 1, 1), mode="circular")  # rows go on at the other end
    pooled = F.avg_pool2d(flat, 3, stride=1, padding=(0, 1), count_include_pad=False).view_as(power)
    rows, columns = (
        frequencies(window, device=images.device) for frequencies in (torch.fft.fftfreq, torch.fft.rfftfreq)
    )
    return (pooled + _EPSILON).sqrt() * torch.hypot(rows[:, None], columns) * window


def detail_distance(painted: Tensor, real: Tensor) -> Tensor:
    """Mean squared difference of the local spectra over all windows of all sizes, [B]; both [B, C, H, W].

    Where an amplitude is missing it counts :data:`MISSING` times: the mean of amplitudes that cannot be known, which a
    plain square asks for, has less power than they have in the mean.
    """
    distances = []
    for side in WINDOWS:
        error = local_spectra(painted, side) - local_spectra(real, side)
        weight = torch.where(error < 0, MISSING, 1.0)
        distances.append((weight * error.square()).mean(dim=(1, 2, 3, 4, 5)))
    return torch.stack(distances).mean(dim=0)


def edge_distance(painted: Tensor, real: Tensor) -> Tensor:
    """Mean absolute difference of what changes from a pixel to the next, along both axes together, [B].

    The errors of pixels are mostly those of where the brown lies, which changes slowly. Beside them the fine texture of
    nuclei, which the H&E shows and which can be painted exactly, weighs next to nothing.

    Args:
        painted, real: [B, C, H, W].
    """
    error = painted - real
    return torch.stack([error.diff(dim=axis).abs().mean(dim=(1, 2, 3)) for axis in (2, 3)]).sum(dim=0)


def quarter(size: Sequence[int], step: int) -> tuple[EllipsisType, slice, slice]:
    """The part of a crop whose local spectra a step compares: one quarter after the other, since they cost as much as
    the network does; all of a small crop.

    Args:
        size: height and width of the crop.
    """
    if min(size) < 4 * max(WINDOWS):
        return ..., slice(None), slice(None)
    rows, columns = (
        slice(half * (side // 2), half * (side // 2) + side // 2)
        for side, half in zip(size, (step % 2, step // 2 % 2), strict=True)
    )
    return ..., rows, columns


@torch.no_grad()
def forget_noise_(images: nn.ModuleDict) -> None:
    """Make each image branch ignore the noisy image for good: the weights of its first layer become 0 and stay 0.

    It then computes from the H&E alone what it would from x = 0, so the exported sampler, which starts from σ z, needs
    no change. What remains of z is c_skip σ z, about (sd² / σ) z: 0.6 % of the target's standard deviation.
    """
    for branch in images.values():
        assert isinstance(branch, Branch)
        branch.stem.weight.zero_()
        branch.stem.weight.requires_grad_(False)


def ignores_noise(images: nn.ModuleDict) -> bool:
    """Whether an image branch was fine-tuned to one step (:func:`forget_noise_`); that of a stain which was added since
    may not have been."""
    return any(isinstance(branch, Branch) and not branch.stem.weight.any() for branch in images.values())


@dataclass(frozen=True, kw_only=True)
class OneStepLoss:
    """mean w |D(0, σ_max) − y| + λ · mean w |OD(D) − OD(y)| + μ · mean (A(D) − A(y))² + κ · E(D − y), OD being the
    densities of hematoxylin, DAB and the residual, A the local spectra and E :func:`edge_distance`; w is
    :attr:`positive_weight` where y is positive, else 1 (the losses and their weights are ours).

    A squared error is least at the mean: a cell that carries the marker with a probability of 0.4 is painted two fifths
    brown, and a field of lymphocytes grey violet. An absolute one is least at the median, which is blue or brown, and
    blue wherever few cells carry the marker; the weight says how few: a place is painted brown if it is positive with
    a probability above 1 / (1 + w).

    Each stain's branches are its own, and Adam takes a gradient for what it is beside earlier ones: a weight per stain
    would change nothing.
    """

    sigma_max: float
    sigma_data: float
    density_weight: float
    """λ: of the loss on the stains' optical densities."""
    detail_weight: float
    """μ: of the loss on the local spectra."""
    edge_weight: float = 0.0
    """κ: of the loss on edges."""
    positive_weight: float = 1.0
    """w: of pixels whose DAB density is at least :data:`DAB_THRESHOLD`."""

    def __call__(
        self, denoise: Denoise, y: Tensor, noise: Tensor, draws: Tensor, stain: StainConfig, step: int
    ) -> tuple[Tensor, Tensor]:
        """The loss per sample [B], and its part on pixels [B]."""
        sigma = torch.full((len(y),), self.sigma_max, device=y.device)
        prediction = denoise(torch.zeros_like(y), sigma)
        painted, real = (stain_densities(unstandardize(v, stain, "images", self.sigma_data)) for v in (prediction, y))
        weight = 1 + (self.positive_weight - 1) * (real[:, 1:2] >= DAB_THRESHOLD)
        pixels = (weight * (prediction - y).abs()).mean(dim=(1, 2, 3))
        density = (weight * (painted - real).abs()).sum(dim=1).mean(dim=(1, 2))
        part = quarter(y.shape[-2:], step)
        detail = detail_distance(prediction[part], y[part])
        loss = pixels + self.density_weight * density + self.detail_weight * detail
        return loss + self.edge_weight * edge_distance(prediction, y), pixels.detach()
