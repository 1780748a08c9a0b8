"""Paired tiles → training crops.

Everything random about a sample (which tile, crop, flips, stain jitter, noise) is drawn from a generator keyed by the
run's seed and the sample's global number, so a run is the same however it is split over processes and however often it
is interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.image_files import read_image
from staindiffuser.imaging.optical_density import coarse_mask, dab_mask
from staindiffuser.training.config import StainConfig
from staindiffuser.training.data.cache import TileCache
from staindiffuser.training.errors import DataError
from staindiffuser.training.tiles.mixed_tiles import MixedTiles, Schedule
from staindiffuser.training.tiles.paired_tiles import PairedTile, PairedTiles, spread
from staindiffuser.training.tiles.stain_names import stain_label
from staindiffuser.triton_models.noise.philox import quantiles

__all__ = [
    "CACHE_BYTES",
    "NEGATIVE",
    "POSITIVE",
    "CropDataset",
    "GlobalSampler",
    "jitter_stain",
    "load_tile",
    "measure_stains",
    "normal_noise",
    "turned",
    "valid_mask",
]

NEGATIVE, POSITIVE = 25, 230
"""Values of a coarse mask that are labels: up to the first, and from the second on. Between lies the ignore band."""
CACHE_BYTES = 2 << 30
"""Decoded tiles kept by default: 2 GiB are about 2,900 tiles of 256² with two stains."""


def load_tile(tile: PairedTile, stains: tuple[str, ...]) -> dict[str, UInt8Array]:
    """Decode a tile: ``he`` [H, W, 3], per stain ``<stain>`` [H, W, 3] and its ``<stain>_mask`` [H, W]."""
    arrays = {"he": read_image(tile.he)}
    for stain in stains:
        arrays[stain] = read_image(tile.stains[stain])
        mask = tile.read_mask(stain)
        arrays[f"{stain}_mask"] = coarse_mask(dab_mask(arrays[stain])) if mask is None else mask
    return arrays


def valid_mask(mask: UInt8Array) -> NDArray[np.bool_]:
    """Where a coarse mask is a label: its blurred edge is the ignore band."""
    return (mask <= NEGATIVE) | (mask >= POSITIVE)


def measure_stains(tiles: PairedTiles | MixedTiles, *, limit: int = 256) -> tuple[StainConfig, ...]:
    """Each stain's standardisation constants, as the samples of a training run have them.

    From up to ``limit`` training tiles of each folder, spread over it; folders count by their shares.
    """
    moments = {stain: np.zeros((2, 4)) for stain in tiles.stains}
    for part, share in zip(tiles.parts, tiles.shares, strict=True):
        rows = spread(part.split("train"), limit)
        for row in rows:
            arrays = load_tile(row, tiles.stains)
            for stain in tiles.stains:
                values = np.concatenate([arrays[stain], arrays[f"{stain}_mask"][..., None]], axis=-1)
                values = values.reshape(-1, 4) / 255
                moments[stain] += np.stack([values.mean(0), (values**2).mean(0)]) * (share / len(rows))
    configs = []
    for stain in tiles.stains:
        mean, square = moments[stain]
        std = np.sqrt(np.maximum(square - mean**2, 1e-4)).round(4)
        configs.append(
            StainConfig(
                name=stain,
                label=stain_label(stain),
                image_mean=(round(mean[0], 4), round(mean[1], 4), round(mean[2], 4)),
                image_std=(float(std[0]), float(std[1]), float(std[2])),
                cells_mean=round(float(mean[3]), 4),
                cells_std=max(float(std[3]), 0.05),
            )
        )
    return tuple(configs)


class CropDataset(Dataset[dict[str, Any]]):
    """Sample number n → an augmented crop with its noise.

    Items: ``he`` uint8 [H, W, 3]; per stain ``<stain>`` uint8 [H, W, 3] and ``<stain>_mask`` uint8 [H, W];
    ``noise`` float32 [S, 4, H, W] (three channels for the image, one for the cells, per stain);
    ``draws`` float32 [S, 2, 2] (per stain and task: a uniform and a normal draw, from which σ follows).

    Args:
        crop: height and width, pixels.
        jitter: strength of the stain jitter, which only the H&E gets; see :func:`jitter_stain`.
        cache_bytes: decoded tiles are kept up to this, once for all the loader's processes.

    Raises:
        DataError: no training tiles, or one that is smaller than the crop.
    """

    def __init__(
        self,
        tiles: PairedTiles | MixedTiles,
        *,
        crop: int,
        seed: int,
        jitter: float = 0.1,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.schedule = Schedule(tiles, seed)
        self.rows = tuple(row for rows in self.schedule.rows for row in rows)
        self._first = np.cumsum([0, *(len(rows) for rows in self.schedule.rows)])
        self.stains = tiles.stains
        self.crop, self.seed, self.jitter = crop, seed, jitter
        for row in self.rows:
            if min(row.size) < crop:
                raise DataError(
                    f"{row.file}, row {row.row}: the tile is {row.size[0]} × {row.size[1]}, smaller than the crop of "
                    f"{crop}: use --crop"
                )
        channels = 3 + 4 * len(self.stains)
        self.cache = TileCache([row.size[0] * row.size[1] * channels for row in self.rows], cache_bytes)

    def index(self, sample: int) -> int:
        """Which of ``rows`` the sample is cut from."""
        part, number = self.schedule(sample)
        return int(self._first[part]) + number

    def decoded(self, index: int) -> dict[str, UInt8Array]:
        """The whole tile ``index``, from the cache if it is there; not to be written to."""
        row = self.rows[index]
        data = self.cache.get(index)
        if data is None:
            arrays = load_tile(row, self.stains)
            self.cache.put(index, arrays.values())
            return arrays
        width, height = row.size
        pixels = width * height
        start = 3 * pixels
        arrays = {"he": data[:start].reshape(height, width, 3)}
        for stain in self.stains:
            arrays[stain] = data[start : start + 3 * pixels].reshape(height, width, 3)
            arrays[f"{stain}_mask"] = data[start + 3 * pixels : start + 4 * pixels].reshape(height, width)
            start += 4 * pixels
        return arrays

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, sample: int) -> dict[str, Any]:
        rng = np.random.default_rng((self.seed, 2, sample))
        arrays = self.decoded(self.index(sample))
        height, width = arrays["he"].shape[:2]
        top, left = rng.integers(0, height - self.crop + 1), rng.integers(0, width - self.crop + 1)
        turn = int(rng.integers(8))
        window = np.s_[top : top + self.crop, left : left + self.crop]
        item: dict[str, Any] = {name: turned(array[window], turn) for name, array in arrays.items()}
        item["he"] = torch.from_numpy(jitter_stain(item["he"].numpy(), rng, self.jitter))
        item["noise"] = normal_noise(rng, (len(self.stains), 4, self.crop, self.crop))
        draws = np.stack([rng.random((len(self.stains), 2)), rng.standard_normal((len(self.stains), 2))], axis=-1)
        item["draws"] = torch.from_numpy(draws.astype(np.float32))
        return item


def turned(image: UInt8Array, turn: int) -> Tensor:
    """One of the eight symmetries of the square, 0 being none, as a copy: uint8 [H, W, ...] → uint8 [H, W, ...]."""
    # Torch's copies of turned images are three times as fast as NumPy's.
    tensor = torch.from_numpy(image)
    if turn & 4:
        tensor = tensor.transpose(0, 1)
    return tensor.flip([axis for axis in (0, 1) if turn >> axis & 1]).contiguous()


def normal_noise(rng: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise, float32, as the server draws it: 16 random bits each choose a quantile.

    Five times as fast as ``rng.standard_normal``, and the same to the bit on every machine.
    """
    indices = np.frombuffer(rng.bytes(2 * math.prod(shape)), "<u2").astype(np.int32)
    return _quantiles().index_select(0, torch.from_numpy(indices)).view(shape)


@cache
def _quantiles() -> Tensor:
    return torch.from_numpy(quantiles().astype(np.float32))


def jitter_stain(he: UInt8Array, rng: np.random.Generator, strength: float) -> UInt8Array:
    """Scale and shift the optical density of each colour channel at random (after Tellez et al. 2018).

    Args:
        strength: standard deviation of the scale, and ten times that of the shift in units of optical density.
    """
    if strength == 0:
        return he
    scale = np.exp(strength * rng.standard_normal()) * np.exp(0.5 * strength * rng.standard_normal(3))
    shift = 0.1 * strength * rng.standard_normal(3)
    levels = np.arange(256, dtype=np.float64)
    density = -np.log10((levels + 1) / 256) * scale[:, None] + shift[:, None]
    tables = np.clip(np.rint(256 * 10.0**-density - 1), 0, 255).astype(np.uint8)
    jittered = np.empty_like(he)
    for channel, table in enumerate(tables):
        jittered[..., channel] = table[he[..., channel]]
    return jittered


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
