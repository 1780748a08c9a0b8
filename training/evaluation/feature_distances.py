"""Distances between sets of images in the features of a network, and LPIPS between pairs of them.

One network is always available: a frozen encoder of ours; its KID carries its name, since it is not the published one.
The published networks (Inception-v3, AlexNet) are optional: their packages are an extra, which downloads their weights
on first use into torch's cache.
"""

from __future__ import annotations

import importlib.util
import urllib.error
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from staindiffuser.errors import DependencyError
from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.training.checkpoint import Checkpoint, tensors_sha256
from staindiffuser.training.evaluation.metrics import Interval
from staindiffuser.training.model.network import he_to_network

__all__ = ["FeatureNetwork", "Features", "Networks", "fid", "kid", "our_encoder", "published_networks"]

FEWEST_TILES = 4
"""A smaller set has no KID."""
LARGEST_SET = 4000
SUBSETS = 100


@dataclass(frozen=True, kw_only=True)
class FeatureNetwork:
    """A network that turns images into features."""

    name: str
    """Suffix of the metrics' names: ``kid_<name>``."""
    identity: str
    """Its weights, for reports."""
    features: Callable[[UInt8Array], Tensor]
    """Images uint8 [B, H, W, 3] → features [B, D] on the CPU."""
    fid: bool = False
    """Whether FID is measured too."""
    sample: bool = False
    """Whether it sees only a sample of the tiles."""


@dataclass(frozen=True, kw_only=True)
class Networks:
    """The networks that an evaluation uses."""

    features: tuple[FeatureNetwork, ...] = ()
    lpips: Callable[[UInt8Array, UInt8Array], list[float]] | None = None
    """Two batches of images, uint8 [B, H, W, 3], to the LPIPS of each pair."""

    def identities(self) -> dict[str, str]:
        """Name to weights."""
        return {network.name: network.identity for network in self.features}


@dataclass
class Features:
    """The features of one set of images, network by network, as they are collected."""

    networks: tuple[FeatureNetwork, ...]
    collected: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, images: UInt8Array, sampled: Sequence[bool]) -> None:
        """Add images, uint8 [B, H, W, 3], and which of them are in the sample."""
        for network in self.networks:
            chosen = images[np.array(sampled)] if network.sample else images
            if len(chosen):
                self.collected.setdefault(network.name, []).append(network.features(chosen))

    def distances(self, real: Features) -> dict[str, tuple[float, Interval | None]]:
        """KID, and FID where asked for, to the ``real`` set: value and 95 % interval; none for tiny sets."""
        found: dict[str, tuple[float, Interval | None]] = {}
        for network in self.networks:
            ours, theirs = (torch.cat(side.collected.get(network.name, [torch.zeros(0, 1)])) for side in (self, real))
            if len(ours) < FEWEST_TILES:
                continue
            found[f"kid_{network.name}"] = kid(theirs, ours)
            if network.fid:
                found[f"fid_{network.name}"] = (fid(theirs, ours), None)
        return found


def kid(real: Tensor, virtual: Tensor, *, seed: int = 0) -> tuple[float, Interval]:
    """Kernel distance (Bińkowski et al. 2018, arXiv 1801.01401) of the features [N, D] of N tiles, real and virtual.

    For two independent sets it is estimated from all pairs between them. Ours are not independent: row i of both is the
    same tissue, and including those pairs biases the estimate downwards, below zero where tiles differ much. They are
    left out here, as the diagonal within each set is: the one-sample U-statistic of Gretton et al. 2012 (JMLR 13,
    Equation 4), which is unbiased for paired data.

    Returns:
        The value over all tiles (at most 4,000, drawn at random), and its 95 % interval from a delete-half jackknife
        (Shao and Wu 1989): halves drawn without replacement vary as much as the value of the whole set does.

    Raises:
        ValueError: the sets are not of the same tiles.
    """
    if real.shape != virtual.shape:
        raise ValueError(f"{len(real)} real and {len(virtual)} virtual features must be of the same tiles")
    rng = np.random.default_rng(seed)
    tiles = min(len(real), LARGEST_SET)
    chosen = torch.from_numpy(rng.permutation(len(real))[:tiles])
    x, y = real[chosen].double(), virtual[chosen].double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    between = kernel(x, y)
    h = (kernel(x, x) + kernel(y, y) - between - between.T).fill_diagonal_(0).numpy()

    def value(part: NDArray[np.intp]) -> float:
        return float(h[np.ix_(part, part)].sum() / (len(part) * (len(part) - 1)))

    half = tiles // 2
    deviation = float(np.std([value(rng.permutation(tiles)[:half]) for _ in range(SUBSETS)]))
    reach = 1.96 * deviation * (half / (tiles - half)) ** 0.5
    whole = value(np.arange(tiles))
    return whole, (whole - reach, whole + reach)


def fid(real: Tensor, virtual: Tensor) -> float:
    """Fréchet distance of two sets of features [N, D] (Heusel et al. 2017), by torchmetrics."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    given = nn.Identity()
    given.num_features = real.shape[1]  # type: ignore[assignment]
    metric = FrechetInceptionDistance(given)
    metric.update(real.double(), real=True)
    metric.update(virtual.double(), real=False)
    return float(metric.compute())


def our_encoder(checkpoint: Checkpoint, *, device: str = "cpu") -> FeatureNetwork:
    """A checkpoint's H&E encoder applied to stains: mean and standard deviation per level and channel.

    The standard deviations register blur and noise, which a mean over the image does not.
    """
    encoder = checkpoint.network.encoder
    weights = tensors_sha256(encoder.state_dict().items())[:12]

    @torch.inference_mode()
    def features(images: UInt8Array) -> Tensor:
        levels = encoder.to(device)(he_to_network(torch.tensor(images, device=device)))
        return torch.cat([f(level, (2, 3)) for level in levels for f in (torch.mean, torch.std)], dim=1).cpu()

    return FeatureNetwork(
        name="encoder", identity=f"{checkpoint.config.name}, weights {weights}", features=features, sample=True
    )


def published_networks(*, device: str = "cpu") -> Networks:
    """Inception-v3 for KID and FID, and AlexNet for LPIPS, as torchmetrics uses them.

    Raises:
        DependencyError: a package is not installed, or its weights are neither cached nor downloadable.
    """
    for module, package in (("torch_fidelity", "torch-fidelity"), ("torchvision", "torchvision")):
        if importlib.util.find_spec(module) is None:
            raise DependencyError(f"{package} is not installed: pip install 'staindiffuser[metrics]'")
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
    except (ImportError, RuntimeError) as error:  # compiled for one build of torch
        what = f"torchvision does not fit torch {torch.__version__} ({error})"
        raise DependencyError(f"{what}: install the build that does") from error
    try:
        inception = NoTrainInceptionV3(name="inception-v3-compat", features_list=["2048"]).to(device)
        lpips = LearnedPerceptualImagePatchSimilarity("alex", reduction="none", normalize=True).to(device)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        folder = f"{torch.hub.get_dir()}/checkpoints"
        raise DependencyError(
            f"the weights of Inception-v3 or AlexNet cannot be downloaded ({error}): put the files that torch-fidelity "
            f"and torchvision ask for into {folder}"
        ) from error

    @torch.inference_mode()
    def features(images: UInt8Array) -> Tensor:
        found: Tensor = inception(torch.tensor(images, device=device).permute(0, 3, 1, 2))
        return found.cpu()

    @torch.inference_mode()
    def similarity(a: UInt8Array, b: UInt8Array) -> list[float]:
        pair = (torch.tensor(p, device=device).permute(0, 3, 1, 2).float() / 255 for p in (a, b))
        return [float(value) for value in lpips(*pair).reshape(-1)]

    network = FeatureNetwork(name="inception", identity="Inception-v3 of torch-fidelity", features=features, fid=True)
    return Networks(features=(network,), lpips=similarity)
