"""Folding must not change the function."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from staindiffuser.export.folding import FoldedBranch, FoldedEncoder, features_unit
from staindiffuser.training.checkpoint import Checkpoint
from staindiffuser.training.model.network import Task


@pytest.mark.parametrize("task", ["images", "cells"])
def test_folded_network_computes_the_same(tiny_checkpoint: Path, task: Task) -> None:
    torch.manual_seed(0)
    network = Checkpoint.load(tiny_checkpoint).network.double()
    he = torch.rand(2, 3, 64, 64, dtype=torch.float64) * 2 - 1
    c_noise = torch.tensor([1.1, 0.1, -0.7], dtype=torch.float64)
    with torch.inference_mode():
        features = network.encoder(he)
        unit = features_unit(network.encoder)
        folded_features = FoldedEncoder(network.encoder)(he)
        for folded, plain in zip(folded_features, features, strict=True):
            torch.testing.assert_close(folded * unit, plain)
        branch = network.branch(task, "cd3")
        folded_branch = FoldedBranch(branch, unit, c_noise)
        injections, folded_injections = branch.attend(features), folded_branch.attend(folded_features)
        x = torch.randn(2, branch.channels, 64, 64, dtype=torch.float64)
        results = []
        for step, level in enumerate(c_noise):
            plain = branch(x, level.expand(2), injections)
            folded = F.pixel_shuffle(folded_branch(F.pixel_unshuffle(x, 2), step, folded_injections), 2)
            torch.testing.assert_close(folded, plain, atol=1e-5, rtol=1e-5)
            results.append(plain)
    assert (results[0] - results[2]).abs().max() > 0.01  # the noise level matters
