"""The cells of a map as they are defined, without any of the short cuts of ``imaging/instances.py``."""

import numpy as np
from scipy import ndimage
from skimage.feature import peak_local_max
from skimage.segmentation import watershed

from staindiffuser.imaging.instances import APART_UM, HALF, SMALLEST_UM2, lowest_grey


def plain_cells(map_HW: np.ndarray, mpp: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centroids [N, 2], areas [N] and mean probabilities [N] of a map's cells."""
    positive = map_HW >= lowest_grey(HALF)
    distance = ndimage.gaussian_filter(ndimage.distance_transform_edt(positive).astype(np.float32), 1.0)
    apart = max(1, round(APART_UM / mpp))
    peaks_N2 = peak_local_max(distance, min_distance=apart, labels=positive.astype(np.int32), exclude_border=False)
    markers = np.zeros(map_HW.shape, dtype=np.int32)
    order = np.lexsort((peaks_N2[:, 1], peaks_N2[:, 0]))
    markers[tuple(peaks_N2[order].T)] = np.arange(1, len(peaks_N2) + 1)
    labels = watershed(-distance, markers, mask=positive)
    rows, columns = np.nonzero(labels)
    label_P = labels[rows, columns]
    areas = np.bincount(label_P, minlength=len(peaks_N2) + 1)
    x, y, probability = (
        np.bincount(label_P, values, minlength=len(areas)) / np.maximum(1, areas)
        for values in (columns, rows, map_HW[rows, columns])
    )
    keep = areas * mpp * mpp >= SMALLEST_UM2
    return np.stack([x, y], axis=-1)[keep] + 0.5, areas[keep], probability[keep] / 255
