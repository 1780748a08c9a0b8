"""Easy consistency tuning: the schedule and the loss against hand values."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from staindiffuser.training.config import StainConfig
from staindiffuser.training.distill.ect import ConsistencyLoss, consistency_loss, lower_level, stage_of

STAIN = StainConfig(name="cd3", label="CD3")


class Line:
    """A toy denoiser D(x, t) = a x / (1 + t), with a learned."""

    def __init__(self) -> None:
        self.a = torch.tensor(2.0, requires_grad=True)
        self.calls: list[tuple[Tensor, bool]] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls.append((t.clone(), torch.is_grad_enabled()))
        return self.a * x / (1 + t).view(-1, 1, 1, 1)


@pytest.mark.parametrize(
    ("t", "stage", "expected"),
    [
        # n(0) would be 1 + 8 / 2 = 5, n(1) = 1 + 8 / (1 + e), n(80) = 1 to 34 digits
        (80.0, 0, 80 * (1 - 1 / 4)),
        (80.0, 3, 80 * (1 - 1 / 256)),
        (1.0, 0, 1 - (1 + 8 / (1 + math.e)) / 4),
        (1.0, 2, 1 - (1 + 8 / (1 + math.e)) / 64),
        (0.5, 0, 0.0),  # n = 4.02: more than q, so the clamp holds
        (0.002, 1, 0.002 * (1 - (1 + 8 / (1 + math.exp(0.002))) / 16)),
    ],
)
def test_lower_level_by_hand(t: float, stage: int, expected: float) -> None:
    assert lower_level(torch.tensor([t], dtype=torch.float64), stage).item() == pytest.approx(expected, abs=1e-12)


def test_each_stage_brings_the_levels_closer() -> None:
    t = torch.logspace(-2.7, 1.9, 200, dtype=torch.float64)
    levels = torch.stack([lower_level(t, stage) for stage in range(4)])
    assert (levels[0] == 0).any()
    assert (levels[1:] > 0).all()
    assert (levels.diff(dim=0) > 0).all()
    assert (levels < t).all()
    assert (levels.diff(dim=1) >= 0).all()  # and r grows with t


def test_stages_are_equal_parts_of_the_run() -> None:
    stages = [stage_of(step, 10, 4) for step in range(11)]
    assert stages == sorted(stages)
    assert [stages[:10].count(s) for s in range(4)] == [3, 2, 3, 2]
    assert stages[10] == 3


@pytest.mark.parametrize("weighting", ["step", "flat"])
def test_consistency_loss_by_hand(weighting: Any) -> None:
    y, noise = torch.full((1, 1, 2, 2), 0.5), torch.ones(1, 1, 2, 2)
    t, r = torch.tensor([3.0]), torch.tensor([1.0])
    # D(0.5 + 3, 3) = 2 · 3.5 / 4 = 1.75;  D(0.5 + 1, 1) = 2 · 1.5 / 2 = 1.5
    loss, distance = consistency_loss(Line(), y, noise, t, r, weighting=weighting, sigma_data=0.5)
    c_out = 3 * 0.5 / math.sqrt(9 + 0.25)
    assert distance.item() == pytest.approx(0.25, abs=1e-5)
    expected = {"step": 0.25 / 2, "flat": 0.25 / c_out}[weighting]
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    # against the real image: 1.75 − 0.5, and flat is the teacher's squared loss there
    loss, _ = consistency_loss(Line(), y, noise, t, torch.zeros(1), weighting=weighting, sigma_data=0.5)
    assert loss.item() == pytest.approx({"step": 1.25 / 3, "flat": (1.25 / c_out) ** 2}[weighting], rel=1e-5)


def test_target_is_the_image_where_r_is_zero() -> None:
    y, noise = torch.full((2, 1, 2, 2), 0.5), torch.ones(2, 1, 2, 2)
    t, r = torch.tensor([3.0, 3.0]), torch.tensor([0.0, 1.0])
    _, distance = consistency_loss(Line(), y, noise, t, r, weighting="step", sigma_data=0.5)
    assert distance.tolist() == pytest.approx([1.75 - 0.5, 0.25], abs=1e-5)
    line = Line()
    _, distance = consistency_loss(line, y, noise, t, torch.zeros(2), weighting="step", sigma_data=0.5)
    assert distance.tolist() == pytest.approx([1.25, 1.25], abs=1e-5)
    assert len(line.calls) == 1  # nothing to compute for the target


def test_gradient_flows_through_the_first_term_only() -> None:
    y, noise = torch.full((1, 1, 2, 2), 0.5), torch.ones(1, 1, 2, 2)
    t, r = torch.tensor([3.0]), torch.tensor([1.0])
    line = Line()
    loss, _ = consistency_loss(line, y, noise, t, r, weighting="step", sigma_data=0.5)
    loss.backward()  # type: ignore[no-untyped-call]
    # d/da of a · 3.5 / 4 is 0.875, over t − r = 2; through both terms it would be (0.875 − 0.75) / 2
    assert line.a.grad is not None
    assert line.a.grad.item() == pytest.approx(0.875 / 2, abs=1e-4)
    assert [enabled for _, enabled in line.calls] == [True, False]


def test_equal_predictions_have_a_finite_gradient() -> None:
    line = Line()
    zeros = torch.zeros(1, 1, 2, 2)
    loss, _ = consistency_loss(
        line, zeros, zeros, torch.tensor([1.0]), torch.tensor([0.5]), weighting="step", sigma_data=0.5
    )
    loss.backward()  # type: ignore[no-untyped-call]
    assert line.a.grad is not None
    assert line.a.grad.item() == 0


def test_noise_levels_follow_the_draws_and_the_stage() -> None:
    levels: list[Tensor] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        levels.append(t)
        return x

    loss = ConsistencyLoss(
        steps=8,
        stages=4,
        q=4.0,
        p_mean=-0.4,
        p_std=2.0,
        max_share=0.5,
        consistent_below=100.0,
        r_min=0.0,
        sigma_min=0.002,
        sigma_max=80.0,
        sigma_data=0.5,
        weighting="step",
    )
    draws = torch.tensor([[0.4, 0.0], [0.6, 0.0], [0.6, 1.0], [0.6, -9.0], [0.6, 9.0]])
    y = torch.zeros(5, 3, 2, 2)
    for step in (2, 7):
        loss(denoise, y, y + 1, draws, STAIN, step)
    expected = [80.0, math.exp(-0.4), math.exp(1.6), 0.002, 80.0]
    assert levels[0].tolist() == pytest.approx(expected)
    assert levels[1].tolist() == pytest.approx(lower_level(levels[0], 1).tolist())
    assert levels[3].tolist() == pytest.approx(lower_level(levels[0], 3).tolist())
    above = dataclasses.replace(loss, consistent_below=2.0, r_min=0.01)
    above(denoise, y, y + 1, draws, STAIN, 7)
    # where r = 0 the target is the image: any level will do
    lower = torch.where((levels[4] < 2.0) & (levels[4] > 0.1), lower_level(levels[0], 3), levels[4])
    assert levels[5].tolist() == pytest.approx(lower.tolist())
