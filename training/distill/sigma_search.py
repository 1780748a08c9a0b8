"""The student's noise levels, searched on validation tiles.

The encoder is frozen, so its features of a few tiles are computed once and serve every trial, and the validations
during training as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from staindiffuser.imaging.optical_density import dab_mask
from staindiffuser.training.data.targets import load_tile
from staindiffuser.training.diffusion.samplers import START_SIGMAS, few_step
from staindiffuser.training.evaluation.tile_metrics import radial_power
from staindiffuser.training.gate import POWER_WITHIN
from staindiffuser.training.infer import sampler_noise
from staindiffuser.training.model.network import DualDiffusion, he_to_network, unstandardize
from staindiffuser.training.tiles.paired_tiles import PairedTile

__all__ = ["FewTiles", "Objective", "QuickScore", "SigmaSearch", "coordinate_search", "merit", "search_sigmas"]

Sigmas = tuple[float, ...]
Objective = Callable[[Sigmas], float]

GRID = tuple(float(s) for s in np.geomspace(0.1, 25.6, 9))
"""Second noise levels tried for k = 2 (ours)."""
FACTORS = (2.0, 2**0.5)
"""Factors by which each noise level but the first is raised and lowered in the search for k = 4 (ours)."""
POWER_MARGIN = 0.05
"""The search stays this far inside the gate's bounds on radial power, since it sees few tiles (ours)."""


@dataclass(frozen=True, kw_only=True)
class QuickScore:
    """The two numbers that the gate needs, of one stain."""

    dab_dice: float
    radial_power: float
    """Over that of the real stain."""


@dataclass(frozen=True, kw_only=True)
class _Tile:
    features: list[Tensor]
    noise: Tensor
    """float16 [k, 3, H, W]."""
    real: dict[str, tuple[NDArray[np.bool_], float]]
    """Per stain its DAB mask and its radial power."""


class FewTiles:
    """A few tiles, with everything computed that does not depend on the image branches."""

    @torch.no_grad()
    def __init__(self, network: DualDiffusion, rows: Sequence[PairedTile], *, seed: int = 0) -> None:
        self.config = network.config
        stains = self.config.stain_names
        device = next(network.parameters()).device
        self._tiles: list[_Tile] = []
        for number, row in enumerate(rows):
            data = load_tile(row, stains)
            height, width = data["he"].shape[:2]
            noise, _ = sampler_noise(
                np.array([[seed + number]]),
                np.zeros((1, 2), np.int64),
                steps=max(START_SIGMAS),
                size=(height, width),
            )
            self._tiles.append(
                _Tile(
                    features=network.encoder(he_to_network(torch.tensor(data["he"][None], device=device))),
                    noise=torch.from_numpy(noise[0]).to(device),
                    real={stain: (dab_mask(data[stain]), radial_power(data[stain])) for stain in stains},
                )
            )

    @torch.no_grad()
    def score(self, network: DualDiffusion, sigmas: Sigmas) -> dict[str, QuickScore]:
        """Stain the tiles with the deployed noise and score each stain.

        Args:
            network: has the encoder that the features came from.
        """
        device = next(network.parameters()).device  # not where the teacher was when the features were computed
        scores = {}
        for stain in self.config.stains:
            counts, powers = np.zeros(3), np.zeros(2)
            for tile in self._tiles:
                features = [feature.to(device) for feature in tile.features]
                noises = [noise[None].float() for noise in tile.noise[: len(sigmas)].to(device)]
                y = few_step(network.denoiser("images", stain.name, features), noises, sigmas)
                shown = unstandardize(y, stain, "images", self.config.sigma_data).clamp(0, 1) * 255
                image = shown[0].round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
                virtual, (real, power) = dab_mask(image), tile.real[stain.name]
                counts += (virtual & real).sum(), virtual.sum(), real.sum()
                powers += radial_power(image), power
            scores[stain.name] = QuickScore(
                dab_dice=float(2 * counts[0] / max(counts[1] + counts[2], 1.0)),
                radial_power=float(powers[0] / powers[1]) if powers[1] > 0 else 0.0,
            )
        return scores


def merit(scores: dict[str, QuickScore]) -> float:
    """What the search maximises: mean DAB-Dice, minus each stain's radial power outside the gate's bounds."""
    within = POWER_WITHIN - POWER_MARGIN
    return float(np.mean([s.dab_dice - max(0.0, abs(s.radial_power - 1) - within) for s in scores.values()]))


@dataclass(frozen=True, kw_only=True)
class SigmaSearch:
    """The noise levels found, and every trial with its value."""

    sigmas: Sigmas
    value: float
    trials: dict[Sigmas, float]


def coordinate_search(
    objective: Objective, starts: Sequence[Sigmas], *, factors: Sequence[float] = FACTORS, rounds: int = 2
) -> SigmaSearch:
    """Maximise over descending noise levels: from the best start, multiply and divide each level but the first by each
    factor.

    Args:
        factors: coarse to fine.
        rounds: rounds over all levels per factor, at most; fewer if one brings no gain.
    """
    trials: dict[Sigmas, float] = {}

    def value(sigmas: Sigmas) -> float:
        if sigmas not in trials:
            trials[sigmas] = objective(sigmas)
        return trials[sigmas]

    best = max(starts, key=value)
    for factor in factors:
        for _ in range(rounds):
            before = best
            for place in range(1, len(best)):
                moved = [_moved(best, place, factor), _moved(best, place, 1 / factor)]
                best = max([best, *(m for m in moved if list(m) == sorted(set(m), reverse=True))], key=value)
            if best == before:
                break
    return SigmaSearch(sigmas=best, value=trials[best], trials=trials)


def _moved(sigmas: Sigmas, place: int, factor: float) -> Sigmas:
    return (*sigmas[:place], float(f"{sigmas[place] * factor:.4g}"), *sigmas[place + 1 :])


def search_sigmas(
    network: DualDiffusion, tiles: FewTiles, *, steps: Sequence[int] = (1, 2, 4)
) -> dict[int, SigmaSearch]:
    """Noise levels for k = 1 (nothing to search), 2 (a grid, then finer) and 4 (coordinates, from ``START_SIGMAS``)."""
    first = network.config.sigma_max

    def objective(sigmas: Sigmas) -> float:
        return merit(tiles.score(network, sigmas))

    found = {}
    for k in steps:
        starts = [(first, *START_SIGMAS[k][1:])]
        if k == 2:
            starts = [(first, float(f"{sigma:.4g}")) for sigma in GRID]
        found[k] = coordinate_search(objective, starts, factors=FACTORS[1:] if k == 2 else FACTORS)
    return found
