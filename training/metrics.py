"""How good a virtual stain is (DESIGN, "The mathematics").

Pooled over all pixels of a set, not averaged over tiles: :class:`StainScore` keeps sums per tile.
SSIM and PSNR come from scikit-image; they are for comparison, DAB-Dice is the headline (FIELD-NOTES, "Quality").
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from staindiffuser.training.data.dataset import valid_mask
from staindiffuser.training.data.optical_density import DAB_THRESHOLD, dab_density

__all__ = ["METRIC_NAMES", "StainScore", "radial_power"]

U8 = NDArray[np.uint8]
METRIC_NAMES = (
    "dab_dice",
    "od_correlation",
    "positive_area_error",
    "cell_dice",
    "radial_power",
    "ssim",
    "psnr",
)


@dataclass
class StainScore:
    """Sums per tile of one stain, from which every pooled metric and its bootstrap interval follow."""

    sums: list[NDArray[np.float64]] = field(default_factory=list)
    """Per tile: see :data:`_SUMS`."""
    tile_dice: list[float] = field(default_factory=list)
    """DAB-Dice of each tile alone (1 where neither has a positive pixel); to pick tiles to look at."""

    def add(self, *, virtual: U8, real: U8, cells: U8, mask: U8) -> None:
        """Add a tile: pictures uint8 [H, W, 3], cell map uint8 [H, W], coarse mask uint8 [H, W]."""
        x, y = dab_density(virtual).astype(np.float64).ravel(), dab_density(real).astype(np.float64).ravel()
        a, b = x >= DAB_THRESHOLD, y >= DAB_THRESHOLD
        overlap = [(a & b).sum(), a.sum(), b.sum()]
        valid = valid_mask(mask)
        c, m = (cells >= 128) & valid, (mask >= 128) & valid
        moments = [x.size, x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()]
        similarity = structural_similarity(virtual, real, channel_axis=2, data_range=255)
        same = np.array_equal(virtual, real)
        ratio = 0.0 if same else peak_signal_noise_ratio(real, virtual, data_range=255)
        row = [*overlap, (c & m).sum(), c.sum(), m.sum(), *moments]
        row += [radial_power(virtual), radial_power(real), similarity, ratio, float(not same)]
        self.sums.append(np.array(row, dtype=np.float64))
        self.tile_dice.append(_dice(np.array(overlap, dtype=np.float64), empty=1.0))

    def metrics(self) -> dict[str, float]:
        """All of :data:`METRIC_NAMES`.

        ``dab_dice`` and ``cell_dice`` in [0, 1]; ``od_correlation`` Pearson's r of the DAB optical density;
        ``positive_area_error`` (virtual − real) / real positive area; ``radial_power`` the power between 0.125 and 0.5
        cycles per pixel over that of the real stain; ``psnr`` in dB.
        """
        return _metrics(np.sum(self.sums, axis=0), len(self.sums))

    def intervals(self, *, samples: int = 1000, seed: int = 0) -> dict[str, tuple[float, float]]:
        """Bootstrap 95 % intervals of :meth:`metrics`, resampling tiles (Efron and Tibshirani 1993)."""
        sums, rng = np.array(self.sums), np.random.default_rng(seed)
        draws = [_metrics(sums[rng.integers(len(sums), size=len(sums))].sum(axis=0), len(sums)) for _ in range(samples)]
        return {
            name: (float(low), float(high))
            for name in METRIC_NAMES
            for low, high in [np.quantile([draw[name] for draw in draws], [0.025, 0.975])]
        }


_SUMS = 17
"""DAB overlap (both, virtual, real), cell overlap (both, virtual, real), moments (n, Σx, Σy, Σx², Σy², Σxy) of the DAB
optical densities, radial power (virtual, real), SSIM, PSNR, and 1 for a tile that has a finite PSNR."""


def _metrics(sums: NDArray[np.float64], tiles: int) -> dict[str, float]:
    overlap, cells, (n, sx, sy, sxx, syy, sxy) = sums[:3], sums[3:6], sums[6:12]
    virtual_power, real_power, similarity, ratio, finite = sums[12:_SUMS]
    spread = (n * sxx - sx * sx) * (n * syy - sy * sy)
    return {
        "dab_dice": _dice(overlap),
        "od_correlation": float((n * sxy - sx * sy) / np.sqrt(spread)) if spread > 0 else 0.0,
        "positive_area_error": float((overlap[1] - overlap[2]) / max(overlap[2], 1.0)),
        "cell_dice": _dice(cells),
        "radial_power": float(virtual_power / real_power) if real_power > 0 else 0.0,
        "ssim": float(similarity / tiles),
        "psnr": float(ratio / finite) if finite else float("inf"),
    }


def _dice(counts: NDArray[np.float64], *, empty: float = 0.0) -> float:
    both, a, b = counts
    return float(2 * both / (a + b)) if a + b > 0 else empty


def radial_power(picture: U8) -> float:
    """Power of the grey picture between 0.125 and 0.5 cycles per pixel (a blurred mean has little, noise has much)."""
    grey = picture.mean(axis=2)
    window = np.hanning(grey.shape[0])[:, None] * np.hanning(grey.shape[1])
    spectrum = np.abs(np.fft.rfft2((grey - grey.mean()) * window)) ** 2
    frequency = np.hypot(np.fft.fftfreq(grey.shape[0])[:, None], np.fft.rfftfreq(grey.shape[1])[None])
    return float(spectrum[(frequency >= 0.125) & (frequency <= 0.5)].sum())
