"""How good a virtual stain is (DESIGN, "The mathematics").

Pooled over all pixels of a set, not averaged over tiles: :class:`StainScore` gathers sums tile by tile.
SSIM and PSNR come from scikit-image; they are for comparison, DAB-Dice is the headline (FIELD-NOTES, "Quality").
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from staindiffuser.training.data.dataset import valid_mask
from staindiffuser.training.data.optical_density import dab_density, dab_mask

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
    """Sums over the tiles of one stain, from which every pooled metric follows."""

    tiles: int = 0
    overlap: NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))
    """Pixels positive in both, in the virtual stain, in the real one."""
    cells: NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))
    """The same for the cell map, outside the ignore band."""
    moments: NDArray[np.float64] = field(default_factory=lambda: np.zeros(6))
    """n, Σx, Σy, Σx², Σy², Σxy of the DAB optical densities."""
    power: NDArray[np.float64] = field(default_factory=lambda: np.zeros(2))
    ssim: list[float] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)
    tile_dice: list[float] = field(default_factory=list)
    """DAB-Dice of each tile alone (1 where neither has a positive pixel); to pick tiles to look at."""

    def add(self, *, virtual: U8, real: U8, cells: U8, mask: U8) -> None:
        """Add a tile: pictures uint8 [H, W, 3], cell map uint8 [H, W], coarse mask uint8 [H, W]."""
        a, b = dab_mask(virtual), dab_mask(real)
        counts = np.array([(a & b).sum(), a.sum(), b.sum()], dtype=np.float64)
        self.overlap += counts
        self.tile_dice.append(_dice(counts, empty=1.0))
        x, y = (dab_density(picture).astype(np.float64).ravel() for picture in (virtual, real))
        self.moments += [x.size, x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()]
        valid = valid_mask(mask)
        c, m = (cells >= 128) & valid, (mask >= 128) & valid
        self.cells += [(c & m).sum(), c.sum(), m.sum()]
        self.power += [radial_power(virtual), radial_power(real)]
        self.ssim.append(float(structural_similarity(virtual, real, channel_axis=2, data_range=255)))
        if not np.array_equal(virtual, real):
            self.psnr.append(float(peak_signal_noise_ratio(real, virtual, data_range=255)))
        self.tiles += 1

    def metrics(self) -> dict[str, float]:
        """All of :data:`METRIC_NAMES`.

        ``dab_dice`` and ``cell_dice`` in [0, 1]; ``od_correlation`` Pearson's r of the DAB optical density;
        ``positive_area_error`` (virtual − real) / real positive area; ``radial_power`` the power between 0.125 and 0.5
        cycles per pixel over that of the real stain; ``psnr`` in dB.
        """
        n, sx, sy, sxx, syy, sxy = self.moments
        spread = (n * sxx - sx * sx) * (n * syy - sy * sy)
        return {
            "dab_dice": _dice(self.overlap),
            "od_correlation": float((n * sxy - sx * sy) / np.sqrt(spread)) if spread > 0 else 0.0,
            "positive_area_error": float((self.overlap[1] - self.overlap[2]) / max(self.overlap[2], 1.0)),
            "cell_dice": _dice(self.cells),
            "radial_power": float(self.power[0] / self.power[1]) if self.power[1] > 0 else 0.0,
            "ssim": float(np.mean(self.ssim)),
            "psnr": float(np.mean(self.psnr)) if self.psnr else float("inf"),
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
