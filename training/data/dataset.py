"""Paired tiles → training crops.

Everything random about a sample (which tile, crop, flips, stain jitter, noise) is drawn from a generator keyed by the
run's seed and the sample's global number, so a run is the same however it is split over processes and however often it
is interrupted.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.glass import bare_glass
from staindiffuser.training.config import Augmentation
from staindiffuser.training.data.augmentation import (
    WIDE,
    WIDER,
    another_cytoplasm,
    another_scanner,
    another_stain,
    another_tone,
    jitter_stain,
    similar_crop,
)
from staindiffuser.training.data.cache import TileCache
from staindiffuser.training.data.confounders import with_confounder
from staindiffuser.training.data.jigsaw import jigsaw
from staindiffuser.training.data.targets import POSITIVE, drawn_by, known_targets, load_tile, negatives_of_others
from staindiffuser.training.errors import DataError
from staindiffuser.training.tiles.mixed_tiles import MixedTiles, Schedule
from staindiffuser.training.tiles.paired_tiles import PairedTiles
from staindiffuser.triton_models.noise.philox import quantiles

__all__ = ["CACHE_BYTES", "CropBatch", "CropDataset", "normal_noise", "oriented"]

CACHE_BYTES = 2 << 30
"""Decoded tiles kept by default: 2 GiB are about 2,900 tiles of 256² with two stains."""


@dataclass(frozen=True, kw_only=True)
class CropBatch:
    """A batch of training crops with their noise; or one crop, without the dimension B.

    S stains in the data's order, crops of H × W pixels. Intensities are uint8.
    """

    he: Tensor
    """uint8 [B, H, W, 3]."""
    images: Tensor
    """The stains' images: uint8 [B, S, H, W, 3]."""
    masks: Tensor
    """The stains' coarse masks: uint8 [B, S, H, W]."""
    noise: Tensor
    """float32 [B, S, 4, H, W]: three channels for the image, one for the cells."""
    draws: Tensor
    """float32 [B, S, 2, 2]: per stain and task a uniform and a normal draw, from which σ follows."""
    known: Tensor
    """float32 [B, S, 2]: per stain and task 1 where the crop has a target to learn from, else 0."""

    def __len__(self) -> int:
        return len(self.he)

    @classmethod
    def stack(cls, crops: Sequence[CropBatch]) -> CropBatch:
        """Crops → a batch."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: torch.stack([getattr(crop, name) for crop in crops]) for name in names})

    def _each(self, change: Callable[[Tensor], Tensor]) -> CropBatch:
        tensors = {field.name: change(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return CropBatch(**tensors)

    def to(self, device: torch.device) -> CropBatch:
        """The batch on ``device``; from pinned memory without waiting for the copy."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> CropBatch:
        """A copy in page-locked memory."""
        return self._each(Tensor.pin_memory)

    def share_memory_(self) -> CropBatch:
        """Move it to shared memory, through which another process gets it without a copy."""
        return self._each(Tensor.share_memory_)


class CropDataset:
    """Sample number n → an augmented crop with its noise.

    Args:
        crop: height and width, pixels.
        augmentation: how far crops differ from their tiles; see :class:`TrainConfig`.
        rare_share: share of the crops from tiles drawn by their masks; see :func:`drawn_by`.
        white_glass: the stains' images are white where the H&E shows bare glass; see :func:`bare_glass`.
        exclusive: no cell carries two of the stains; see :func:`negatives_of_others`.
        confounders: share of the crops into which something is pasted that no stain marks; see :func:`with_confounder`.
        mosaic: share of the crops that are put together of four.
        jigsaw: share of the crops that are put together anew from pieces of themselves; see :mod:`.jigsaw`.
        images: whether the stains' images are cut too; if not, they are black and not to be learned from.
        jitter: strength of the light stain jitter, which only the H&E gets; see :func:`jitter_stain`.
        cache_bytes: decoded tiles are kept up to this many bytes, once for all the loader's processes.

    Raises:
        DataError: no training tiles, or one that is smaller than the crop.
    """

    def __init__(
        self,
        tiles: PairedTiles | MixedTiles,
        *,
        crop: int,
        seed: int,
        augmentation: Augmentation = "light",
        rare_share: float = 0.0,
        exclusive: bool = False,
        confounders: float = 0.0,
        mosaic: float = 0.0,
        jigsaw: float = 0.0,
        images: bool = True,
        white_glass: bool = False,
        jitter: float = 0.1,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        weights = (
            [drawn_by(part.split("train"), tiles.stains, rare_share) for part in tiles.parts] if rare_share else None
        )
        self.schedule = Schedule(tiles, seed, weights)
        self.exclusive, self.white_glass = exclusive, white_glass
        self.confounders, self.mosaic, self.jigsaw = confounders, mosaic, jigsaw
        self.images = images
        self.rows = tuple(row for rows in self.schedule.rows for row in rows)
        self._first = np.cumsum([0, *(len(rows) for rows in self.schedule.rows)])
        self.stains = tiles.stains
        self.crop, self.seed, self.jitter = crop, seed, jitter
        self.width = {"light": None, "wide": WIDE, "wider": WIDER}[augmentation]
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

    def __getitem__(self, sample: int) -> CropBatch:
        rng = np.random.default_rng((self.seed, 2, sample))
        parts, known = self._stained(sample, rng)
        if self.mosaic and rng.random() < self.mosaic:
            parts, known = self._mosaic(parts, known, rng)
        he = torch.from_numpy(jitter_stain(parts["he"].numpy(), rng, self.jitter))
        noise = normal_noise(rng, (len(self.stains), 4, self.crop, self.crop))
        draws = np.stack([rng.random((len(self.stains), 2)), rng.standard_normal((len(self.stains), 2))], axis=-1)
        return CropBatch(
            he=he,
            images=torch.stack([parts.get(stain, torch.zeros_like(he)) for stain in self.stains]),
            masks=torch.stack([parts[f"{stain}_mask"] for stain in self.stains]),
            noise=noise,
            draws=torch.from_numpy(draws.astype(np.float32)),
            known=torch.from_numpy(known),
        )

    def _mosaic(
        self, parts: dict[str, Tensor], known: NDArray[np.float32], rng: np.random.Generator
    ) -> tuple[dict[str, Tensor], NDArray[np.float32]]:
        """A crop and three others that meet at a random point; ``parts`` is written to."""
        row, column = (int(place) for place in rng.integers(self.crop // 4, 3 * self.crop // 4, 2, endpoint=True))
        above, left = slice(row), slice(column)
        below, right = slice(row, None), slice(column, None)
        for window in ((above, right), (below, left), (below, right)):
            others, also = self._stained(int(rng.integers(2**31)), rng)
            for name, array in parts.items():
                array[window] = others[name][window]
            # What a quarter does not say is its ignore band; an image has to be whole.
            known = np.stack([known[:, 0] * also[:, 0], np.maximum(known[:, 1], also[:, 1])], axis=-1)
        return parts, known

    def _stained(self, sample: int, rng: np.random.Generator) -> tuple[dict[str, Tensor], NDArray[np.float32]]:
        """The arrays of a sample's crop, its H&E stained and scanned otherwise, and its :func:`known_targets`."""
        index = self.index(sample)
        arrays, known = self.decoded(index), known_targets(self.rows[index], self.stains)
        if not self.images:
            arrays = {name: array for name, array in arrays.items() if name not in self.stains}
            known[:, 0] = 0
        if self.width:
            cut = similar_crop(arrays, rng, self.crop, self.width)
        else:
            height, width = arrays["he"].shape[:2]
            top, left = rng.integers(0, height - self.crop + 1), rng.integers(0, width - self.crop + 1)
            cut = {name: array[top : top + self.crop, left : left + self.crop] for name, array in arrays.items()}
        if self.white_glass and self.images:
            bare = bare_glass(cut["he"])[..., None]
            for stain in self.stains:
                cut[stain] = np.rint(cut[stain] * (1 - bare) + 255 * bare).astype(np.uint8)
        if self.exclusive:
            cut, known = negatives_of_others(cut, known, self.stains)
        orientation = int(rng.integers(8))
        parts = {name: oriented(array, orientation) for name, array in cut.items()}
        if self.jigsaw and rng.random() < self.jigsaw:
            cells = parts[f"{self._drawn(rng)}_mask"].numpy() >= POSITIVE
            parts = {name: torch.from_numpy(a) for name, a in jigsaw(_arrays(parts), cells, rng).items()}
        if self.confounders and rng.random() < self.confounders:
            parts = {name: torch.from_numpy(a) for name, a in with_confounder(_arrays(parts), rng).items()}
        if self.width:
            stained = parts["he"].numpy()
            if self.width.regional and rng.random() < self.width.regional:
                cells = parts[f"{self._drawn(rng)}_mask"].numpy() >= POSITIVE
                stained = another_cytoplasm(stained, cells, rng)
            for change in (another_stain, another_tone, another_scanner):
                stained = change(stained, rng, self.width)
            parts["he"] = torch.from_numpy(stained)
        return parts, known

    def _drawn(self, rng: np.random.Generator) -> str:
        """One of the stains."""
        return self.stains[int(rng.integers(len(self.stains)))]

    def batch(self, samples: Iterable[int]) -> CropBatch:
        """Several samples together."""
        return CropBatch.stack([self[sample] for sample in samples])


def _arrays(parts: dict[str, Tensor]) -> dict[str, UInt8Array]:
    return {name: tensor.numpy() for name, tensor in parts.items()}


def oriented(image: UInt8Array, orientation: int) -> Tensor:
    """Flip or rotate: one of the eight symmetries of the square, 0 being the identity.

    Returns:
        a copy, uint8 [H, W, ...].
    """
    # Torch copies flipped and rotated images three times as fast as NumPy.
    tensor = torch.from_numpy(image)
    if orientation & 4:
        tensor = tensor.transpose(0, 1)
    return tensor.flip([axis for axis in (0, 1) if orientation >> axis & 1]).contiguous()


def normal_noise(rng: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise, float32, as the server draws it: 16 random bits each choose a quantile.

    Five times as fast as ``rng.standard_normal``, and the same to the bit on every machine.
    """
    indices = np.frombuffer(rng.bytes(2 * math.prod(shape)), "<u2").astype(np.int32)
    return _quantiles().index_select(0, torch.from_numpy(indices)).view(shape)


@cache
def _quantiles() -> Tensor:
    return torch.from_numpy(quantiles().astype(np.float32))
