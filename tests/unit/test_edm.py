"""Preconditioning and loss against their formulas."""

import math

import pytest
import torch
from torch import Tensor

from staindiffuser.training.diffusion.edm import Uncertainty, draw_sigma, edm_loss
from staindiffuser.training.model.denoiser import Denoiser, precondition


def test_preconditioning_is_that_of_edm_table_1_but_for_the_input() -> None:
    c_skip, c_out, c_in, c_noise = (v.item() for v in precondition(torch.tensor(1.5), 0.5))
    assert c_skip == pytest.approx(0.25 / 2.5)
    assert c_out == pytest.approx(1.5 * 0.5 / math.sqrt(2.5))
    assert c_in == pytest.approx(0.5 / 2.5)
    assert c_noise == pytest.approx(math.log(1.5) / 4)


@pytest.mark.parametrize("sigma", [0.002, 0.1, 1.0, 80.0])
def test_network_input_is_the_linear_estimate_and_the_target_has_unit_variance(sigma: float) -> None:
    torch.manual_seed(0)
    y = 0.5 * torch.randn(4, 3, 64, 64)
    n = torch.randn_like(y)
    c_skip, c_out, c_in, _ = precondition(torch.tensor(sigma), 0.5)
    x = y + sigma * n
    estimate = (x.flatten() @ y.flatten()) / (x.flatten() @ x.flatten()) * x  # least squares
    torch.testing.assert_close(c_in * x, estimate / 0.5, atol=0.03, rtol=0.03)
    assert ((y - c_skip * x) / c_out).std().item() == pytest.approx(1, abs=0.03)


def test_untrained_branch_has_a_weighted_error_of_one_at_every_noise_level() -> None:
    torch.manual_seed(0)
    denoiser = Denoiser(lambda x, _: torch.zeros_like(x), 0.5)
    y = 0.5 * torch.randn(6, 3, 64, 64)
    sigma = torch.tensor([0.01, 0.1, 0.5, 2.0, 20.0, 80.0])
    loss, error = edm_loss(denoiser, y, torch.randn_like(y), sigma, Uncertainty())
    torch.testing.assert_close(error, torch.ones(6), atol=0.05, rtol=0)
    torch.testing.assert_close(loss, error)  # u starts at 0


def test_ignored_pixels_do_not_count() -> None:
    denoiser = Denoiser(lambda x, _: torch.zeros_like(x), 0.5)
    y, noise, sigma = torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8), torch.tensor([1.0, 1.0])
    y[:, :, :, 4:] = 100.0
    valid = torch.ones(2, 1, 8, 8)
    valid[:, :, :, 4:] = 0
    _, error = edm_loss(denoiser, y, noise, sigma, Uncertainty(), valid)
    assert error.abs().max() == 0


def test_uncertainty_learns_the_log_of_the_error() -> None:
    """At its optimum u(σ) = ln of the expected weighted error (EDM2, Section 3.2), so the loss per level is 1 + u."""
    torch.manual_seed(0)
    uncertainty = Uncertainty(32)
    optimizer = torch.optim.Adam(uncertainty.parameters(), lr=0.02)
    sigma = torch.tensor([0.1, 10.0]).repeat(8)
    error: Tensor = torch.tensor([0.2, 0.9]).repeat(8)
    for _ in range(400):
        u = uncertainty(sigma)
        loss = (error / u.exp() + u).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(uncertainty(sigma[:2]).exp(), error[:2], atol=0.03, rtol=0)


def test_noise_levels_have_the_asked_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(50_000, generator=generator)
    normal = torch.randn(50_000, generator=generator)
    sigma = draw_sigma(uniform, normal, p_mean=-0.4, p_std=1.6, max_share=0.5, sigma_max=80.0)
    at_max = sigma == 80.0
    assert at_max.float().mean().item() == pytest.approx(0.5, abs=0.01)
    log = sigma[~at_max].log()
    assert log.mean().item() == pytest.approx(-0.4, abs=0.03)
    assert log.std().item() == pytest.approx(1.6, abs=0.03)
