"""Distances between sets of images, in features that are known."""

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from staindiffuser.errors import DependencyError
from staindiffuser.training.checkpoint import Checkpoint
from staindiffuser.training.evaluation import feature_distances
from staindiffuser.training.evaluation.feature_distances import FeatureNetwork, Features, fid, kid, our_encoder


def textures(count: int, seed: int = 0) -> np.ndarray:
    """Images uint8 [N, 32, 32, 3] of coloured blobs."""
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.standard_normal((count, 32, 32, 3)), (0, 1, 1, 0))
    return np.clip(128 + 200 * noise, 0, 255).astype(np.uint8)


def distance(network: FeatureNetwork, real: np.ndarray, virtual: np.ndarray) -> tuple[float, tuple[float, float]]:
    sides = [Features((network,)) for _ in range(2)]
    for side, images in zip(sides, (real, virtual), strict=True):
        side.add(images, [True] * len(images))
    value, interval = sides[1].distances(sides[0])["kid_encoder"]
    assert interval is not None
    return value, interval


def test_halves_of_a_set_are_close_and_a_blurred_one_is_far(tiny_checkpoint: Path) -> None:
    network = our_encoder(Checkpoint.load(tiny_checkpoint))
    images = textures(80)
    near, (low, high) = distance(network, images[::2], images[1::2])
    blurred = np.stack([ndimage.gaussian_filter(p, (1, 1, 0)) for p in images[1::2]])
    far, (far_low, _) = distance(network, images[::2], blurred)
    assert low < 0 < high
    assert abs(near) < 0.1 * far
    assert far_low > high
    assert distance(network, images[::2], blurred) == (far, (far_low, _))


def cubic(a: np.ndarray, b: np.ndarray) -> float:
    return float((a @ b / len(a) + 1) ** 3)


def test_kid_is_the_kernel_distance_over_all_pairs_of_different_tiles() -> None:
    rng = np.random.default_rng(0)
    real = rng.normal(0, 1, (30, 5))
    virtual = real + rng.normal(0.3, 0.5, (30, 5))
    pairs = [(i, j) for i in range(30) for j in range(30) if i != j]
    same = np.mean([cubic(real[i], real[j]) + cubic(virtual[i], virtual[j]) for i, j in pairs])
    between = np.mean([cubic(real[i], virtual[j]) for i, j in pairs])
    value, (low, high) = kid(torch.tensor(real), torch.tensor(virtual))
    assert value == pytest.approx(same - 2 * between)
    assert low < value < high


def test_kid_of_the_same_tiles_is_not_below_zero() -> None:
    """Tiles differ far more than a tile and its stain do: the estimate for independent sets is then far below zero."""
    rng = np.random.default_rng(0)
    real = rng.normal(0, 3, (64, 6))
    virtual = real + rng.normal(0, 0.1, real.shape)
    independent = np.mean([cubic(a, b) for a in real for b in virtual])
    within = [np.mean([cubic(s[i], s[j]) for i in range(64) for j in range(64) if i != j]) for s in (real, virtual)]
    value, (low, high) = kid(torch.tensor(real), torch.tensor(virtual))
    assert sum(within) - 2 * independent < -1
    assert low < 0 < high
    assert abs(value) < 0.1


def test_kid_wants_the_same_tiles() -> None:
    with pytest.raises(ValueError, match="same tiles"):
        kid(torch.ones(8, 2), torch.zeros(7, 2))


def test_the_interval_of_kid_is_as_wide_as_new_samples_scatter() -> None:
    rng = np.random.default_rng(0)

    def draw() -> tuple[Tensor, Tensor]:
        return torch.tensor(rng.normal(0, 1, (40, 4))), torch.tensor(rng.normal(0.8, 1, (40, 4)))

    results = [kid(*draw()) for _ in range(40)]
    scatter = np.std([value for value, _ in results])
    claimed = np.mean([(high - low) / 2 / 1.96 for _, (low, high) in results])
    assert claimed == pytest.approx(scatter, rel=0.35)


def test_fid_of_shifted_features_is_the_squared_shift() -> None:
    features = torch.randn(200, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert fid(features, features) == pytest.approx(0, abs=1e-6)
    assert fid(features, features + 0.5) == pytest.approx(6 * 0.5**2, abs=1e-6)


def test_too_few_images_have_no_distance_and_a_sample_asks_for_its_own_only() -> None:
    asked = []

    def features(images: np.ndarray) -> Tensor:
        asked.append(len(images))
        return torch.ones(len(images), 3)

    network = FeatureNetwork(name="all", identity="", features=features, fid=True)
    sample = dataclasses.replace(network, name="some", sample=True)
    real, virtual = Features((network, sample)), Features((network, sample))
    for side in (real, virtual):
        side.add(textures(4), [False, True, False, True])
        side.add(textures(2), [False, False])
    assert asked == [4, 2, 2] * 2
    assert set(virtual.distances(real)) == {"kid_all", "fid_all"}  # the sample has two images


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
        feature_distances.published_networks()
