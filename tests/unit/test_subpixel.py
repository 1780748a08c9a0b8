"""A convolution that is pixel-shuffled: no grid where the features are smooth, detail where they are not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from staindiffuser.training.model.layers import MPConv
from staindiffuser.training.model.subpixel import phase_errors, without_grid_


def head(*, gain: float) -> MPConv:
    torch.manual_seed(0)
    layer = MPConv(5, 12, 3, after_silu=True, bias=True, gain=gain)
    assert layer.bias is not None
    with torch.no_grad():
        layer.bias.copy_(torch.randn(12))
    return layer


def painted(layer: MPConv, features: Tensor) -> Tensor:
    """[5, H, W] → [3, 2 H − 8, 2 W − 8], without what the border reaches."""
    with torch.no_grad():
        return F.pixel_shuffle(layer(features[None]), 2)[0, :, 4:-4, 4:-4]


@pytest.mark.parametrize("gain", [0.7, -0.7])
def test_smooth_features_give_a_smooth_image(gain: float) -> None:
    layer = head(gain=gain)
    slope = torch.randn(5, 1, 1, generator=torch.Generator().manual_seed(1))
    place = torch.arange(16.0)
    ramp = 2 + slope * place[:, None] - 2 * slope * place
    before = painted(layer, ramp)
    without_grid_(layer)
    after = painted(layer, ramp)
    for axis in (1, 2):  # affine features, affine image: no step between pixels differs from the next
        assert before.diff(n=2, dim=axis).abs().max() > 1
        assert after.diff(n=2, dim=axis).abs().max() < 1e-4
        assert after.diff(dim=axis).abs().min() > 0.01


def test_the_nearest_weights_are_taken_and_keep_detail() -> None:
    layer = head(gain=0.7)
    plain = layer.plain_weight().detach()
    without_grid_(layer)
    projected = layer.plain_weight().detach()
    assert phase_errors(plain).abs().max() > 0.1
    assert phase_errors(projected).abs().max() < 1e-5
    # Nine conditions of 36 weights: of random ones a quarter goes, and what goes is orthogonal to what stays.
    change = plain - projected
    assert (change.square().sum() / plain.square().sum()).item() == pytest.approx(9 / 36, abs=0.07)
    assert (change * projected).sum().abs() < 1e-4 * plain.square().sum()
    without_grid_(layer)
    torch.testing.assert_close(layer.plain_weight().detach(), projected, atol=1e-5, rtol=0)
    dot = torch.zeros(5, 16, 16)
    dot[:, 8, 8] = 1
    cells = torch.unflatten(F.pixel_unshuffle(painted(layer, dot)[None], 2)[0], 0, (3, 4))
    assert (cells - cells.mean(dim=1, keepdim=True)).abs().max() > 0.1


def test_a_layer_without_gain_keeps_its_direction() -> None:
    layer = head(gain=0.0)
    weight = layer.weight.detach().clone()
    without_grid_(layer)
    assert torch.equal(layer.weight.detach(), weight)
    assert layer.gain is not None
    assert layer.gain.abs().max() == 0
