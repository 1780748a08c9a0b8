"""Measurements on one tile: sums and counts, from which ``metrics.py`` computes the metrics of a set.

The reference is analysed once, however many virtual images are compared with it. SSIM and PSNR are scikit-image's;
neither it nor torchmetrics has the 95th percentile of the Hausdorff distance, so that is ours.
"""

from __future__ import annotations

from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.glass import bare_glass
from staindiffuser.imaging.instances import HALF, cell_centroids, count_matches, lowest_grey
from staindiffuser.imaging.optical_density import DAB_THRESHOLD, coarse_mask, dab_density
from staindiffuser.training.data.targets import valid_mask

__all__ = ["Edges", "Reference", "Row", "grid_power", "hausdorff95", "measure_cells", "measure_image", "radial_power"]

Row = dict[str, float]
"""Sums over one tile, by name; what was not measured is absent."""


class Edges:
    """The edge pixels of a mask, and every pixel's distance to the nearest of them."""

    def __init__(self, mask: NDArray[np.bool_]) -> None:
        # The innermost layer of the mask, corners included; the tile's border is no edge.
        self.pixels = mask & ~ndimage.binary_erosion(mask)
        self.distance = ndimage.distance_transform_edt(~self.pixels)


class Reference:
    """The real stain of a tile, with what is derived from it.

    Args:
        real: uint8 [H, W, 3], the real stain.
        mask: uint8 [H, W], its coarse mask.
        mpp: pixel size, µm.
        he: uint8 [H, W, 3], the H&E, which shows where the glass is bare.
    """

    def __init__(self, real: UInt8Array, mask: UInt8Array, mpp: float, he: UInt8Array | None = None) -> None:
        self.real, self.mask, self.mpp, self.he = real, mask, mpp, he
        self.density = dab_density(real).astype(np.float64)
        self.positive = self.density >= DAB_THRESHOLD
        self.power = radial_power(real)

    @cached_property
    def edges(self) -> Edges:
        """Edges of the DAB-positive area."""
        return Edges(self.positive)

    @cached_property
    def glass(self) -> NDArray[np.bool_] | None:
        """Where the H&E shows bare glass for sure; None without an H&E."""
        return None if self.he is None else bare_glass(self.he) == 1

    @cached_property
    def cells(self) -> NDArray[np.float64]:
        """Centroids of the coarse mask's cells, [N, 2] (row, column), µm."""
        return cell_centroids(self.mask, self.mpp)


def measure_image(virtual: UInt8Array, reference: Reference, *, detail: bool = False) -> Row:
    """Compare a virtual image, uint8 [H, W, 3], with the real one.

    Args:
        detail: also compute the slower metrics of edges and cells.
    """
    real = reference.real
    density = dab_density(virtual).astype(np.float64)
    positive = density >= DAB_THRESHOLD
    x, y = density.ravel(), reference.density.ravel()
    row = {
        "both": float((positive & reference.positive).sum()),
        "virtual": float(positive.sum()),
        "real": float(reference.positive.sum()),
        "od_n": float(x.size),
        "od_x": x.sum(),
        "od_y": y.sum(),
        "od_xx": x @ x,
        "od_yy": y @ y,
        "od_xy": x @ y,
        "power_virtual": radial_power(virtual),
        "power_real": reference.power,
    }
    same = np.array_equal(virtual, real)
    row |= {
        "ssim": float(structural_similarity(_floats(virtual), _floats(real), channel_axis=2, data_range=255)),
        "ssim_tiles": 1.0,
        "psnr": 0.0 if same else float(peak_signal_noise_ratio(_floats(real), _floats(virtual), data_range=255)),
        "psnr_tiles": float(not same),
        "psnr_same": float(same),
    }
    if detail:
        row["grid_peak"], row["grid_around"] = grid_power(virtual)
        if reference.glass is not None:
            bare = virtual[reference.glass]
            row |= {"glass_difference": float(255 * bare.size - bare.sum(dtype=np.int64)), "glass_values": bare.size}
        scored = bool(row["virtual"] and row["real"])
        distance = hausdorff95(Edges(positive), reference.edges) * reference.mpp if scored else 0.0
        found = cell_centroids(coarse_mask(positive), reference.mpp)
        row |= {
            "hausdorff": distance,
            "hausdorff_tiles": float(scored),
            "cells_matched": float(count_matches(found, reference.cells)),
            "cells_found": float(len(found)),
            "cells_real": float(len(reference.cells)),
        }
    return row


def measure_cells(cells: UInt8Array, reference: Reference, *, detail: bool = False, threshold: float = HALF) -> Row:
    """Compare a cell map, uint8 [H, W], from a threshold on, with the coarse mask; Dice leaves out its ignore band."""
    valid = valid_mask(reference.mask)
    found, real = (cells >= lowest_grey(threshold)) & valid, (reference.mask >= 128) & valid
    row = {"map_both": float((found & real).sum()), "map_virtual": float(found.sum()), "map_real": float(real.sum())}
    if detail:
        centroids = cell_centroids(cells, reference.mpp, threshold=threshold)
        row |= {
            "map_cells_matched": float(count_matches(centroids, reference.cells)),
            "map_cells_found": float(len(centroids)),
            "map_cells_real": float(len(reference.cells)),
        }
    return row


def radial_power(image: UInt8Array) -> float:
    """Power of the grey image between 0.125 and 0.5 cycles per pixel: low if blurred, high if noisy."""
    grey = image @ np.full(3, 1 / 3)
    window, band = _window_and_band(*grey.shape)
    spectrum = fft.rfft2((grey - grey.mean()) * window)[band]
    return float(np.vdot(spectrum, spectrum).real)


def grid_power(image: UInt8Array) -> tuple[float, float]:
    """Mean power of the grey image at the frequency of the pixel shuffle, and at those around it.

    The shuffle's period is two pixels: its frequency is Nyquist's, along the two axes. Around it are those of the same
    axes 4 to 12 bins lower, so the window's leakage is in neither.

    Args:
        image: uint8 [H, W, 3], H and W even and at least 16.
    """
    grey = image @ np.full(3, 1 / 3)
    window, _ = _window_and_band(*grey.shape)
    power = np.square(np.abs(fft.fft2((grey - grey.mean()) * window)))
    peaks, around = zip(*(_axis_power(plane) for plane in (power, power.T)), strict=True)
    return float(np.mean(peaks)), float(np.mean(around))


def _axis_power(power: NDArray[np.float64]) -> tuple[float, float]:
    """Mean power at Nyquist of the first axis, and just below it."""
    axis = power[:, [-1, 0, 1]]
    middle = len(power) // 2
    return float(axis[middle - 1 : middle + 2].mean()), float(axis[max(1, middle - 12) : middle - 3].mean())


@lru_cache(maxsize=8)
def _window_and_band(height: int, width: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    frequency = np.hypot(fft.fftfreq(height)[:, None], fft.rfftfreq(width)[None])
    return np.hanning(height)[:, None] * np.hanning(width), (frequency >= 0.125) & (frequency <= 0.5)


def hausdorff95(a: Edges, b: Edges) -> float:
    """95th percentile of the Hausdorff distance between the edges of two masks that are not empty, pixels.

    The larger of the two directed distances, each the 95th percentile over the edge pixels of one mask of the distance
    to the other mask's edge (Huttenlocher et al. 1993, with a rank of 95 %).
    """
    return float(max(np.quantile(b.distance[a.pixels], 0.95), np.quantile(a.distance[b.pixels], 0.95)))


def _floats(image: UInt8Array) -> NDArray[np.float32]:
    # Half the work of float64 in scikit-image, and no difference in six digits.
    return image.astype(np.float32)
