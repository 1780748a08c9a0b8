"""Stain tiles with torch, for evaluation, validation and the golden samples. The engines must agree with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from staindiffuser.training.diffusion.samplers import few_step, heun
from staindiffuser.training.errors import DivergedError
from staindiffuser.training.model.network import DualDiffusion, he_to_network, tempered, unstandardize
from staindiffuser.triton_models.noise.philox import tile_noise

__all__ = ["HEUN_STEPS", "Sampler", "sampler_noise", "stain_tiles", "stain_tiles_with"]

HEUN_STEPS = 18
Sampler = Sequence[float] | None
"""Noise levels of the few-step sampler, or None for the teacher's Heun sampler."""


def sampler_noise(
    seeds: NDArray[Any], origins: NDArray[Any], *, steps: int, size: tuple[int, int]
) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
    """The deployed noise of a batch: for images [B, k, 3, H, W], for cells [B, 1, H, W]."""
    return tile_noise(seeds, origins, steps=steps, height=size[0], width=size[1])


def stain_tiles(
    network: DualDiffusion,
    he: NDArray[np.uint8],
    *,
    sigmas: Sampler,
    seeds: NDArray[Any],
    origins: NDArray[Any],
    noise: bool = True,
) -> dict[str, NDArray[np.uint8]]:
    """Images and cell maps of a batch of tiles, in float32.

    Args:
        he: uint8 [B, H, W, 3]; H and W multiples of 16.
        sigmas: noise levels of the few-step sampler, or None for Heun with 18 steps.
        seeds: int64 [B, 1].
        origins: int64 [B, 2], x and y, multiples of 16.
        noise: False samples from the noise's mean, 0.

    Returns:
        ``STAIN_<NAME>`` uint8 [B, H, W, 3] and ``CELLS_<NAME>`` uint8 [B, H, W, 1] for each stain.

    Raises:
        DivergedError: an output is NaN or infinite.
    """
    return stain_tiles_with(network, he, samplers=[sigmas], seeds=seeds, origins=origins, noise=noise)[0]


@torch.inference_mode()
def stain_tiles_with(
    network: DualDiffusion,
    he: NDArray[np.uint8],
    *,
    samplers: Sequence[Sampler],
    seeds: NDArray[Any],
    origins: NDArray[Any],
    noise: bool = True,
) -> list[dict[str, NDArray[np.uint8]]]:
    """:func:`stain_tiles` for several samplers at once: encoder, attention, noise and cell maps are computed once."""
    config = network.config
    device = next(network.parameters()).device
    steps = max(len(sigmas) if sigmas is not None else 1 for sigmas in samplers)
    image_noise, cell_noise = (
        torch.from_numpy(n).to(device).float() * noise
        for n in sampler_noise(seeds, origins, steps=steps, size=(he.shape[1], he.shape[2]))
    )
    features = network.encoder(he_to_network(torch.tensor(he, device=device)))
    results: list[dict[str, NDArray[np.uint8]]] = [{} for _ in samplers]
    for stain in config.stains:
        denoise = network.denoiser("cells", stain.name, features)
        y = few_step(denoise, [cell_noise], [config.sigma_max])
        probability = unstandardize(y, stain, "cells", config.sigma_data)
        if (temperature := network.temperatures.get(stain.name, 1.0)) != 1:
            probability = tempered(probability.clamp(0, 1), temperature)
        cells = _bytes(probability)
        denoise = network.denoiser("images", stain.name, features)
        for sigmas, result in zip(samplers, results, strict=True):
            if sigmas is None:
                y = heun(
                    denoise, image_noise[:, 0], steps=HEUN_STEPS, sigma_max=config.sigma_max, sigma_min=config.sigma_min
                )
            else:
                y = few_step(denoise, list(image_noise.unbind(1))[: len(sigmas)], sigmas)
            result[f"STAIN_{stain.name.upper()}"] = _bytes(unstandardize(y, stain, "images", config.sigma_data))
            result[f"CELLS_{stain.name.upper()}"] = cells
    return results


def _bytes(value: Tensor) -> NDArray[np.uint8]:
    if not bool(value.isfinite().all()):  # which would become 0 without a word
        raise DivergedError(
            "the network's output is not finite: its training diverged; use other weights, or train again into another "
            "--output with a lower learning rate"
        )
    array: NDArray[np.uint8] = (value.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return array
