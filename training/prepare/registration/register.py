"""An IHC section brought onto its H&E section: rotation, then affine, then non-rigid; and whether to believe it.

1. Every rotation is tried at low resolution, with masked cross-correlation (``candidates``).
2. The best few are made affine by block matching (``matching``), and the best of those by mutual information of where
   tissue is (SimpleITK; Mattes et al. 2003).
3. Dense inverse search flow on hematoxylin (OpenCV; Kroeger et al. 2016), smoothed and capped, bends what is left.

Sizes in pixels are meant for images of about ``WORKING_SIDE`` pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from staindiffuser.imaging.arrays import BoolArray, FloatArray
from staindiffuser.imaging.glass import glass_colour
from staindiffuser.training.prepare.registration.candidates import find_candidates
from staindiffuser.training.prepare.registration.features import (
    Structure,
    band_passed,
    correlation,
    structure,
)
from staindiffuser.training.prepare.registration.matching import BlockSearch, fit_affine, match_blocks
from staindiffuser.training.prepare.registration.mutual_information import maximise
from staindiffuser.training.prepare.registration.resampling import enlarged, reduced, sampled
from staindiffuser.training.prepare.sections import SectionImage

__all__ = [
    "LEAST_SCORE",
    "WORKING_SIDE",
    "Registration",
    "Warp",
    "bend",
    "realign",
    "register",
    "remapped",
    "warped",
]

Affine = npt.NDArray[np.float64]

WORKING_SIDE = 1000
"""Long side of the images registered, pixels, about."""
LEAST_SCORE = 0.28
"""Registrations that score lower are refused: half way between the lowest right one and the highest wrong one of
``bench registration`` (ours; ``docs/explanation/registration.md``)."""
FLOW_CAP = 0.015
"""Largest bend, as a share of the diagonal: more than this is not the same tissue any more."""

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
"""Regions whose blocks agree less keep the registration of the whole slide; wrong fits of unlike textures reach 0.3 in
a whole region and 0.41 in one of half its area (ours)."""
_VERDICT = BlockSearch(half=40, reach=20, step=24)
_TOLERANCE = 8.0
"""Blocks that agree to this, pixels, agree."""
_GROWN = 10
"""Glass beside tissue that counts for mutual information, pixels: a rim is structure."""
_FLOW_SIGMA = 12.0
"""Smoothing of the flow, pixels."""
_FAR = 8
"""Where only one section has tissue, the smoothing is so many times wider."""
_LEAST_FLOW = 32
"""Edge of an image, pixels, below which there is no detail to bend it by, nor can the flow be computed."""


@dataclass(frozen=True, kw_only=True)
class Warp:
    """Where each place of the H&E slide lies on the IHC slide, both in µm."""

    affine: Affine
    """[2, 3], applied after the bend."""
    bend: FloatArray
    """[h, w, 2], shift in µm on the H&E slide, on a grid of its own."""
    origin: tuple[float, float]
    """Upper left corner of that grid, µm on the H&E slide."""
    mpp: float
    """Its spacing, µm."""

    def points(self, um: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Places [n, 2] (x, y) on the H&E slide to places on the IHC slide, µm."""
        x, y = um[:, 0].astype(np.float32)[None], um[:, 1].astype(np.float32)[None]
        return np.asarray(self._mapped(x, y)[0], np.float64)

    def grid(
        self, origin: tuple[float, float], shape: tuple[int, ...], mpp: float, shift: FloatArray | None = None
    ) -> FloatArray:
        """Places on the IHC slide of a rectangle's pixels.

        Args:
            origin: its upper left corner, µm on the H&E slide.
            shape: its height and width, pixels.
            mpp: its pixel size, µm.
            shift: a further bend [H, W, 2], in its pixels.

        Returns:
            float32 [H, W, 2] (x, y), µm on the IHC slide.
        """
        height, width = shape[:2]
        x = np.arange(width, dtype=np.float32)[None] + np.float32(0.5)
        y = np.arange(height, dtype=np.float32)[:, None] + np.float32(0.5)
        if shift is not None:
            x, y = x + shift[..., 0], y + shift[..., 1]
        return self._mapped(*np.broadcast_arrays(origin[0] + x * mpp, origin[1] + y * mpp))

    def _mapped(self, x: FloatArray, y: FloatArray) -> FloatArray:
        column = ((x - self.origin[0]) / self.mpp - 0.5).astype(np.float32)
        row = ((y - self.origin[1]) / self.mpp - 0.5).astype(np.float32)
        bend = sampled(self.bend, np.stack([column, row], axis=-1), beyond=None)
        x, y = x + bend[..., 0], y + bend[..., 1]
        a = self.affine
        return np.stack(
            [a[0, 0] * x + a[0, 1] * y + a[0, 2], a[1, 0] * x + a[1, 1] * y + a[1, 2]], axis=-1, dtype=np.float32
        )


@dataclass(frozen=True, kw_only=True)
class Registration:
    """A registration and how well it fits."""

    warp: Warp
    score: float
    """Geometric mean of agreement and of correlation times overlap: right is 0.33 to 1, wrong 0.1 to 0.23."""
    correlation: float
    """Of band-passed hematoxylin where both have tissue, before the bend."""
    agreement: float
    """Share of the blocks that, looked for on their own, were found where the registration puts them."""
    overlap: float
    """Share of the smaller tissue that meets tissue of the other."""
    rotation: float
    """Of the IHC section against the H&E, degrees, −180 to 180."""
    scale: float
    """Size on the IHC slide of what is 1 on the H&E slide."""
    bend_um: float
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
    pair = _Pair(structure(he.rgb, "he", glass_colour(he.rgb)), structure(ihc.rgb, "ihc", glass_colour(ihc.rgb)))
    matrix, likeness = np.eye(2, 3), -1.0
    for candidate in find_candidates(pair.fixed, pair.moving):
        found = pair.by_blocks(candidate.matrix)
        if (value := pair.likeness(found)) > likeness:
            matrix, likeness = found, value
    polished = pair.by_mutual_information(matrix)
    if (value := pair.likeness(polished)) > 0.9 * likeness:  # right ones may lose a little: it has another aim
        matrix, likeness = polished, value
    moved = warped(pair.moving, matrix, pair.fixed.tissue.shape)
    shift = bend(pair.fixed, moved)
    agreement, overlap = pair.agreement(matrix, shift), pair.overlap(moved.tissue)
    return Registration(
        warp=_in_um(matrix, shift, he, ihc),
        score=round(float(np.sqrt(max(0.0, likeness) * agreement)), 4),
        correlation=round(likeness / max(overlap, 1e-6), 4),
        agreement=round(agreement, 4),
        overlap=round(overlap, 4),
        rotation=round(float(np.degrees(np.arctan2(matrix[1, 0] - matrix[0, 1], matrix[0, 0] + matrix[1, 1]))), 2),
        scale=round(float(np.sqrt(abs(np.linalg.det(matrix[:, :2])))), 4),
        bend_um=round(float(np.percentile(np.hypot(shift[..., 0], shift[..., 1]), 95)) * he.mpp, 2),
    )


def bend(fixed: Structure, moved: Structure, *, cap: float = FLOW_CAP) -> FloatArray:
    """The non-rigid part: where on the moved image each pixel of the fixed one lies.

    Args:
        fixed: the H&E.
        moved: the IHC on the same grid.
        cap: largest bend, as a share of the diagonal.

    Returns:
        float32 [H, W, 2], (x, y) in pixels.
    """
    shape = fixed.tissue.shape
    both = fixed.tissue & moved.tissue
    if not both.any() or min(shape) < _LEAST_FLOW:
        return np.zeros((*shape, 2), np.float32)
    closed = ndimage.binary_closing(np.pad(both, 8), iterations=6)[8:-8, 8:-8]
    # Faded out where only one has tissue: the flow must not follow the edge of what is torn away.
    gate = ndimage.gaussian_filter(ndimage.binary_erosion(closed, iterations=3, border_value=1).astype(np.float32), 3.0)
    flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    flow.setPatchSize(16)
    flow.setPatchStride(5)
    flow.setFinestScale(1)
    first, second = (_bytes(ndimage.gaussian_filter(part.hematoxylin, 1) * gate) for part in (fixed, moved))
    raw = np.asarray(flow.calc(first, second, np.zeros((*shape, 2), np.float32)), np.float32)
    near, weight = _smoothed(raw, gate)
    # Where there is nothing to follow, go on as the nearest places do.
    size = (max(1, shape[1] // _FAR), max(1, shape[0] // _FAR))
    far, _ = _smoothed(np.dstack([reduced(raw[..., axis], size) for axis in (0, 1)]), reduced(gate, size))
    share = np.minimum(1, 2 * weight)[..., None]
    shift: FloatArray = share * near + (1 - share) * enlarged(far, (shape[1], shape[0]))
    length = np.hypot(shift[..., 0], shift[..., 1])
    most = cap * float(np.hypot(shape[0], shape[1]))
    return np.asarray(shift * np.minimum(1, most / np.maximum(length, 1e-6))[..., None], np.float32)


def _smoothed(flow: FloatArray, weight: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Weighted mean of a flow [H, W, 2] around every pixel, and the mean of the weights."""
    total = ndimage.gaussian_filter(weight, _FLOW_SIGMA)
    parts = [ndimage.gaussian_filter(flow[..., axis] * weight, _FLOW_SIGMA) for axis in (0, 1)]
    return np.stack(parts, axis=-1) / (total[..., None] + 1e-6), total


def warped(moving: Structure, matrix: Affine, shape: tuple[int, ...], shift: FloatArray | None = None) -> Structure:
    """A moving image on the fixed one's grid; glass where there is none.

    Args:
        moving: what to warp.
        matrix: [2, 3], fixed pixels to moving pixels.
        shape: height and width of the fixed image.
        shift: [H, W, 2], a bend of the fixed grid before the matrix, pixels.
    """
    x, y = np.meshgrid(np.arange(shape[1], dtype=np.float32), np.arange(shape[0], dtype=np.float32))
    if shift is not None:
        x, y = x + shift[..., 0], y + shift[..., 1]
    column = matrix[0, 0] * x + matrix[0, 1] * y + matrix[0, 2]
    row = matrix[1, 0] * x + matrix[1, 1] * y + matrix[1, 2]
    return remapped(moving, np.stack([column, row], axis=-1, dtype=np.float32))


def remapped(moving: Structure, places: FloatArray) -> Structure:
    """An image read at places [H, W, 2] (x, y), pixels; glass beyond its edges."""
    return Structure(
        hematoxylin=sampled(moving.hematoxylin, places),
        presence=sampled(moving.presence, places),
        tissue=sampled(moving.tissue.astype(np.float32), places) > 0.5,
    )


def realign(fixed: Structure, moved: Structure) -> FloatArray:
    """What a registration of the whole slide left over, in one region that is looked at more finely.

    Args:
        fixed: the H&E.
        moved: the IHC, brought onto the same grid by that registration.

    Returns:
        float32 [H, W, 2]: where on ``moved`` each pixel lies, relative to itself; 0 where blocks do not agree, so that
        nothing is made worse.
    """
    shape = fixed.tissue.shape
    pair = _Pair(fixed, moved)
    matrix = pair.by_blocks(np.eye(2, 3), _LOCAL_SEARCHES)
    if pair.agreement(matrix, None) < _LEAST_LOCAL_AGREEMENT:
        return np.zeros((*shape, 2), np.float32)
    bent = bend(fixed, warped(moved, matrix, shape))
    x, y = np.meshgrid(np.arange(shape[1], dtype=np.float32), np.arange(shape[0], dtype=np.float32))
    bent_x, bent_y = x + bent[..., 0], y + bent[..., 1]
    return np.stack(
        [
            matrix[0, 0] * bent_x + matrix[0, 1] * bent_y + matrix[0, 2] - x,
            matrix[1, 0] * bent_x + matrix[1, 1] * bent_y + matrix[1, 2] - y,
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
        """Better by what most blocks agree on; as it was where they are too few."""
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
        """Better by mutual information of outlines: of tissue, lumens and places rich in nuclei."""
        moved = warped(self.moving, matrix, self.fixed.tissue.shape)
        step = maximise(_outlines(self.fixed), _outlines(moved), _grown(self.fixed.tissue), _grown(moved.tissue))
        return matrix if step is None else _after(matrix, step)

    def overlap(self, moved_tissue: BoolArray) -> float:
        """Share of the smaller tissue that meets tissue of the other."""
        return min(1.0, int((self.fixed.tissue & moved_tissue).sum()) / self._smaller)

    def likeness(self, matrix: Affine) -> float:
        """Correlation of band-passed hematoxylin where both have tissue, times the overlap."""
        moved = warped(self.moving, matrix, self.fixed.tissue.shape)
        both = self.fixed.tissue & moved.tissue
        if int(both.sum()) < 100 or not 0.5 < np.linalg.det(matrix[:, :2]) < 2:
            return 0.0
        found = correlation(self._scored[both], band_passed(moved.hematoxylin, *_SCORED)[both])
        return found * self.overlap(moved.tissue)

    def agreement(self, matrix: Affine, shift: FloatArray | None) -> float:
        """Share of the blocks that are found where the registration puts them."""
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
    return Warp(affine=np.column_stack([linear, offset]), bend=shift * he.mpp, origin=he.origin, mpp=he.mpp)


def _outlines(image: Structure) -> FloatArray:
    result: FloatArray = image.presence + np.tanh(image.hematoxylin / 0.2)
    return result


def _grown(mask: BoolArray) -> BoolArray:
    grown: BoolArray = ndimage.binary_dilation(mask, iterations=_GROWN)
    return grown


def _bytes(values: FloatArray) -> npt.NDArray[np.uint8]:
    """Scaled to a byte by their 99.5th percentile."""
    top = max(1e-3, float(np.percentile(values, 99.5)))
    scaled: npt.NDArray[np.uint8] = np.clip(values * (255 / top), 0, 255).astype(np.uint8)
    return scaled
