"""Wide augmentation: what another laboratory's stain, section and scanner do to an H&E.

Real pairs come from few laboratories, and a network that has seen one scanner reads another's pink as something else.
All draws come from the sample's generator, so a sample is the same wherever it is made.

Shapes: H and W a tile's height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from staindiffuser.imaging.arrays import BoolArray, UInt8Array
from staindiffuser.imaging.optical_density import HE_MATRIX, image_of_density, optical_density

__all__ = [
    "WIDE",
    "WIDER",
    "Width",
    "another_cytoplasm",
    "another_scanner",
    "another_stain",
    "another_tone",
    "jitter_stain",
    "similar_crop",
]


@dataclass(frozen=True, kw_only=True)
class Width:
    """How far from its tile a crop may be."""

    straight: float
    """Share of the crops that are cut along the pixels: resampling blurs, and the others alone would teach blur."""
    vector_spread: float
    """Standard deviation of what is added to the stains' colour vectors."""
    largest_blur: float
    """Standard deviation of the Gaussian of a scanner that is out of focus at most, pixels."""
    scales: tuple[float, float]
    """The smallest and the largest magnification of what is not cut along the pixels."""
    tone_spread: float
    """Standard deviation of ln γ of a scanner's tone curve."""
    regional: float = 0.0
    """Share of the crops in which one kind of cells is stained otherwise than what is around it."""


WIDE = Width(straight=0.65, vector_spread=0.03, largest_blur=1.3, scales=(0.8, 1.25), tone_spread=0.3)
WIDER = Width(straight=0.0, vector_spread=0.07, largest_blur=1.3, scales=(0.87, 1.15), tone_spread=0.3, regional=0.3)
"""For cell maps, which may be soft. Published vectors of hematoxylin lie about 0.1 from one another. Slides say their
pixel size, and the size of a nucleus is what tells a small tumour cell from a lymphocyte: it is hardly touched."""
STAIN_RANGE = 0.45
"""The density of hematoxylin, of eosin and of the rest is each multiplied by exp(±this)."""
LARGEST_TURN = 0.6
"""Share of the eosin of a kind of cells that is hematoxylin's colour at most."""
TONE_SHARE, TONE_PIVOT = 0.7, 0.3
"""How often a tone curve is another, and the optical density, about that of stained tissue, that it keeps."""
TINT_SHARE, LARGEST_TINT = 0.3, 0.12
"""How often glass has a colour, and its optical density at most."""
_LEVELS = optical_density(np.arange(256, dtype=np.uint8)).astype(np.float64)
"""The optical density of each grey level."""


def similar_crop(
    arrays: Mapping[str, UInt8Array], rng: np.random.Generator, crop: int, width: Width = WIDE
) -> dict[str, UInt8Array]:
    """Cut the same crop from every array, at a random place, mostly rotated and scaled about it.

    Args:
        arrays: uint8 [H, W] or [H, W, 3], of one size.
        crop: height and width of the crop, pixels; what lies off the tile is its mirror image.
    """
    rows, columns = next(iter(arrays.values())).shape[:2]
    left, top = rng.uniform(0, columns - crop), rng.uniform(0, rows - crop)
    angle, scale = rng.uniform(0, 360), np.exp(rng.uniform(*np.log(width.scales)))
    if rng.random() < width.straight:
        window = np.s_[round(top) : round(top) + crop, round(left) : round(left) + crop]
        return {name: array[window] for name, array in arrays.items()}
    centre = (float(left + (crop - 1) / 2), float(top + (crop - 1) / 2))
    matrix = np.array(cv2.getRotationMatrix2D(centre, float(angle), float(scale)), np.float64)
    matrix[:, 2] += (crop - 1) / 2 - np.array(centre)
    return {
        name: np.asarray(
            cv2.warpAffine(
                array,
                matrix,
                (crop, crop),
                flags=cv2.INTER_CUBIC if array.ndim == 3 else cv2.INTER_LINEAR,
                borderMode=cv2.BORDER_REFLECT_101,
            ),
            np.uint8,
        )
        for name, array in arrays.items()
    }


def another_stain(he: UInt8Array, rng: np.random.Generator, width: Width = WIDE) -> UInt8Array:
    """Stain an H&E, uint8 [H, W, 3], more or less strongly, in slightly other colours, on glass of another tint.

    After Tellez et al. 2018, in the densities of the stains instead of a colour space.
    """
    vectors = HE_MATRIX + rng.normal(0, width.vector_spread, (3, 3))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    strength = np.exp(rng.uniform(-STAIN_RANGE, STAIN_RANGE, 3))
    tint = rng.dirichlet(np.ones(3)) * rng.uniform(0, LARGEST_TINT) * (rng.random() < TINT_SHARE)
    change = np.linalg.inv(HE_MATRIX) @ (strength[:, None] * vectors)
    density = optical_density(he) @ change.astype(np.float32) + tint.astype(np.float32)
    return image_of_density(density)


def another_cytoplasm(he: UInt8Array, cells: BoolArray, rng: np.random.Generator) -> UInt8Array:
    """Stain some cells of an H&E, uint8 [H, W, 3], otherwise than what is around them, with a soft edge.

    The cytoplasm of epithelium is pink in one organ, violet or pale in another, and a network that has seen one takes
    its colour for what it is. In half of the draws it is the mirror image of the cells that is stained otherwise, so
    that the edge does not tell where they are.

    Args:
        cells: [H, W], those of one kind.
    """
    if rng.random() < 0.5:
        cells = cells[::-1, ::-1]
    place = np.asarray(cv2.GaussianBlur(cells.astype(np.float32), (0, 0), rng.uniform(2, 10)), np.float32)
    hematoxylin, eosin = np.exp(rng.uniform(-STAIN_RANGE, STAIN_RANGE, 2))
    turned = rng.uniform(0, LARGEST_TURN)
    amounts = np.diag([hematoxylin, eosin * (1 - turned), 1.0])
    amounts[1, 0] = eosin * turned  # what was pink is violet
    change = np.linalg.inv(HE_MATRIX) @ amounts @ HE_MATRIX
    before = optical_density(he)
    density = before + place[..., None] * (before @ change.astype(np.float32) - before)
    return image_of_density(density)


def another_tone(he: UInt8Array, rng: np.random.Generator, width: Width = WIDE) -> UInt8Array:
    """An H&E, uint8 [H, W, 3], through another scanner's tone curve, mostly.

    d' = p (d / p)^γ of each channel's optical density d: glass stays white, and p as it is. Strength alone does not
    tell laboratories apart: of two sections as dark, one has half the other's contrast.
    """
    exponents = np.exp(width.tone_spread * (rng.standard_normal() + 0.5 * rng.standard_normal(3)))
    if rng.random() >= TONE_SHARE:
        return he
    return _channelwise(he, TONE_PIVOT * (_LEVELS / TONE_PIVOT) ** exponents[:, None])


def another_scanner(he: UInt8Array, rng: np.random.Generator, width: Width = WIDE) -> UInt8Array:
    """An H&E, uint8 [H, W, 3], out of focus or sharpened, with grain, or compressed; often nothing of it."""
    focus, grain, quality = rng.random(3)
    blur, spread, percent = rng.uniform(0.4, width.largest_blur), rng.uniform(1, 6), int(rng.integers(45, 95))
    image = he.astype(np.float32)
    if focus < 0.25:
        image = np.asarray(cv2.GaussianBlur(image, (0, 0), blur), np.float32)
    elif focus < 0.35:
        image = 1.8 * image - 0.8 * np.asarray(cv2.GaussianBlur(image, (0, 0), 1.2), np.float32)
    if grain < 0.2:
        image = image + rng.normal(0, spread, image.shape).astype(np.float32)
    scanned: UInt8Array = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    if quality < 0.4:
        _, encoded = cv2.imencode(".jpg", scanned, [cv2.IMWRITE_JPEG_QUALITY, percent])
        scanned = np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR), np.uint8)
    return scanned


def jitter_stain(he: UInt8Array, rng: np.random.Generator, strength: float) -> UInt8Array:
    """Scale and shift the optical density of each colour channel at random (after Tellez et al. 2018).

    Args:
        strength: standard deviation of the scale, and ten times that of the shift in units of optical density.
    """
    if strength == 0:
        return he
    scale = np.exp(strength * rng.standard_normal()) * np.exp(0.5 * strength * rng.standard_normal(3))
    shift = 0.1 * strength * rng.standard_normal(3)
    return _channelwise(he, _LEVELS * scale[:, None] + shift[:, None])


def _channelwise(he: UInt8Array, densities: NDArray[np.float64]) -> UInt8Array:
    """An image, uint8 [H, W, 3], whose channels have the optical densities [3, 256] instead of the levels'."""
    changed = np.empty_like(he)
    for channel, table in enumerate(image_of_density(densities)):
        changed[..., channel] = table[he[..., channel]]
    return changed
