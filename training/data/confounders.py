"""What no stain marks and networks paint all the same: pasted into crops, so that they learn to leave it alone.

Blood, gland contents, pen, tinted glass, keratin and folds are rare in the real pairs, and each was seen painted on
other laboratories' slides. Colours are drawn as optical densities of hematoxylin and eosin, and the crop's other
augmentations (another stain, another scanner) come after.

Shapes: H and W a crop's height and width in pixels, of 0.5 µm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import cv2
import numpy as np

from staindiffuser.imaging.arrays import FloatArray, UInt8Array
from staindiffuser.imaging.optical_density import HE_MATRIX, image_of_density, optical_density

__all__ = ["CONFOUNDERS", "with_confounder"]

Painter = Callable[[np.random.Generator, FloatArray], tuple[FloatArray, FloatArray, float]]
"""A crop's optical density, float32 [H, W, 3] → the density of what is pasted, [H, W, 3]; where it lies, [H, W] in
[0, 1]; and how much of what is under it it hides: 1 all, 0 nothing, and the densities add up."""
GLASS = 255
"""Grey level of the stains' images where something was pasted: nothing is stained there, and glass is white."""


def with_confounder(arrays: Mapping[str, UInt8Array], rng: np.random.Generator) -> dict[str, UInt8Array]:
    """Paste one of :data:`CONFOUNDERS` into a crop.

    Args:
        arrays: ``he`` [H, W, 3], and per stain ``<stain>`` [H, W, 3] and ``<stain>_mask`` [H, W], uint8.

    Returns:
        the same arrays; under what was pasted the masks are empty and the stains' images are bare.
    """
    names = sorted(CONFOUNDERS)
    paint = CONFOUNDERS[names[int(rng.integers(len(names)))]]
    before = optical_density(arrays["he"])
    density, place, hides = paint(rng, before)
    cover = place[..., None]
    mixed = np.asarray(before * (1 - hides * cover) + density * cover, np.float32)
    hidden = place > 0.5
    changed: dict[str, UInt8Array] = {}
    for name, array in arrays.items():
        if name == "he":
            changed[name] = image_of_density(mixed)
        else:
            changed[name] = array.copy()
            changed[name][hidden] = GLASS if array.ndim == 3 else 0
    return changed


def _field(rng: np.random.Generator, height: int, width: int, scale: float) -> FloatArray:
    """Smooth noise of mean 0 and standard deviation 1 whose blobs are about ``scale`` pixels wide."""
    rows, columns = (max(2, round(side / scale) + 2) for side in (height, width))
    coarse = rng.standard_normal((rows, columns)).astype(np.float32)
    field = np.asarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), np.float32)
    normed: FloatArray = (field - field.mean()) / (field.std() + 1e-6)
    return normed


def _patch(rng: np.random.Generator, height: int, width: int) -> FloatArray:
    """A region of irregular outline, a seventh to all of the crop, with a soft edge: [H, W] in [0, 1]."""
    field = _field(rng, height, width, rng.uniform(0.25, 0.8) * max(height, width))
    level = np.quantile(field, 1 - rng.uniform(0.15, 0.7)) if rng.random() < 0.9 else field.min() - 1
    return np.asarray(np.clip((field - level) * rng.uniform(4, 20) + 0.5, 0, 1), np.float32)


def _stroke(rng: np.random.Generator, height: int, width: int, thickness: int) -> FloatArray:
    """A stroke from anywhere to anywhere, with a soft edge: [H, W] in [0, 1]."""
    stroke = np.zeros((height, width), np.float32)
    points = rng.uniform(-0.2, 1.2, (int(rng.integers(2, 5)), 2)) * (width, height)
    cv2.polylines(stroke, [np.rint(points).astype(np.int32)], False, (1.0,), thickness, cv2.LINE_AA)
    return np.clip(np.asarray(cv2.GaussianBlur(stroke, (0, 0), rng.uniform(1, 5)), np.float32), 0, 1)


def _stained(hematoxylin: FloatArray | float, eosin: FloatArray) -> FloatArray:
    """Density of hematoxylin and eosin, [H, W] each, as [H, W, 3]."""
    amounts = np.stack([np.broadcast_to(np.asarray(hematoxylin), eosin.shape), eosin], axis=-1)
    return np.asarray(np.maximum(amounts, 0) @ HE_MATRIX[:2], np.float32)


def _blood(rng: np.random.Generator, crop: FloatArray) -> tuple[FloatArray, FloatArray, float]:
    """A pool of erythrocytes: discs of 6 to 8 µm without nuclei, bright with eosin, touching or strewn."""
    height, width = crop.shape[:2]
    discs = np.zeros((height, width), np.float32)
    count = int(height * width / rng.uniform(60, 400))
    centres = np.stack([rng.uniform(0, width, count), rng.uniform(0, height, count)], axis=-1)
    strengths = rng.uniform(0.6, 1.0, count)
    for (x, y), strength in zip(centres, strengths, strict=True):
        axes = rng.uniform(5.0, 8.0, 2)
        where = (int(16 * x), int(16 * y))
        size = (int(16 * axes[0]), int(16 * axes[1]))
        cv2.ellipse(discs, where, size, float(rng.uniform(0, 180)), 0, 360, (float(strength),), -1, cv2.LINE_AA, 4)
    discs = np.asarray(cv2.GaussianBlur(discs, (0, 0), 0.8), np.float32)
    place = _patch(rng, height, width)
    # Erythrocytes are more orange than eosin: they take a little of the blue.
    orange = np.array([0.0, 0.0, rng.uniform(0.1, 0.5)], np.float32)
    density = _stained(rng.uniform(0, 0.08), discs * rng.uniform(0.3, 0.9)) + discs[..., None] * orange
    return density, place, 1.0


def _mucin(rng: np.random.Generator, crop: FloatArray) -> tuple[FloatArray, FloatArray, float]:
    """Pale, wispy, bluish or greyish contents of glands, with a few specks of debris."""
    height, width = crop.shape[:2]
    wisps = _field(rng, height, width, rng.uniform(15, 50)) + 0.5 * _field(rng, height, width, rng.uniform(5, 12))
    blue, pink = rng.uniform(0.02, 0.2), rng.uniform(0.0, 0.12)
    hematoxylin = blue * (1 + 0.35 * wisps) + 0.5 * (_field(rng, height, width, 4.0) > 3.2)
    return _stained(hematoxylin, pink * (1 + 0.4 * wisps)), _patch(rng, height, width), 1.0


def _pen(rng: np.random.Generator, crop: FloatArray) -> tuple[FloatArray, FloatArray, float]:
    """A stroke of a marker in any colour, over glass or tissue, which shines through it or not."""
    height, width = crop.shape[:2]
    stroke = _stroke(rng, height, width, int(rng.integers(20, 160)))
    ink = rng.dirichlet(np.full(3, 0.7)) * rng.uniform(0.3, 4.0) + rng.uniform(0, 0.6)
    uneven = 1 + 0.15 * _field(rng, height, width, rng.uniform(10, 60))
    return np.asarray(uneven[..., None] * ink, np.float32), stroke, float(rng.random() < 0.5)


def _fold(rng: np.random.Generator, crop: FloatArray) -> tuple[FloatArray, FloatArray, float]:
    """A crease: the section lies on itself once or twice, out of focus."""
    height, width = crop.shape[:2]
    layers = np.zeros_like(crop)
    for _ in range(int(rng.integers(1, 3))):
        shift = rng.integers(-60, 61, 2)
        layers += np.roll(crop[::-1] if rng.random() < 0.5 else crop[:, ::-1], tuple(shift), axis=(0, 1))
    layers = np.asarray(cv2.GaussianBlur(layers, (0, 0), rng.uniform(0.5, 4)), np.float32)
    return layers, _stroke(rng, height, width, int(rng.integers(12, 70))), 0.0


def _glass(rng: np.random.Generator, crop: FloatArray) -> tuple[FloatArray, FloatArray, float]:
    """Bare glass under light of another colour, evenly or with a shade across it."""
    height, width = crop.shape[:2]
    tint = rng.dirichlet(np.full(3, 3.0)) * rng.uniform(0, 0.3) + rng.uniform(0, 0.06)
    shade = 1 + 0.2 * _field(rng, height, width, 2.0 * max(height, width))
    grain = rng.normal(0, rng.uniform(0, 0.01), (height, width, 3))
    return np.asarray(shade[..., None] * tint + grain, np.float32), _patch(rng, height, width), 1.0


def _keratin(rng: np.random.Generator, crop: FloatArray) -> tuple[FloatArray, FloatArray, float]:
    """Layers of horn, or smeared debris: dense eosin in curved lamellae, no nuclei."""
    height, width = crop.shape[:2]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle, period = rng.uniform(0, np.pi), rng.uniform(4, 14)
    bend = period * _field(rng, height, width, rng.uniform(50, 140))
    waves = np.sin(2 * np.pi * (x * math.cos(angle) + y * math.sin(angle) + bend) / period)
    eosin = rng.uniform(0.2, 0.7) * (1 + rng.uniform(0.1, 0.6) * waves + 0.1 * _field(rng, height, width, 3.0))
    orange = np.array([0.0, 0.0, rng.uniform(0.0, 0.4)], np.float32)
    return _stained(rng.uniform(0, 0.1), eosin) + eosin[..., None] * orange, _patch(rng, height, width), 1.0


CONFOUNDERS: Mapping[str, Painter] = {
    "blood": _blood,
    "fold": _fold,
    "glass": _glass,
    "keratin": _keratin,
    "mucin": _mucin,
    "pen": _pen,
}
