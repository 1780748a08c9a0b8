"""Optical density and masks against what they must be on paper."""

import numpy as np
import pytest

from staindiffuser.imaging.optical_density import (
    STAIN_MATRIX,
    coarse_mask,
    dab_density,
    dab_mask,
    hematoxylin_density,
    optical_density,
    unmix,
)


def image_of(amounts: np.ndarray) -> np.ndarray:
    """Images of known amounts of hematoxylin and DAB: [..., 2] to uint8 [..., 3]."""
    density = amounts @ STAIN_MATRIX[:2]
    return np.clip(np.rint(256 * 10**-density - 1), 0, 255).astype(np.uint8)


def test_density_of_every_value() -> None:
    values = np.arange(256, dtype=np.uint8)
    np.testing.assert_allclose(optical_density(values), -np.log10((values + 1.0) / 256), rtol=1e-6, atol=1e-7)
    assert optical_density(values).dtype == np.float32
    assert optical_density(np.array([255], np.uint8))[0] == 0


def test_vectors_are_unit_and_residual_is_orthogonal() -> None:
    np.testing.assert_allclose(np.linalg.norm(STAIN_MATRIX, axis=1), 1)
    np.testing.assert_allclose(STAIN_MATRIX[2] @ STAIN_MATRIX[:2].T, 0, atol=1e-12)
    np.testing.assert_allclose(STAIN_MATRIX[1], np.array([0.268, 0.570, 0.776]) / np.linalg.norm([0.268, 0.570, 0.776]))


def test_unmixing_inverts_mixing() -> None:
    amounts = np.random.default_rng(0).uniform(0, 1, (5, 7, 3))
    np.testing.assert_allclose(unmix(amounts @ STAIN_MATRIX), amounts, atol=1e-5)


def test_single_stains_equal_the_matrix_product() -> None:
    rgb = np.random.default_rng(1).integers(0, 256, (12, 9, 3), dtype=np.uint8)
    np.testing.assert_allclose(hematoxylin_density(rgb), unmix(optical_density(rgb))[..., 0], atol=2e-6)


def test_dab_of_a_flat_image_is_its_amount() -> None:
    rgb = image_of(np.full((16, 16, 2), [0.4, 0.3]))
    np.testing.assert_allclose(dab_density(rgb), 0.3, atol=0.01)


@pytest.mark.parametrize(("amount", "positive"), [(0.13, False), (0.17, True)])
def test_threshold(amount: float, positive: bool) -> None:
    assert (dab_mask(image_of(np.full((8, 8, 2), [0.2, amount]))) == positive).all()


def test_glass_and_counterstain_are_negative() -> None:
    assert not dab_mask(np.full((8, 8, 3), 245, np.uint8)).any()
    assert not dab_mask(image_of(np.full((8, 8, 2), [1.0, 0.0]))).any()


def test_the_mask_is_smoothed() -> None:
    amounts = np.zeros((21, 21, 2))
    amounts[10, 10, 1] = 0.8  # a Gaussian of 1 px leaves 0.16 of it at its centre
    assert dab_mask(image_of(amounts)).sum() <= 1
    amounts[9:12, 9:12, 1] = 0.8
    assert dab_mask(image_of(amounts)).sum() > 9


def band_width(mask: np.ndarray) -> int:
    return int(((mask > 25) & (mask < 230)).sum())


@pytest.mark.parametrize("axis", [0, 1])
def test_ignore_band_of_a_straight_edge(axis: int) -> None:
    positive = np.zeros((64, 64), bool)
    positive[:, 32:] = True
    coarse = coarse_mask(positive if axis == 1 else positive.T)
    profile = coarse[20] if axis == 1 else coarse[:, 20]
    assert 3 <= band_width(profile) <= 5
    assert profile[0] == 0
    assert profile[-1] == 255


@pytest.mark.parametrize("radius", [5, 9, 20])
def test_ignore_band_of_a_disc(radius: int) -> None:
    y, x = np.mgrid[-32:32, -32:32] + 0.5
    coarse = coarse_mask(np.hypot(x, y) < radius)
    assert 3 <= band_width(coarse[32, 32:]) <= 5
    assert coarse[32, 32] >= 230, "even a small cell keeps a positive centre"


def test_cleaning() -> None:
    positive = np.zeros((96, 96), bool)
    positive[10:40, 10:40] = True
    positive[20:32, 20:32] = False  # a nucleus: filled
    positive[70:73, 70:73] = True  # a speck: dropped
    positive[50:90, 5:45] = True
    positive[55:85, 10:40] = False  # a lumen: stays open
    positive[10:40, 60] = positive[10:40, 62] = True  # a crack of 1 px: closed
    positive[10:40, 55:75] |= False
    coarse = coarse_mask(positive)
    assert coarse[26, 26] == 255
    assert coarse[71, 71] == 0
    assert coarse[70, 25] == 0
    assert coarse[25, 61] > 25


def test_empty_and_full() -> None:
    assert (coarse_mask(np.zeros((8, 8), bool)) == 0).all()
    assert (coarse_mask(np.ones((8, 8), bool)) == 255).all()


def test_what_is_refused() -> None:
    with pytest.raises(TypeError, match="uint8"):
        optical_density(np.zeros((4, 4, 3), np.float32))
    with pytest.raises(ValueError, match="3 channels"):
        unmix(np.zeros((4, 4)))
    with pytest.raises(ValueError, match="one image"):
        dab_density(np.zeros((1, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="mask"):
        coarse_mask(np.zeros((4, 4, 3), bool))
