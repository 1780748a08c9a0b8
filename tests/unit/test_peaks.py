"""Distances, Gaussians and peaks are SciPy's and scikit-image's; nuclei are those of a watershed by their functions."""

import numpy as np
import pytest
from scipy import ndimage
from skimage.feature import peak_local_max
from skimage.segmentation import watershed

from staindiffuser.imaging import nuclei
from staindiffuser.imaging.nuclei import find_nuclei
from staindiffuser.imaging.peaks import distances_to_edge, local_peaks, smoothed


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.3, 14.0])
@pytest.mark.parametrize("shape", [(80, 90), (7, 200)])
def test_smoothed(sigma: float, shape: tuple[int, int]) -> None:
    values = np.random.default_rng(0).random(shape).astype(np.float32)
    np.testing.assert_allclose(smoothed(values, sigma), ndimage.gaussian_filter(values, sigma), atol=2e-6)


def test_distances() -> None:
    mask = np.random.default_rng(1).random((90, 70)) > 0.02
    expected = ndimage.distance_transform_edt(mask).astype(np.float32)
    np.testing.assert_allclose(distances_to_edge(mask.view(np.uint8)), expected, rtol=2e-7)


@pytest.mark.parametrize("levels", [0, 4, 40])
@pytest.mark.parametrize("apart", [1, 3, 6])
def test_peaks(levels: int, apart: int) -> None:
    """Also where plateaus make ties, of which some are nearer than ``apart``."""
    height = smoothed(np.random.default_rng(2).random((120, 150)).astype(np.float32), 3.0)
    if levels:
        height = np.ceil(height * levels / height.max()).astype(np.float32)
    height[:, 40:60] = 0
    expected = peak_local_max(height, min_distance=apart, labels=(height > 0).astype(np.int32), exclude_border=False)
    order = np.lexsort((expected[:, 1], expected[:, 0]))
    found = np.stack(np.divmod(local_peaks(height, apart), height.shape[1]), axis=-1)
    np.testing.assert_array_equal(found, expected[order])


def plain_nuclei(density: np.ndarray, mpp: float, bright: float) -> np.ndarray:
    n = nuclei
    level = ndimage.gaussian_filter(density / np.float32(bright), n.BLUR_UM / mpp)
    around = ndimage.gaussian_filter(level, n.SURROUNDINGS_UM / mpp)
    peak = ndimage.maximum_filter(ndimage.gaussian_filter(level, n.BLUR_UM / mpp), 2 * round(3.0 / mpp) + 1)
    mask = (level > n.FAINTEST) & (level > n.ABOVE_SURROUNDINGS * around) & (level > n.BELOW_PEAK * peak)
    mask = ndimage.binary_opening(mask)
    smooth = ndimage.gaussian_filter(level, 1.0 / mpp)
    brightness = smooth / (ndimage.maximum_filter(smooth, 2 * round(5.0 / mpp) + 1) + 1e-3)
    distance = ndimage.gaussian_filter(ndimage.distance_transform_edt(mask).astype(np.float32), n.BLUR_UM / mpp) * mpp
    height = distance / 3.0 + 0.7 * brightness
    apart = max(1, round(n.APART_UM / mpp))
    peaks = peak_local_max(height, min_distance=apart, labels=mask.astype(np.int32), exclude_border=False)
    seeds = np.zeros(mask.shape, np.int32)
    seeds[tuple(peaks[np.lexsort((peaks[:, 1], peaks[:, 0]))].T)] = np.arange(1, len(peaks) + 1)
    labels = watershed(-height, seeds, mask=mask)
    area = np.bincount(labels.ravel(), minlength=len(peaks) + 1) * mpp**2
    kept = (area >= n.SMALLEST_UM2) & (area < n.LARGEST_UM2)
    kept[0] = False
    return (np.cumsum(kept) * kept)[labels]


@pytest.mark.parametrize("mpp", [0.5, 0.25])
def test_nuclei(mpp: float) -> None:
    rng = np.random.default_rng(4)
    density = np.zeros((300, 320), np.float32)
    for y, x in rng.integers(0, 300, (260, 2)):
        density[max(0, y - 4) : y + 5, max(0, x - 5) : x + 5] += rng.uniform(0.2, 0.6)
    density += rng.random(density.shape).astype(np.float32) * 0.05
    found, expected = find_nuclei(density, mpp, bright=0.6), plain_nuclei(density, mpp, 0.6)
    assert found.max() == expected.max() > 50
    assert np.mean(found == expected) > 0.998
