"""Magnitude-preserving layers: what goes in with unit variance comes out with unit variance."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from staindiffuser.training.model.layers import MPConv, NoiseEmbedding, mp_sum, normalize_weight_


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1)


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (2, 2)])
def test_convolution_preserves_magnitude_whatever_the_scale_of_its_weights(kernel: int, stride: int) -> None:
    layer = MPConv(64, 64, kernel, stride=stride)
    with torch.no_grad():
        layer.weight.mul_(17.0)
    y = layer(torch.randn(8, 64, 32, 32))[..., 2:-2, 2:-2]
    assert y.std().item() == pytest.approx(1, abs=0.05)


def test_convolution_restores_the_magnitude_that_silu_takes() -> None:
    y = MPConv(128, 128, 3, after_silu=True)(F.silu(torch.randn(4, 128, 32, 32)))[..., 1:-1, 1:-1]
    assert y.std().item() == pytest.approx(1, abs=0.08)


def test_sum_and_embedding_preserve_magnitude() -> None:
    x, y = torch.randn(2, 100_000)
    assert mp_sum(x, y, 0.3).std().item() == pytest.approx(1, abs=0.02)
    features = NoiseEmbedding(512).linear(torch.randn(64, 512))
    assert features.std().item() == pytest.approx(1, abs=0.05)


def test_forced_normalisation_changes_the_weights_but_not_the_function() -> None:
    layer = nn.Sequential(MPConv(8, 8, 3))
    x = torch.randn(1, 8, 16, 16)
    first = layer[0]
    assert isinstance(first, MPConv)
    with torch.no_grad():
        first.weight.mul_(3.0)
    before = layer(x)
    normalize_weight_(layer)
    torch.testing.assert_close(layer(x), before, rtol=1e-3, atol=1e-3)
    assert first.weight.flatten(1).square().mean(1).sub(1).abs().max() < 1e-3


def test_gain_scales_each_output_channel() -> None:
    layer = MPConv(4, 2, 1, gain=0.0)
    x = torch.randn(1, 4, 3, 3)
    assert layer(x).abs().max() == 0
    assert layer.gain is not None
    with torch.no_grad():
        layer.gain[1] = 2.0
    assert layer(x)[:, 0].abs().max() == 0
    assert layer(x)[:, 1].abs().max() > 0
