"""Half precision against float32, in torch with half-precision tensors between operations.

ONNX Runtime on a CPU computes half-precision graphs in float32 throughout and proves nothing. Here every tensor between
two operations is half precision, and a convolution sums in float32, as a GPU's matrix units do (torch's own half
convolution on a CPU does too, twenty times slower).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from staindiffuser.export.modules import BranchEngine, EncoderEngine
from staindiffuser.imaging.optical_density import dab_mask
from staindiffuser.serving.demo import demo_graphs
from staindiffuser.training.checkpoint import WEIGHTS, Checkpoint
from staindiffuser.training.simulate.tiles import simulate_tile
from staindiffuser.triton_models.noise.philox import tile_noise

TILE = 128
MOST_DICE_CHANGE = 0.002
LARGEST_ACTIVATION = 16_384
"""A quarter of what half precision holds."""


class _SumInFloat32(TorchFunctionMode):
    """Convolutions of half-precision tensors: products summed in float32, the result rounded to half."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is nn.functional.conv2d and args[0].dtype == torch.float16:
            wide: list[Any] = [a.float() if isinstance(a, Tensor) else a for a in args]
            return function(*wide, **kwargs).half()
        return function(*args, **kwargs)


class _Multiplex:
    """Encoder and all branches of a checkpoint in one precision."""

    def __init__(self, checkpoint: Checkpoint, steps: int, trunk: torch.dtype) -> None:
        network, config = checkpoint.network, checkpoint.config
        self.steps = steps
        self.encoder = EncoderEngine(network, trunk).eval()
        self.images = {
            s.name: BranchEngine(network, "images", s, config.sigmas[str(steps)], trunk).eval()
            for s in config.model.stains
        }
        self.cells = {
            s.name: BranchEngine(network, "cells", s, [config.model.sigma_max], trunk).eval()
            for s in config.model.stains
        }
        self.largest = 0.0
        for module in (self.encoder, *self.images.values(), *self.cells.values()):
            for part in module.modules():
                part.register_forward_hook(self._watch)

    def _watch(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        for tensor in (*inputs, *(outputs if isinstance(outputs, (tuple, list)) else (outputs,))):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.largest = max(self.largest, float(tensor.abs().nan_to_num(nan=torch.inf).max()))

    @torch.inference_mode()
    def run(self, he: np.ndarray, seeds: np.ndarray) -> dict[str, np.ndarray]:
        noise, cell_noise = tile_noise(
            seeds, np.zeros((len(he), 2), np.int64), steps=self.steps, height=TILE, width=TILE
        )
        z, cell_z = torch.from_numpy(noise), torch.from_numpy(cell_noise)
        with _SumInFloat32():
            features = self.encoder(torch.from_numpy(he))
            results = {f"STAIN_{name}": branch(*features, z).numpy() for name, branch in self.images.items()}
            results |= {f"CELLS_{name}": branch(*features, cell_z).numpy() for name, branch in self.cells.items()}
        return results


def compare(folder: Path, *, tiles: int, batch: int) -> None:
    """Dice against the true IHC in both precisions, and the largest number that either meets."""
    checkpoint = Checkpoint.load(folder)
    steps = checkpoint.config.steps
    sides = {name: _Multiplex(checkpoint, steps, trunk) for name, trunk in _PRECISIONS.items()}
    stains = [stain.name for stain in checkpoint.config.model.stains]
    counts = {(side, stain): np.zeros(2) for side in sides for stain in stains}
    worst = 0
    for first in range(0, tiles, batch):
        simulated = [simulate_tile(31, 40 * i, size=TILE, masks=False) for i in range(first, min(first + batch, tiles))]
        he = np.stack([tile.he for tile in simulated])
        seeds = np.arange(first, first + len(he), dtype=np.int64)[:, None]
        results = {side: model.run(he, seeds) for side, model in sides.items()}
        for stain in stains:
            real = np.stack([dab_mask(tile.stains[stain]) for tile in simulated])
            for side in sides:
                virtual = np.stack([dab_mask(image) for image in results[side][f"STAIN_{stain}"]])
                counts[side, stain] += (2 * (virtual & real).sum(), virtual.sum() + real.sum())
        for name, half in results["fp16"].items():
            worst = max(worst, int(np.abs(half.astype(int) - results["fp32"][name]).max()))
    for stain in stains:
        dice = {side: counts[side, stain][0] / max(counts[side, stain][1], 1) for side in sides}
        print(f"{stain}: DAB-Dice {dice['fp32']:.4f} in float32, {dice['fp16']:.4f} in half, {tiles} tiles")
        assert abs(dice["fp16"] - dice["fp32"]) <= MOST_DICE_CHANGE, stain
    largest = sides["fp16"].largest
    print(f"largest activation {largest:.0f}, largest difference {worst} grey levels")
    assert largest < LARGEST_ACTIVATION


_PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16}


def test_tiny_model_in_half_precision(tiny_checkpoint: Path) -> None:
    compare(tiny_checkpoint, tiles=2, batch=2)


@pytest.mark.slow  # minutes
@pytest.mark.timeout(3600)
def test_demo_model_in_half_precision_on_200_tiles() -> None:
    folder = demo_graphs().parent
    assert (folder / WEIGHTS).is_file()
    compare(folder, tiles=200, batch=4)
