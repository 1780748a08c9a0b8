"""Register an IHC section to its H&E section: rotation, then affine, then non-rigid; and judge the result.

1. Every rotation is tried at low resolution, with masked cross-correlation (``candidates``).
2. The best few are made affine by block matching (``matching``), and the best of those by mutual information of where
   tissue is (SimpleITK; Mattes et al. 2003).
3. What is left is corrected by optical flow on hematoxylin (``flow``).

Sizes in pixels are meant for images of about ``WORKING_SIDE`` pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from staindiffuser.imaging.arrays import BoolArray, FloatArray
from staindiffuser.imaging.glass import glass_percentile
from staindiffuser.training.prepare.registration.candidates import find_candidates
from staindiffuser.training.prepare.registration.features import Structure, band_passed, correlation, structure
from staindiffuser.training.prepare.registration.flow import displacement
from staindiffuser.training.prepare.registration.matching import BlockSearch, fit_affine, match_blocks
from staindiffuser.training.prepare.registration.mutual_information import maximise
from staindiffuser.training.prepare.registration.warp import Affine, Warp, warped
from staindiffuser.training.prepare.sections import SectionImage

__all__ = ["LEAST_SCORE", "WORKING_SIDE", "Registration", "realign", "register"]

WORKING_SIDE = 1000
"""Long side of the images registered, pixels, about."""
LEAST_SCORE = 0.28
"""Registrations that score lower are refused: halfway between the lowest right one and the highest wrong one of
``bench registration`` (ours; ``docs/explanation/registration.md``)."""
_MATCHED = (1.5, 12.0)
_SCORED = (3.0, 20.0)
"""Sizes of detail looked at, pixels."""
_SEARCHES = (
    BlockSearch(half=64, reach=40, step=32),
    BlockSearch(half=48, reach=20, step=24),
    BlockSearch(half=40, reach=12, step=20),
)
_LOCAL_SEARCHES = (BlockSearch(half=48, reach=44, step=32), BlockSearch(half=40, reach=12, step=20))
"""A registration of the whole slide may be off by 0.3 % of its diagonal: 40 pixels of 2 µm where that is 30 mm."""
_LEAST_LOCAL_AGREEMENT = 0.5
"""Regions whose blocks agree less keep the registration of the whole slide. Wrong fits of different textures reach 0.3
in a whole region and 0.41 in one of half its area (ours)."""
_VERDICT = BlockSearch(half=40, reach=20, step=24)
_TOLERANCE = 8.0
"""Blocks agree if they are at most this far apart, pixels."""
_GROWN = 10
"""Width of the glass around tissue that counts for mutual information, pixels: an outline is structure."""


@dataclass(frozen=True, kw_only=True)
class Registration:
    """A registration and how well it fits."""

    warp: Warp
    score: float
    """Geometric mean of agreement and of correlation times overlap: right is 0.33 to 1, wrong 0.1 to 0.23."""
    correlation: float
    """Of band-passed hematoxylin where both have tissue, before the non-rigid step."""
    agreement: float
    """Share of the blocks that, searched for independently, were found where the registration puts them."""
    overlap: float
    """Share of the smaller tissue area that overlaps tissue of the other section."""
    rotation: float
    """Of the IHC section against the H&E, degrees, −180 to 180."""
    scale: float
    """Length on the IHC slide of what has length 1 on the H&E slide."""
    displacement_um: float
    """95th percentile of the non-rigid part, µm."""

    @property
    def good(self) -> bool:
        """Whether it may be used."""
        return self.score >= LEAST_SCORE


def register(he: SectionImage, ihc: SectionImage) -> Registration:
    """Register two images of sections at the same pixel size.

    Args:
        he: the H&E, about ``WORKING_SIDE`` pixels.
        ihc: the IHC, in any rotation.

    Returns:
        The best registration found, good or not.
    """
    if abs(he.mpp / ihc.mpp - 1) > 1e-6:
        raise ValueError(f"the images must have one pixel size, not {he.mpp} and {ihc.mpp}")
    pair = _Pair(
        structure(he.rgb, "he", glass_percentile(he.rgb)), structure(ihc.rgb, "ihc", glass_percentile(ihc.rgb))
    )
    matrix, similarity = np.eye(2, 3), -1.0
    for candidate in find_candidates(pair.fixed, pair.moving):
        found = pair.by_blocks(candidate.matrix)
        if (value := pair.similarity(found)) > similarity:
            matrix, similarity = found, value
    polished = pair.by_mutual_information(matrix)
    if (
        value := pair.similarity(polished)
    ) > 0.9 * similarity:  # a right one may lose a little: mutual information has another aim
        matrix, similarity = polished, value
    moved = warped(pair.moving, matrix, pair.fixed.tissue.shape)
    shift = displacement(pair.fixed, moved)
    agreement, overlap = pair.agreement(matrix, shift), pair.overlap(moved.tissue)
    return Registration(
        warp=_in_um(matrix, shift, he, ihc),
        score=round(float(np.sqrt(max(0.0, similarity) * agreement)), 4),
        correlation=round(similarity / max(overlap, 1e-6), 4),
        agreement=round(agreement, 4),
        overlap=round(overlap, 4),
        rotation=round(float(np.degrees(np.arctan2(matrix[1, 0] - matrix[0, 1], matrix[0, 0] + matrix[1, 1]))), 2),
        scale=round(float(np.sqrt(abs(np.linalg.det(matrix[:, :2])))), 4),
        displacement_um=round(float(np.percentile(np.hypot(shift[..., 0], shift[..., 1]), 95)) * he.mpp, 2),
    )


def realign(fixed: Structure, moved: Structure) -> FloatArray:
    """The displacement that a registration of the whole slide left in one region, seen at higher resolution.

    Args:
        fixed: the H&E.
        moved: the IHC, brought onto the same grid by that registration.

    Returns:
        float32 [H, W, 2], pixels: where on ``moved`` each pixel lies, relative to itself; 0 where the blocks do not
        agree, so that nothing is made worse.
    """
    shape = fixed.tissue.shape
    pair = _Pair(fixed, moved)
    matrix = pair.by_blocks(np.eye(2, 3), _LOCAL_SEARCHES)
    if pair.agreement(matrix, None) < _LEAST_LOCAL_AGREEMENT:
        return np.zeros((*shape, 2), np.float32)
    shift = displacement(fixed, warped(moved, matrix, shape))
    x, y = np.meshgrid(np.arange(shape[1], dtype=np.float32), np.arange(shape[0], dtype=np.float32))
    displaced_x, displaced_y = x + shift[..., 0], y + shift[..., 1]
    return np.stack(
        [
            matrix[0, 0] * displaced_x + matrix[0, 1] * displaced_y + matrix[0, 2] - x,
            matrix[1, 0] * displaced_x + matrix[1, 1] * displaced_y + matrix[1, 2] - y,
        ],
        axis=-1,
        dtype=np.float32,
    )


class _Pair:
    """Two images; matrices are [2, 3], fixed pixels to moving pixels."""

    def __init__(self, fixed: Structure, moving: Structure) -> None:
        self.fixed, self.moving = fixed, moving
        self._matched = band_passed(fixed.presence, *_MATCHED)
        self._scored = band_passed(fixed.hematoxylin, *_SCORED)
        self._smaller = max(1, min(int(fixed.tissue.sum()), int(moving.tissue.sum())))

    def by_blocks(self, matrix: Affine, searches: Sequence[BlockSearch] = _SEARCHES) -> Affine:
        """Improve the matrix by what most blocks agree on; unchanged where they are too few."""
        for search in searches:
            moved = warped(self.moving, matrix, self.fixed.tissue.shape)
            blocks = match_blocks(
                self._matched, band_passed(moved.presence, *_MATCHED), self.fixed.tissue, moved.tissue, search
            )
            step = fit_affine(blocks, tolerance=_TOLERANCE)
            if step is None:
                break
            matrix = _after(matrix, step)
        return matrix

    def by_mutual_information(self, matrix: Affine) -> Affine:
        """Improve the matrix by mutual information of outlines: of tissue, lumens and areas rich in nuclei."""
        moved = warped(self.moving, matrix, self.fixed.tissue.shape)
        step = maximise(_outlines(self.fixed), _outlines(moved), _grown(self.fixed.tissue), _grown(moved.tissue))
        return matrix if step is None else _after(matrix, step)

    def overlap(self, moved_tissue: BoolArray) -> float:
        """Share of the smaller tissue area that overlaps tissue of the other section."""
        return min(1.0, int((self.fixed.tissue & moved_tissue).sum()) / self._smaller)

    def similarity(self, matrix: Affine) -> float:
        """Correlation of band-passed hematoxylin where both have tissue, times the overlap."""
        moved = warped(self.moving, matrix, self.fixed.tissue.shape)
        both = self.fixed.tissue & moved.tissue
        if int(both.sum()) < 100 or not 0.5 < np.linalg.det(matrix[:, :2]) < 2:
            return 0.0
        found = correlation(self._scored[both], band_passed(moved.hematoxylin, *_SCORED)[both])
        return found * self.overlap(moved.tissue)

    def agreement(self, matrix: Affine, shift: FloatArray | None) -> float:
        """Share of the blocks found where the registration puts them."""
        moved = warped(self.moving, matrix, self.fixed.tissue.shape, shift)
        blocks = match_blocks(
            self._matched, band_passed(moved.presence, *_MATCHED), self.fixed.tissue, moved.tissue, _VERDICT
        )
        return blocks.agreement(_TOLERANCE)


def _after(matrix: Affine, step: Affine) -> Affine:
    """``matrix`` after ``step``."""
    result: Affine = matrix @ np.vstack([step, [0, 0, 1]])
    return result


def _in_um(matrix: Affine, shift: FloatArray, he: SectionImage, ihc: SectionImage) -> Warp:
    """From pixels of the two images to µm of the two slides."""
    linear = matrix[:, :2]
    half = np.full(2, 0.5)
    offset = np.asarray(ihc.origin) + ihc.mpp * (matrix[:, 2] + half) - linear @ (np.asarray(he.origin) + he.mpp * half)
    return Warp(affine=np.column_stack([linear, offset]), displacement=shift * he.mpp, origin=he.origin, mpp=he.mpp)


def _outlines(image: Structure) -> FloatArray:
    result: FloatArray = image.presence + np.tanh(image.hematoxylin / 0.2)
    return result


def _grown(mask: BoolArray) -> BoolArray:
    grown: BoolArray = ndimage.binary_dilation(mask, iterations=_GROWN)
    return grown
