"""One-step fine-tuning: what its loss asks for, and a branch that is blind to noise."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from staindiffuser.imaging import optical_density
from staindiffuser.imaging.optical_density import STAIN_MATRIX
from staindiffuser.training.checkpoint import Checkpoint
from staindiffuser.training.config import PRESETS, StainConfig
from staindiffuser.training.distill.e2e import (
    OneStepLoss,
    detail_distance,
    edge_distance,
    forget_noise_,
    local_spectra,
    quarter,
    stain_densities,
)
from staindiffuser.training.model.branch import Branch
from staindiffuser.training.model.layers import normalize_weight_
from staindiffuser.training.model.network import standardize

STAIN = StainConfig(name="cd3", label="CD3")


def test_stain_densities_are_those_of_the_metric() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    expected = optical_density.unmix(optical_density.optical_density(rgb))
    found = stain_densities(torch.from_numpy(rgb).permute(2, 0, 1)[None].double() / 255)
    assert found.shape == (1, 3, 5, 7)
    np.testing.assert_allclose(found[0].permute(1, 2, 0).numpy(), expected, atol=1e-5)


def ihc(hematoxylin: float, dab: float, residual: float = 0.0) -> Tensor:
    """A standardised image of one colour, [1, 3, 32, 32]."""
    density = torch.tensor([hematoxylin, dab, residual]) @ torch.from_numpy(STAIN_MATRIX).float()
    intensity = (256 * 10**-density - 1) / 255
    return standardize(intensity.view(1, 3, 1, 1).expand(1, 3, 32, 32), STAIN, "images", 0.5)


def loss_of(painted: Tensor, real: Tensor, **weights: float) -> float:
    """The mean loss of painting ``painted`` where ``real`` [B, 3, H, W] is true."""
    asked = OneStepLoss(sigma_max=80.0, sigma_data=0.5, **{"density_weight": 0.0, "detail_weight": 0.0, **weights})
    loss, _ = asked(lambda x, sigma: painted.expand_as(x), real, real, torch.zeros(len(real), 2), STAIN, 0)
    return loss.mean().item()


def test_a_wrong_hue_costs_as_much_as_the_wrong_amount_of_brown() -> None:
    """DAB's density alone is blind to it: brown may turn pink or violet along the residual."""
    brown = (0.1, 0.5, 0.0)
    for number in range(3):
        wrong = ihc(*(value + 0.1 * (number == n) for n, value in enumerate(brown)))
        density = loss_of(wrong, ihc(*brown), density_weight=1.0) - loss_of(wrong, ihc(*brown))
        assert density == pytest.approx(0.1, rel=0.02), number


@pytest.mark.parametrize(("positive", "chosen"), [(2, "blue"), (3, "blue"), (4, "brown"), (8, "brown")])
def test_a_place_that_is_positive_in_a_third_of_the_cases_is_painted_brown_and_nothing_between(
    positive: int, chosen: str
) -> None:
    colours = {"blue": ihc(0.3, 0.0), "violet": ihc(0.25, 0.25), "brown": ihc(0.2, 0.5)}
    real = torch.cat([colours["brown" if n < positive else "blue"] for n in range(10)])
    losses = {name: loss_of(y, real, density_weight=3.0, positive_weight=2.0) for name, y in colours.items()}
    assert min(losses, key=losses.__getitem__) == chosen, losses


def test_local_spectra_find_a_wave_wherever_it_lies() -> None:
    place = torch.arange(32.0)
    for shift in (0.0, 1.7):
        wave = torch.cos(2 * math.pi * 4 / 16 * (place + shift)).expand(1, 1, 32, 32)
        spectra = local_spectra(wave, 16)
        assert spectra.shape == (1, 1, 3, 3, 16, 9)
        # the amplitude of a wave of 1 under a window of mean 1/4 in each of 16² pixels, halved, times its frequency;
        # halved again, since in each direction its power is 1 at the centre and 1/4 at the neighbours of three
        torch.testing.assert_close(spectra[..., 0, 4], torch.full((1, 1, 3, 3), 16 * 0.25 / 4 * 4), rtol=1e-3, atol=0)
    assert local_spectra(torch.ones(1, 1, 32, 32), 16)[..., 0, 0].abs().max() == 0


def test_detail_is_not_met_by_a_blur_nor_by_a_pattern_and_is_by_the_same_grain_elsewhere() -> None:
    generator = torch.Generator().manual_seed(0)

    def grain() -> Tensor:
        return torch.nn.functional.avg_pool2d(torch.randn(1, 1, 130, 130, generator=generator), 3, 1)

    real, other, blurred = grain(), grain(), torch.zeros(1, 1, 128, 128)
    rows = torch.arange(128)
    pattern = torch.where((rows[:, None] // 4 + rows // 4) % 2 == 0, 1.0, -1.0)[None, None] * real.std()
    moved = real.roll((1, 1), (2, 3))
    found = {
        name: detail_distance(painted, real).item()
        for name, painted in {"moved": moved, "other": other, "blurred": blurred, "pattern": pattern}.items()
    }
    assert detail_distance(real, real).item() == 0
    assert found["moved"] < found["other"] < 0.4 * min(found["blurred"], found["pattern"]), found
    best = min((0.7, 0.78, 0.86, 0.98, 1.1), key=lambda power: detail_distance(power**0.5 * other, real).item())
    assert best == 0.98  # 0.86 if what is missing counted like what is too much, and π / 4 with plain amplitudes
    # which pixel by pixel is the other way around
    assert (other - real).square().mean() > 1.5 * (blurred - real).square().mean()


def test_spectra_leave_a_colour_to_the_pixels() -> None:
    """An amplitude has no sign: if the mean leaked into it, white would be as good as its mirror image."""
    real = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert detail_distance(real + 0.5, real).item() < 1e-6
    flat = torch.zeros(1, 3, 64, 64)
    assert detail_distance(flat - 0.5, flat + 0.5).item() < 1e-6
    assert detail_distance(0.5 * real, real).item() > 0.01


def test_edges_see_the_texture_of_nuclei_and_not_where_the_brown_lies() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(2, 3, 64, 64, generator=generator)
    place = torch.arange(64.0)
    ramp, waves = 0.5 * place / 63, 0.1 * torch.cos(math.pi * place)
    assert edge_distance(real, real).tolist() == [0, 0]
    assert edge_distance(real + 0.5, real).max() < 1e-6
    assert edge_distance(real + ramp, real).tolist() == pytest.approx([0.5 / 63] * 2, rel=1e-3)
    for texture in (waves, waves[:, None]):
        assert edge_distance(real + texture, real).tolist() == pytest.approx([0.2, 0.2], rel=1e-3)


def test_the_quarters_of_four_steps_are_the_crop() -> None:
    seen = torch.zeros(128, 160)
    for step in range(40, 44):
        seen[quarter((128, 160), step)] += 1
    assert seen.eq(1).all()
    assert seen[quarter((96, 96), 3)].shape == seen.shape


def test_an_untrained_branch_has_no_grid() -> None:
    """ICNR: whatever the gains become, as long as they are alike, a flat field stays flat."""
    branch = Branch(PRESETS["debug"].model.image, PRESETS["debug"].model.features, 3, 32)
    with torch.no_grad():
        assert branch.head.gain is not None
        branch.head.gain.fill_(1.0)
        cells = branch.head(torch.randn(1, 16, 8, 8)).unflatten(1, (3, 4))
    assert cells.std() > 0.1
    assert torch.equal(cells[:, :, 0], cells[:, :, 3])


def test_one_step_loss_asks_for_pixels_density_and_detail() -> None:
    asked: list[tuple[Tensor, Tensor]] = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        asked.append((x, sigma))
        return y + 0.1

    y = torch.zeros(2, 3, 32, 32)
    losses = []
    for density_weight, detail_weight in ((0.0, 0.0), (4.0, 0.0), (0.0, 3.0)):
        loss, pixels = OneStepLoss(
            sigma_max=80.0, sigma_data=0.5, density_weight=density_weight, detail_weight=detail_weight
        )(denoise, y, y, torch.zeros(2, 2), STAIN, 0)
        assert pixels.tolist() == pytest.approx([0.1, 0.1])
        losses.append(loss)
    assert not asked[0][0].any()
    assert asked[0][1].tolist() == [80.0, 80.0]
    # STAIN's mean is 0.5 and its standard deviation 0.25: 0.1 of the standardised target is 0.05 of intensity
    lighter, darker = (stain_densities(torch.full((1, 3, 1, 1), v)) for v in (0.55, 0.5))
    density = (lighter - darker).abs().sum().item()
    assert losses[0].tolist() == pytest.approx([0.1, 0.1])
    assert losses[1][0].item() == pytest.approx(0.1 + 4 * density, rel=1e-4)
    assert losses[2][0].item() == pytest.approx(0.1 + 3 * detail_distance(y + 0.1, y)[0].item(), rel=1e-4)


def test_a_branch_that_forgot_noise_paints_the_same_from_any(tiny_checkpoint: Path) -> None:
    network = Checkpoint.load(tiny_checkpoint).network
    branch = network.branch("images", "cd3")
    injections = branch.attend(network.encoder(torch.rand(1, 3, 32, 32)))

    def painted(x: Tensor) -> Tensor:
        return branch(x, torch.ones(1), injections)

    x, nothing = torch.randn(1, 3, 32, 32), torch.zeros(1, 3, 32, 32)
    expected = painted(nothing)
    assert not torch.allclose(painted(x), expected, atol=0.01)
    forget_noise_(network.images)
    normalize_weight_(network.images)  # as after an optimiser step
    assert torch.allclose(painted(nothing), expected, atol=1e-3)
    assert torch.equal(painted(x), painted(nothing))
