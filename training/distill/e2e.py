"""End-to-end one-step fine-tuning: the network is trained as it is used, in one step from x = 0.

After Garcia et al. 2024 (arXiv 2409.11355), who found that a diffusion model fine-tuned without noise is hard to beat
where the condition decides the image: x = 0 at σ = 80, and losses on the image.

A squared error alone gives the mean of all plausible images, which is blurred: where the grain of a cell lies cannot be
known, but how much of it there is can. So the amplitudes of local spectra are compared as well, which do not depend on
where within a window a detail lies (the "multi-resolution STFT loss" of speech synthesis: Yamamoto et al. 2020, arXiv
1910.11480; here in two dimensions, and weighted).

Shapes: y [B, 3, H, W] standardised; draws and noise are not used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import EllipsisType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from staindiffuser.imaging.optical_density import STAIN_MATRIX
from staindiffuser.training.config import StainConfig
from staindiffuser.training.model.branch import Branch
from staindiffuser.training.model.network import unstandardize

__all__ = [
    "OneStepLoss",
    "dab_density",
    "detail_distance",
    "forget_noise_",
    "local_spectra",
    "pattern_distance",
    "quarter",
]

Denoise = Callable[[Tensor, Tensor], Tensor]

WINDOWS = (8, 16, 32)
"""Sides of the windows of the local spectra, pixels: from a nucleus' rim to a few cells (ours)."""
_FIELD = 8
"""Side of the fields over which a pattern of the pixel grid is averaged, in cells of 2 × 2 pixels (ours)."""
_EPSILON = 1e-8
"""Keeps the gradient of the root finite on bare glass (ours); far below the grain of any scan."""


def dab_density(intensity: Tensor) -> Tensor:
    """DAB's optical density of images in [0, 1], [B, 3, H, W] → [B, 1, H, W], unsmoothed; differentiable.

    The same definition as :func:`staindiffuser.imaging.optical_density.dab_density` without the Gaussian: here every
    pixel counts, not only the mask.
    """
    unmix = torch.linalg.inv(torch.from_numpy(STAIN_MATRIX))[:, 1].to(intensity)
    density = -torch.log10((intensity.clamp(0, 1) * 255 + 1) / 256)
    return torch.einsum("bchw,c->bhw", density, unmix)[:, None]


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
    """Mean squared difference of the local spectra over all windows of all sizes, [B]; both [B, C, H, W]."""
    distances = [
        (local_spectra(painted, side) - local_spectra(real, side)).square().mean(dim=(1, 2, 3, 4, 5))
        for side in WINDOWS
    ]
    return torch.stack(distances).mean(dim=0)


def pattern_distance(painted: Tensor, real: Tensor) -> Tensor:
    """How strong a pattern with the period of the pixel shuffle, two pixels, the painted images have, [B].

    Each output pixel comes from one of four filters, by where it stands in its cell of 2 × 2. Where these differ on
    average over a field, that is no detail of the tissue, whose phase is random, but a faint grid. The local spectra
    do not see it: they take amplitudes together over neighbouring frequencies.

    Args:
        painted, real: [B, C, H, W], sides of at least 16.
    """
    cells = F.pixel_unshuffle(painted - real, 2)
    error = cells.view(len(cells), -1, 4, *cells.shape[2:])
    phases = error - error.mean(dim=2, keepdim=True)
    return F.avg_pool2d(phases.flatten(1, 2), _FIELD).square().mean(dim=(1, 2, 3))


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


@dataclass(frozen=True, kw_only=True)
class OneStepLoss:
    """mean (D(0, σ_max) − y)² + λ · mean (OD(D) − OD(y))² + μ · mean (A(D) − A(y))² + ν · P(D − y), OD being DAB's, A
    the local spectra and P :func:`pattern_distance` (the losses and their weights are ours).

    Squared: an absolute error is least at the median, and the median of a marker that few cells carry is no marker.
    """

    sigma_max: float
    sigma_data: float
    density_weight: float
    """λ: of the loss on DAB's optical density."""
    detail_weight: float
    """μ: of the loss on the local spectra."""
    pattern_weight: float = 0.0
    """ν: of the loss on patterns of the pixel grid."""

    def __call__(
        self, denoise: Denoise, y: Tensor, noise: Tensor, draws: Tensor, stain: StainConfig, step: int
    ) -> tuple[Tensor, Tensor]:
        """The loss per sample [B], and its part on pixels [B]."""
        sigma = torch.full((len(y),), self.sigma_max, device=y.device)
        prediction = denoise(torch.zeros_like(y), sigma)
        pixels = (prediction - y).square().mean(dim=(1, 2, 3))
        painted, real = (dab_density(unstandardize(v, stain, "images", self.sigma_data)) for v in (prediction, y))
        density = (painted - real).square().mean(dim=(1, 2, 3))
        part = quarter(y.shape[-2:], step)
        detail = detail_distance(prediction[part], y[part])
        loss = pixels + self.density_weight * density + self.detail_weight * detail
        return loss + self.pattern_weight * pattern_distance(prediction, y), pixels.detach()
