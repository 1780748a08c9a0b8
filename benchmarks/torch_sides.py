"""The whole work of a tile in torch: the network as it was trained, and compiled (needs torch)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from staindiffuser.export.description import GraphSet

if TYPE_CHECKING:
    from staindiffuser.training.model.network import DualDiffusion

__all__ = ["COMPILED", "EAGER", "torch_sides"]

Arrays = dict[str, np.ndarray[Any, Any]]
EAGER, COMPILED = "torch as trained", "torch.compile"


def torch_sides(
    checkpoint: Path, graphs: GraphSet, only: Sequence[str], compiled: bool
) -> dict[str, Callable[[Arrays], object]]:
    """The whole work in torch: the network as it was trained, and compiled."""
    import torch

    from staindiffuser.training.checkpoint import Checkpoint
    from staindiffuser.training.diffusion.samplers import few_step
    from staindiffuser.training.model.network import he_to_network, unstandardize

    network = Checkpoint.load(checkpoint).network
    config = network.config

    @torch.inference_mode()
    def eager(inputs: Arrays) -> None:
        features = network.encoder(he_to_network(torch.from_numpy(inputs["HE"])))
        noise = torch.from_numpy(inputs["NOISE"][:, : graphs.steps]).float().unbind(1)
        for stain in config.stains:
            y = few_step(network.denoiser("images", stain.name, features), list(noise), graphs.sigmas)
            unstandardize(y, stain, "images", config.sigma_data).clamp(0, 1).mul(255).round().to(torch.uint8)
            cell_noise = [torch.from_numpy(inputs["NOISE_CELLS"]).float()]
            y = few_step(network.denoiser("cells", stain.name, features), cell_noise, [config.sigma_max])
            unstandardize(y, stain, "cells", config.sigma_data).clamp(0, 1).mul(255).round().to(torch.uint8)

    sides: dict[str, Callable[[Arrays], object]] = {EAGER: eager}
    if compiled:
        sides[COMPILED] = _compiled_side(network, graphs)
    return {name: run for name, run in sides.items() if not only or name in only}


def _compiled_side(network: DualDiffusion, graphs: GraphSet) -> Callable[[Arrays], object]:
    """The modules that the graphs were traced from, behind torch.compile."""
    import torch

    from staindiffuser.export.modules import BranchEngine, EncoderEngine

    config = network.config
    encoder: Any = torch.compile(EncoderEngine(network).eval())
    branches: list[tuple[Any, str]] = []
    for stain in config.stains:
        image = BranchEngine(network, "images", stain, graphs.sigmas).eval()
        cells = BranchEngine(network, "cells", stain, [config.sigma_max]).eval()
        branches += [(torch.compile(image), "NOISE"), (torch.compile(cells), "NOISE_CELLS")]

    @torch.inference_mode()
    def run(inputs: Arrays) -> None:
        features = encoder(torch.from_numpy(inputs["HE"]))
        for branch, name in branches:
            noise = inputs[name][:, : graphs.steps] if name == "NOISE" else inputs[name]
            branch(*features, torch.from_numpy(noise))

    return run
