"""Distances between sets of pictures, in features that are known."""

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from staindiffuser.errors import DependencyError
from staindiffuser.training import perceptual
from staindiffuser.training.checkpoint import Checkpoint
from staindiffuser.training.perceptual import FeatureNetwork, Features, fid, kid, our_encoder


def textures(count: int, seed: int = 0) -> np.ndarray:
    """Pictures uint8 [N, 32, 32, 3] of coloured blobs."""
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.standard_normal((count, 32, 32, 3)), (0, 1, 1, 0))
    return np.clip(128 + 200 * noise, 0, 255).astype(np.uint8)


def distance(network: FeatureNetwork, real: np.ndarray, virtual: np.ndarray) -> tuple[float, tuple[float, float]]:
    sides = [Features((network,)) for _ in range(2)]
    for side, pictures in zip(sides, (real, virtual), strict=True):
        side.add(pictures, [True] * len(pictures))
    value, interval = sides[1].distances(sides[0])["kid_encoder"]
    assert interval is not None
    return value, interval


def test_halves_of_a_set_are_close_and_a_blurred_one_is_far(tiny_checkpoint: Path) -> None:
    network = our_encoder(Checkpoint.load(tiny_checkpoint))
    pictures = textures(80)
    near, (low, high) = distance(network, pictures[::2], pictures[1::2])
    blurred = np.stack([ndimage.gaussian_filter(p, (1, 1, 0)) for p in pictures[1::2]])
    far, (far_low, _) = distance(network, pictures[::2], blurred)
    assert low < 0 < high
    assert abs(near) < 0.1 * far
    assert far_low > high
    assert distance(network, pictures[::2], blurred) == (far, (far_low, _))


def test_kid_is_the_unbiased_kernel_distance_of_the_whole_sets() -> None:
    rng = np.random.default_rng(0)
    real, virtual = rng.normal(0, 1, (60, 5)), rng.normal(0.3, 1.2, (60, 5))

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 5 + 1) ** 3)

    def within(points: np.ndarray) -> float:
        pairs = [kernel(a, b) for i, a in enumerate(points) for j, b in enumerate(points) if i != j]
        return float(np.mean(pairs))

    expected = within(real) + within(virtual) - 2 * np.mean([kernel(a, b) for a in real for b in virtual])
    value, (low, high) = kid(torch.tensor(real), torch.tensor(virtual))
    assert low < expected < high
    assert value == pytest.approx(expected, abs=0.15 * (high - low))


def test_the_interval_of_kid_is_as_wide_as_new_samples_scatter() -> None:
    rng = np.random.default_rng(0)

    def draw() -> tuple[Tensor, Tensor]:
        return torch.tensor(rng.normal(0, 1, (40, 4))), torch.tensor(rng.normal(0.8, 1, (40, 4)))

    results = [kid(*draw()) for _ in range(40)]
    scatter = np.std([value for value, _ in results])
    claimed = np.mean([(high - low) / 2 / 1.96 for _, (low, high) in results])
    assert claimed == pytest.approx(scatter, rel=0.35)


def test_kid_leaves_torch_s_random_numbers_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    kid(torch.ones(8, 2), torch.zeros(8, 2))
    assert torch.equal(torch.rand(4), expected)


def test_fid_of_shifted_features_is_the_squared_shift() -> None:
    features = torch.randn(200, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert fid(features, features) == pytest.approx(0, abs=1e-6)
    assert fid(features, features + 0.5) == pytest.approx(6 * 0.5**2, abs=1e-6)


def test_too_few_pictures_have_no_distance_and_a_sample_asks_for_its_own_only() -> None:
    asked = []

    def features(pictures: np.ndarray) -> Tensor:
        asked.append(len(pictures))
        return torch.ones(len(pictures), 3)

    network = FeatureNetwork(name="all", identity="", features=features, fid=True)
    sample = dataclasses.replace(network, name="some", sample=True)
    real, virtual = Features((network, sample)), Features((network, sample))
    for side in (real, virtual):
        side.add(textures(4), [False, True, False, True])
        side.add(textures(2), [False, False])
    assert asked == [4, 2, 2] * 2
    assert set(virtual.distances(real)) == {"kid_all", "fid_all"}  # the sample has two pictures


def test_an_encoder_says_which_it_is(tiny_checkpoint: Path) -> None:
    checkpoint = Checkpoint.load(tiny_checkpoint)
    identity = our_encoder(checkpoint).identity
    assert identity.startswith("tiny, weights ")
    next(checkpoint.network.encoder.parameters()).data += 1
    assert our_encoder(checkpoint).identity != identity


@pytest.mark.parametrize("missing", ["torch_fidelity", "torchvision"])
def test_published_networks_that_are_not_installed_are_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else object())
    with pytest.raises(DependencyError, match=missing.replace("_", "-") + " is not installed: pip install"):
        perceptual.published_networks()
