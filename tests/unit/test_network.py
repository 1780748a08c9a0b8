"""The properties that docs/explanation/model.md promises of the network."""

import dataclasses

import numpy as np
import pytest
import torch

from staindiffuser.training import receptive
from staindiffuser.training.checkpoint import Checkpoint
from staindiffuser.training.config import PRESETS, ModelConfig, StainConfig
from staindiffuser.training.infer import stain_tiles
from staindiffuser.training.model.network import DualDiffusion, he_to_network, standardize, unstandardize
from staindiffuser.training.receptive import default_margin, theoretical_radius


@pytest.fixture(scope="module")
def network(tiny_checkpoint):
    return Checkpoint.load(tiny_checkpoint).network


def tissue(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (1, size, size, 3), dtype=np.uint8)


def run(network: DualDiffusion, he: np.ndarray, origin: tuple[int, int] = (0, 0)) -> dict[str, np.ndarray]:
    return stain_tiles(
        network, he, sigmas=(80.0, 1.5), seeds=np.zeros((1, 1), np.int64), origins=np.array([origin], np.int64)
    )


def test_shift_by_16_pixels_shifts_the_result(network: DualDiffusion) -> None:
    he = tissue(384)
    radius = theoretical_radius(network.config)
    whole = run(network, he)
    part = run(network, he[:, 16:, 32:], origin=(32, 16))
    for name, result in whole.items():
        inner = slice(radius, 352 - radius)
        difference = np.abs(result[0, 16:, 32:][inner, inner].astype(int) - part[name][0][inner, inner])
        assert difference.max() <= 1, name  # the order of float sums may turn a rounding


def test_receptive_radius_bounds_the_influence_of_a_pixel(network: DualDiffusion) -> None:
    features = []
    radius = theoretical_radius(network.config)
    size = (2 * radius + 64) // 16 * 16
    for value in (0, 255):
        he = np.full((1, size, size, 3), 128, np.uint8)
        he[0, size // 2, size // 2] = value
        with torch.inference_mode():
            pyramid = network.encoder(he_to_network(torch.from_numpy(he)))
            denoise = network.denoiser("images", "cd3", pyramid)
            features.append(denoise(torch.zeros(1, 3, size, size), 1.0))
    rows = (features[0] - features[1]).abs().amax(dim=(0, 1, 3)).nonzero().flatten()
    reach = max(size // 2 - int(rows[0]), int(rows[-1]) - size // 2)
    assert reach <= radius
    assert reach > radius // 2  # the bound is not idle


def test_stains_do_not_see_each_other(network: DualDiffusion) -> None:
    he = tissue(64)
    before = run(network, he)
    changed = DualDiffusion(network.config)
    changed.load_state_dict(network.state_dict())
    with torch.no_grad():
        for parameter in changed.branch("images", "ck818").parameters():
            parameter.add_(0.5)
    after = run(changed, he)
    assert np.array_equal(before["STAIN_CD3"], after["STAIN_CD3"])
    assert not np.array_equal(before["STAIN_CK818"], after["STAIN_CK818"])


def test_untrained_branches_ignore_the_features(tiny_model: ModelConfig) -> None:
    fresh = DualDiffusion(tiny_model).eval()
    assert np.array_equal(run(fresh, tissue(64, 1))["STAIN_CD3"], run(fresh, tissue(64, 2))["STAIN_CD3"])


def test_standardised_targets_have_mean_0_and_deviation_sigma_data() -> None:
    torch.manual_seed(0)
    stain = StainConfig(name="a", label="A", image_mean=(0.8, 0.6, 0.4), image_std=(0.1, 0.2, 0.3))
    std = torch.tensor(stain.image_std).view(1, 3, 1, 1)
    value = torch.tensor(stain.image_mean).view(1, 3, 1, 1) + std * torch.randn(4, 3, 64, 64)
    y = standardize(value, stain, "images", 0.5)
    assert y.mean(dim=(0, 2, 3)).abs().max() < 0.02
    torch.testing.assert_close(y.std(dim=(0, 2, 3)), torch.full((3,), 0.5), atol=0.02, rtol=0)
    torch.testing.assert_close(unstandardize(y, stain, "images", 0.5), value)


@pytest.mark.parametrize(("preset", "millions"), [("debug", 0.27), ("demo", 3.2)])
def test_presets_have_their_documented_size(preset: str, millions: float) -> None:
    stains = (StainConfig(name="cd3", label="CD3"), StainConfig(name="ck818", label="CK8/18"))
    network = DualDiffusion(dataclasses.replace(PRESETS[preset].model, stains=stains))
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, rel=0.05)


def test_base_image_branch_has_about_40_million_parameters() -> None:
    config = PRESETS["base"].model
    with torch.device("meta"):
        network = DualDiffusion(dataclasses.replace(config, stains=(StainConfig(name="cd3", label="CD3"),)))
    assert sum(p.numel() for p in network.images.parameters()) / 1e6 == pytest.approx(40, rel=0.15)


def test_effective_radius_is_not_hidden_by_a_mean(monkeypatch: pytest.MonkeyPatch, tiny_model: ModelConfig) -> None:
    def stained(network: DualDiffusion, he: np.ndarray, **_: object) -> dict[str, np.ndarray]:
        image = np.zeros((*he.shape[:3], 3), np.uint8)
        if he.shape[2] == 64:  # the half whose context was cut away: two rows in a hundred differ, down to depth 20
            image[:, 10:12, :20] = 10
        return {"STAIN_CD3": image}

    monkeypatch.setattr(receptive, "stain_tiles", stained)
    he = np.zeros((2, 100, 128, 3), np.uint8)
    assert receptive.effective_radius(DualDiffusion(tiny_model), he, sigmas=(80.0,)) == 20
    assert receptive.effective_radius(DualDiffusion(tiny_model), he, sigmas=(80.0,), threshold=10) == 0


@pytest.mark.parametrize(
    ("radius", "tile", "margin"), [(10, 256, 16), (15, 256, 16), (16, 256, 32), (90, 256, 32), (60, 512, 64)]
)
def test_default_margin_covers_the_effective_radius_as_far_as_it_pays(radius: int, tile: int, margin: int) -> None:
    assert default_margin(radius, tile) == margin
    assert (tile / (tile - 2 * margin)) ** 2 <= 1.8


def test_a_radius_beyond_the_images_is_the_theoretical_one(
    tiny_model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of an image is all that can be seen of it, and a margin of half an image was once taken for measured."""

    def stained(_network: DualDiffusion, he: np.ndarray, **_: object) -> dict[str, np.ndarray]:
        return {"STAIN_CD3": np.broadcast_to(np.uint8(he.shape[2] % 251), he.shape)}

    monkeypatch.setattr(receptive, "stain_tiles", stained)
    he = np.zeros((1, 32, 128, 3), np.uint8)
    found = receptive.effective_radius(DualDiffusion(tiny_model), he, sigmas=(80.0,))
    assert found == receptive.theoretical_radius(tiny_model) > 64
