"""Nuclei as instances, from any density of their stain: DAPI's fluorescence, or hematoxylin's optical density.

Scores and labels per cell rest on these nuclei, which are found without looking at what a model painted.

Shapes: H and W an image's height and width in pixels.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from staindiffuser.imaging.arrays import FloatArray
from staindiffuser.imaging.peaks import dealt_to_peaks, distances_to_edge, local_peaks, smoothed

__all__ = ["Labels", "find_nuclei", "grown", "label_means", "nuclei_of_he"]

Labels = NDArray[np.int32]
"""An instance map: 0 is no nucleus, n the n-th."""

BLUR_UM = 0.5
SURROUNDINGS_UM = 7.0
"""Standard deviations of the Gaussians: against the grain, and for the level that a nucleus must rise above."""
FAINTEST = 0.10
"""Of a bright nucleus' density: what is fainter is no nucleus."""
ABOVE_SURROUNDINGS = 0.85
"""Of the density around: crowded nuclei are hardly above it, gaps between them are below."""
BELOW_PEAK = 0.44
"""Of the brightest within 3 µm: the blur around a nucleus is fainter."""
APART_UM = 2.5
"""Least distance of two nuclei's centres."""
SMALLEST_UM2, LARGEST_UM2 = 7.5, 375.0
FAINTEST_NUCLEI = 0.35
"""Hematoxylin density that counts as bright where a tile of H&E holds nothing brighter."""
EOSIN_LEAK = 0.12
"""Hematoxylin density that unmixing finds where there is eosin alone."""


def nuclei_of_he(hematoxylin: FloatArray, mpp: float) -> Labels:
    """The nuclei of a tile of H&E, from its hematoxylin density (``he_densities``), float32 [H, W]."""
    density = np.maximum(hematoxylin - EOSIN_LEAK, 0.0)
    return find_nuclei(density, mpp, bright=max(FAINTEST_NUCLEI, float(np.percentile(density, 98))))


def find_nuclei(density: FloatArray, mpp: float, *, bright: float) -> Labels:
    """Nuclei by local thresholds and a watershed; the constants are ours, chosen by eye on colon and lymphoid tissue.

    Args:
        density: float32 [H, W], background near 0.
        mpp: pixel size, µm.
        bright: density of a bright nucleus (the 99th percentile of a section or region, not of a tile, which may
            hold no nucleus).

    Returns:
        int32 [H, W].
    """
    if bright <= 0 or not density.any():
        return np.zeros(density.shape, np.int32)
    level = smoothed(np.asarray(density, np.float32) / np.float32(bright), BLUR_UM / mpp)
    around = smoothed(level, SURROUNDINGS_UM / mpp)
    peak = _highest(smoothed(level, BLUR_UM / mpp), 2 * round(3.0 / mpp) + 1)
    mask = (level > FAINTEST) & (level > ABOVE_SURROUNDINGS * around) & (level > BELOW_PEAK * peak)
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    eroded = cv2.erode(mask.view(np.uint8), cross, borderType=cv2.BORDER_CONSTANT, borderValue=(0,))
    opened = np.asarray(cv2.dilate(eroded, cross, borderType=cv2.BORDER_CONSTANT, borderValue=(0,)), np.uint8)
    mask = opened.astype(bool)
    if not mask.any():
        return np.zeros(density.shape, np.int32)
    # Centres: far from the edge, and bright among their neighbours. Touching nuclei often differ in one of the two.
    smooth = smoothed(level, 1.0 / mpp)
    brightness = smooth / (_highest(smooth, 2 * round(5.0 / mpp) + 1) + np.float32(1e-3))
    distance = smoothed(distances_to_edge(opened), BLUR_UM / mpp) * np.float32(mpp)
    height = distance / np.float32(3.0) + np.float32(0.7) * brightness
    peaks = local_peaks(np.where(mask, height, np.float32(0)), max(1, round(APART_UM / mpp)))
    labels = dealt_to_peaks(mask, height, peaks)
    area = np.bincount(labels.ravel(), minlength=len(peaks) + 1) * mpp**2
    kept = (area >= SMALLEST_UM2) & (area < LARGEST_UM2)
    kept[0] = False
    renumbered: Labels = (np.cumsum(kept) * kept).astype(np.int32)[labels]
    return renumbered


def _highest(values: FloatArray, side: int) -> FloatArray:
    """Of the square of ``side`` pixels around each."""
    highest: FloatArray = cv2.dilate(values, np.ones((side, side), np.uint8)).astype(np.float32, copy=False)
    return highest


def grown(labels: Labels, mpp: float, *, ring_um: float = 1.5) -> Labels:
    """Nuclei grown by a ring that stands for the cell's membrane and some cytoplasm; cells never overlap."""
    from skimage.segmentation import expand_labels  # takes a second and 40 MiB to import

    cells: Labels = expand_labels(labels, ring_um / mpp).astype(np.int32)
    return cells


def label_means(labels: Labels, values: NDArray[np.generic]) -> NDArray[np.float64]:
    """Mean of ``values`` [H, W] over each label, [N]: the n-th label's stands at n − 1."""
    count = int(labels.max(initial=0))
    flat = labels.ravel()
    area = np.bincount(flat, minlength=count + 1)[1:]
    total = np.bincount(flat, weights=np.asarray(values, np.float64).ravel(), minlength=count + 1)[1:]
    means: NDArray[np.float64] = total / np.maximum(area, 1)
    return means
