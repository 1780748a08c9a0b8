"""Paired tiles → training crops.

Everything random about a sample (which tile, crop, flips, stain jitter, noise) is drawn from a generator keyed by the
run's seed and the sample's global number, so a run is the same however it is split over processes and however often it
is interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler

from staindiffuser.training.config import StainConfig
from staindiffuser.training.data.labels import stain_label
from staindiffuser.training.data.optical_density import coarse_mask, dab_mask
from staindiffuser.training.data.pairs import PairedTile, PairedTiles, read_picture

__all__ = ["NEGATIVE", "POSITIVE", "CropDataset", "GlobalSampler", "load_tile", "measure_stains", "valid_mask"]

U8 = NDArray[np.uint8]
NEGATIVE, POSITIVE = 25, 230
"""Values of a coarse mask that are labels: up to the first, and from the second on. Between lies the ignore band."""


def load_tile(tile: PairedTile, stains: tuple[str, ...]) -> dict[str, U8]:
    """Decode a tile: ``he`` [H, W, 3], per stain ``<stain>`` [H, W, 3] and its ``<stain>_mask`` [H, W]."""
    arrays = {"he": read_picture(tile.he)}
    for stain in stains:
        arrays[stain] = read_picture(tile.stains[stain])
        mask = tile.masks[stain]
        arrays[f"{stain}_mask"] = read_picture(mask, mode="L") if mask else coarse_mask(dab_mask(arrays[stain]))
    return arrays


def valid_mask(mask: U8) -> NDArray[np.bool_]:
    """Where a coarse mask is a label: its blurred edge is the ignore band."""
    return (mask <= NEGATIVE) | (mask >= POSITIVE)


def measure_stains(tiles: PairedTiles, *, limit: int = 256) -> tuple[StainConfig, ...]:
    """Each stain's standardisation constants, from up to ``limit`` training tiles spread over the set."""
    rows = tiles.split("train")
    rows = rows[:: max(1, len(rows) // limit)][:limit]
    sums = {stain: np.zeros((2, 4)) for stain in tiles.stains}
    for row in rows:
        arrays = load_tile(row, tiles.stains)
        for stain in tiles.stains:
            values = np.concatenate([arrays[stain], arrays[f"{stain}_mask"][..., None]], axis=-1).reshape(-1, 4) / 255
            sums[stain] += [values.mean(0), (values**2).mean(0)]
    configs = []
    for stain in tiles.stains:
        mean, square = sums[stain] / len(rows)
        std = np.sqrt(np.maximum(square - mean**2, 1e-4)).round(4)
        configs.append(
            StainConfig(
                name=stain,
                label=stain_label(stain),
                picture_mean=(round(mean[0], 4), round(mean[1], 4), round(mean[2], 4)),
                picture_std=(float(std[0]), float(std[1]), float(std[2])),
                cells_mean=round(float(mean[3]), 4),
                cells_std=max(float(std[3]), 0.05),
            )
        )
    return tuple(configs)


class CropDataset(Dataset[dict[str, Any]]):
    """Sample number n → an augmented crop with its noise.

    Items: ``he`` uint8 [H, W, 3]; per stain ``<stain>`` uint8 [H, W, 3] and ``<stain>_mask`` uint8 [H, W];
    ``noise`` float32 [S, 4, H, W] (three channels for the picture, one for the cells, per stain);
    ``draws`` float32 [S, 2, 2] (per stain and task: a uniform and a normal draw, from which σ follows).
    """

    def __init__(self, tiles: PairedTiles, *, crop: int, seed: int, jitter: float = 0.1, cache: int = 2048) -> None:
        self.rows = tiles.split("train")
        self.stains = tiles.stains
        self.crop, self.seed, self.jitter = crop, seed, jitter
        self._cached: Callable[[int], dict[str, U8]] = lru_cache(maxsize=cache)(self._decode)

    def _decode(self, index: int) -> dict[str, U8]:
        return load_tile(self.rows[index], self.stains)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, sample: int) -> dict[str, Any]:
        epoch, position = divmod(sample, len(self.rows))
        index = int(np.random.default_rng((self.seed, 1, epoch)).permutation(len(self.rows))[position])
        rng = np.random.default_rng((self.seed, 2, sample))
        arrays = self._cached(index)
        height, width = arrays["he"].shape[:2]
        top, left = rng.integers(0, height - self.crop + 1), rng.integers(0, width - self.crop + 1)
        quarter, flip = int(rng.integers(4)), bool(rng.integers(2))

        def augment(image: U8) -> U8:
            image = np.rot90(image[top : top + self.crop, left : left + self.crop], quarter)
            return (image[:, ::-1] if flip else image).copy()

        item: dict[str, Any] = {name: torch.from_numpy(augment(array)) for name, array in arrays.items()}
        item["he"] = torch.from_numpy(jitter_stain(item["he"].numpy(), rng, self.jitter))
        shape = (len(self.stains), 4, self.crop, self.crop)
        item["noise"] = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
        draws = np.stack([rng.random((len(self.stains), 2)), rng.standard_normal((len(self.stains), 2))], axis=-1)
        item["draws"] = torch.from_numpy(draws.astype(np.float32))
        return item


def jitter_stain(he: U8, rng: np.random.Generator, strength: float) -> U8:
    """Scale and shift the optical density of each colour channel at random (after Tellez et al. 2018).

    Args:
        strength: standard deviation of the scale, and twice that of the shift in units of optical density.
    """
    if strength == 0:
        return he
    scale = np.exp(strength * rng.standard_normal()) * np.exp(0.5 * strength * rng.standard_normal(3))
    shift = 0.1 * strength * rng.standard_normal(3)
    levels = np.arange(256, dtype=np.float64)
    density = -np.log10((levels[:, None] + 1) / 256) * scale + shift
    table = np.clip(np.rint(256 * 10.0**-density - 1), 0, 255).astype(np.uint8)
    return np.stack([table[he[..., channel], channel] for channel in range(3)], axis=-1)


class GlobalSampler(Sampler[int]):
    """This process's share of the global sample numbers, from the step that the run has reached.

    Args:
        first: gives the first global sample number, asked when iteration starts (a resumed run knows it only then).
        total: one past the last sample number.
        batch: samples per step, over all processes.
    """

    def __init__(
        self, first: Callable[[], int], total: int, batch: int, *, rank: Callable[[], int], world: Callable[[], int]
    ) -> None:
        self.first, self.total, self.batch, self.rank, self.world = first, total, batch, rank, world

    def __iter__(self) -> Iterator[int]:
        share = self.batch // self.world()
        for start in range(self.first(), self.total, self.batch):
            yield from range(start + self.rank() * share, start + (self.rank() + 1) * share)

    def __len__(self) -> int:
        return (self.total - self.first()) // self.world()
