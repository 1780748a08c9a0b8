"""U-Net regression and pix2pix: as large as what they are compared with, learning, resuming, and a GAN in one step."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from staindiffuser.training.baselines.pix2pix import L1_WEIGHT, PatchDiscriminator, Pix2Pix
from staindiffuser.training.baselines.unet import Regression, UNet, matching_unet, parameter_count
from staindiffuser.training.config import PRESETS, ModelConfig, TrainConfig
from staindiffuser.training.data.dataset import CropBatch, CropDataset
from staindiffuser.training.data.targets import load_tile, measure_stains
from staindiffuser.training.errors import DivergedError
from staindiffuser.training.evaluation.metrics import StainScore
from staindiffuser.training.learner import Loss
from staindiffuser.training.loop import fit
from staindiffuser.training.model.network import DualDiffusion, he_to_network
from staindiffuser.training.options import RunOptions
from staindiffuser.training.snapshots import find_snapshot
from staindiffuser.training.tiles.paired_tiles import PairedTiles

CONFIG = TrainConfig(steps=6, batch=4, crop=32, warmup=2, cooldown=0.5, learning_rate=1e-2, bf16=False, workers=0)


def options(folder: Path) -> RunOptions:
    return RunOptions(output=folder, progress="none", log_every=1)


def crops(tiles: PairedTiles, samples: range) -> CropBatch:
    return CropDataset(tiles, crop=32, seed=0).batch(samples)


@pytest.mark.parametrize("preset", ["debug", "demo"])
def test_unet_is_as_large_as_encoder_and_image_branches(preset: str, tiny_model: ModelConfig) -> None:
    model = dataclasses.replace(PRESETS[preset].model, stains=tiny_model.stains)
    with torch.device("meta"):
        network = DualDiffusion(model)
    size = parameter_count(network.encoder) + parameter_count(network.images)
    assert parameter_count(matching_unet(model)) == pytest.approx(size, rel=0.03)


def test_unet_reaches_across_its_levels() -> None:
    torch.manual_seed(0)
    he = torch.randn(1, 3, 96, 96, requires_grad=True)
    net = UNet((8, 12, 16, 20), 6)
    for block in (*net.encode, *net.decode):
        for layer in (1, 4):
            block[layer] = nn.Identity()  # group norm reaches everything
    y = net(he)
    assert y.shape == (1, 6, 96, 96)
    y[0, 0, 48, 48].backward()
    assert he.grad is not None
    assert he.grad[0, 0, 48, 16] != 0  # as far as the coarsest level


def test_regression_learns_to_stain(tiles_folder: Path, tmp_path: Path) -> None:
    tiles = PairedTiles.load(tiles_folder)
    torch.manual_seed(0)
    model = dataclasses.replace(PRESETS["debug"].model, stains=measure_stains(tiles))
    module = Regression(model, dataclasses.replace(CONFIG, steps=80, learning_rate=5e-3))
    fit(module, CropDataset(tiles, crop=32, seed=0), module.config, options(tmp_path))
    scores = {stain: StainScore() for stain in tiles.stains}
    for row in tiles.split("test"):
        data = load_tile(row, tiles.stains)
        images = module.stain_tiles(data["he"][None])
        for stain, score in scores.items():
            score.add(virtual=images[stain][0], real=data[stain], mask=data[f"{stain}_mask"])
    for score in scores.values():
        assert score.metrics()["od_correlation"] > 0.5


@pytest.mark.parametrize("kind", [Regression, Pix2Pix])
def test_interrupted_run_goes_on_as_if_nothing_had_happened(
    kind: type[Regression],
    tiles_folder: Path,
    tiny_model: ModelConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiles = PairedTiles.load(tiles_folder)
    config = dataclasses.replace(CONFIG, checkpoint_steps=2)

    def run(folder: str) -> Regression:
        torch.manual_seed(0)
        module = kind(tiny_model, config)
        first = find_snapshot(tmp_path / folder, True)
        fit(module, CropDataset(tiles, crop=32, seed=0), config, options(tmp_path / folder), first=first)
        return module

    whole = run("whole")
    real = kind.forward

    def killed(module: Regression, batch: CropBatch, step: int) -> Loss:
        if step == 3:
            raise RuntimeError
        return real(module, batch, step)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "forward", killed)
        with pytest.raises(RuntimeError):
            run("parts")
    parts = run("parts")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, parts.state_dict()[name]), name


def test_what_is_not_a_number_stops_the_run(
    tiles_folder: Path, tiny_model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = Regression(tiny_model, CONFIG)
    nn.init.constant_(module.net.head.weight, float("nan"))
    with pytest.raises(DivergedError, match="not finite at step 0"):
        fit(module, CropDataset(PairedTiles.load(tiles_folder), crop=32, seed=0), CONFIG, options(tmp_path))


def test_discriminator_judges_patches_of_70_pixels() -> None:
    discriminator = PatchDiscriminator(9, 4)
    for index, layer in enumerate(discriminator.layers):
        if isinstance(layer, nn.InstanceNorm2d):
            discriminator.layers[index] = nn.Identity()  # its statistics reach everything
    images = torch.randn(1, 9, 128, 128, requires_grad=True)
    logits = discriminator(images)
    assert logits.shape == (1, 1, 14, 14)
    logits[0, 0, 7, 7].backward()
    assert images.grad is not None
    rows = images.grad[0].abs().sum(dim=(0, 2)).nonzero()
    assert rows.max() - rows.min() + 1 == 70


def test_one_backward_pass_gives_each_network_its_own_gradient(tiles_folder: Path, tiny_model: ModelConfig) -> None:
    """As if the generator had been stepped on its loss and the discriminator on its own, as pix2pix does in turn."""
    torch.manual_seed(0)
    module = Pix2Pix(tiny_model, CONFIG)
    batch = crops(PairedTiles.load(tiles_folder), range(2))
    torch.autograd.backward(module(batch, 0).value)

    he, real = he_to_network(batch.he), module.targets(batch)
    virtual, judge = module.net(he), module.discriminator
    entropy = nn.functional.binary_cross_entropy_with_logits
    seen = judge(torch.cat([he, virtual], 1))
    ones, zeros = torch.ones_like(seen), torch.zeros_like(seen)
    generator = L1_WEIGHT * (virtual - real).abs().mean() + entropy(seen, ones)
    discriminator = (entropy(seen, zeros) + entropy(judge(torch.cat([he, real], 1)), ones)) / 2
    for network, loss in ((module.net, generator), (judge, discriminator)):
        parameters = list(network.parameters())
        expected = torch.autograd.grad(loss, parameters, retain_graph=True)
        for parameter, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)
