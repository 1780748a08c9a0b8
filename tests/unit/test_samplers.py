"""Samplers on a toy whose perfect denoiser is known: data ~ N(μ, s²) per pixel."""

import math

import pytest
import torch
from torch import Tensor

from staindiffuser.training.diffusion.samplers import START_SIGMAS, few_step, heun, karras_sigmas

MEAN, STD = 0.3, 0.5
GOLDEN = [-0.4934155, 0.1924965, 0.2980214, 0.6673587, 1.3532707]
"""Heun, 18 steps, from scalar Python written apart from the sampler."""


def perfect(x: Tensor, sigma: float) -> Tensor:
    """E[y | x] for y ~ N(MEAN, STD²), x = y + σ n."""
    return MEAN + (x - MEAN) * STD**2 / (STD**2 + sigma**2)


def exact(noise: Tensor) -> Tensor:
    """The probability-flow ODE of this toy is solved by scaling: x(0) = μ + (x(σ) − μ) s / √(s² + σ²)."""
    return MEAN + (80 * noise - MEAN) * STD / math.sqrt(STD**2 + 80**2)


def test_heun_turns_noise_into_the_data_distribution_and_is_of_second_order() -> None:
    noise = torch.randn(1, 1, 100, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors = [(heun(perfect, noise, steps=steps) - exact(noise)).abs().mean().item() for steps in (18, 36, 72)]
    assert errors[0] < 0.03
    assert errors[0] / errors[1] > 3
    assert errors[1] / errors[2] > 3


def test_heun_golden_numbers() -> None:
    noise = torch.tensor([-1.5, -0.2, 0.0, 0.7, 2.0], dtype=torch.float64).view(1, 1, 1, 5)
    golden = torch.tensor(GOLDEN, dtype=torch.float64)
    torch.testing.assert_close(heun(perfect, noise).flatten(), golden, atol=1e-6, rtol=0)


def test_few_steps_follow_the_formula() -> None:
    z = list(torch.randn(4, 1, 1, 2, 2, generator=torch.Generator().manual_seed(0)))
    x = 80.0 * z[0]
    for sigma, after, noise in zip((80.0, 21.4, 4.2), (21.4, 4.2, 0.5), z[1:], strict=True):
        x = perfect(x, sigma) + after * noise
    torch.testing.assert_close(few_step(perfect, z, START_SIGMAS[4]), perfect(x, 0.5))


def test_one_step_with_a_perfect_denoiser_gives_the_mean() -> None:
    y = few_step(perfect, [torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))], [80.0])
    assert y.std().item() < 0.01
    assert y.mean().item() == pytest.approx(MEAN, abs=0.01)


def test_noise_levels_run_from_sigma_max_to_zero() -> None:
    sigmas = karras_sigmas(18, sigma_max=80, sigma_min=0.002)
    assert sigmas[0] == pytest.approx(80)
    assert sigmas[-2:] == [pytest.approx(0.002), 0.0]
    assert sigmas == sorted(sigmas, reverse=True)


def test_wrong_number_of_noise_fields_is_refused() -> None:
    with pytest.raises(ValueError, match="2 steps need as many noise fields, got 1"):
        few_step(perfect, [torch.zeros(1, 1, 2, 2)], [80.0, 1.0])
