"""Smooth random fields over the whole plane, cheap at any position.

A few tileable textures are made once per process (0.1 s). A field of a world is one of them, seen rotated, shifted and
scaled by the world's own numbers; two octaves that are rotated differently hide the repetition.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from staindiffuser.imaging.arrays import FloatArray
from staindiffuser.training.simulate.randomness import stream

__all__ = ["field", "fine_texture", "fractal", "streaks"]

_SIZE = 256
_TEXELS = 12.0
"""Texels per feature of the smooth texture."""
_FINE = 512


@lru_cache(maxsize=1)
def _smooth() -> FloatArray:
    return _normalised(stream(7, 1).standard_normal((_SIZE, _SIZE)), (4.0, 4.0))


@lru_cache(maxsize=16)
def _fine_texture(sigma: float, salt: int) -> FloatArray:
    noise = stream(7, 2, salt, round(sigma * 100)).standard_normal((_FINE, _FINE))
    return np.tile(_normalised(noise, (sigma, sigma)), (2, 2))


def fine_texture(sigma: float, salt: int, x: int, y: int, height: int, width: int) -> FloatArray:
    """A piece of a tileable 512 x 512 texture of mean 0 and deviation 1, Gaussian-correlated over ``sigma`` pixels.

    Args:
        sigma: pixels.
        salt: which texture.
        x: left edge, any integer.
        y: top edge.
        height: at most 512.
        width: at most 512.

    Returns:
        float32 [height, width], a view: do not write to it.
    """
    x, y = x % _FINE, y % _FINE
    if max(height, width) > _FINE:
        rows, columns = (np.arange(height) + y) % _FINE, (np.arange(width) + x) % _FINE
        whole: FloatArray = _fine_texture(sigma, salt)[rows[:, None], columns[None, :]]
        return whole
    piece: FloatArray = _fine_texture(sigma, salt)[y : y + height, x : x + width]
    return piece


@lru_cache(maxsize=1)
def _streak_texture() -> FloatArray:
    """Fibres along the second axis: short correlation across them, long along them, two widths mixed."""
    noise = stream(7, 3).standard_normal((2, _FINE, _FINE))
    mixed = _normalised(noise[0], (1.3, 9.0)) + 0.8 * _normalised(noise[1], (4.0, 24.0))
    return _normalised(mixed, None)


def _normalised(noise: npt.NDArray[np.floating[Any]], sigma: tuple[float, float] | None) -> FloatArray:
    smooth = noise if sigma is None else ndimage.gaussian_filter(noise, sigma, mode="wrap")
    texture: FloatArray = ((smooth - smooth.mean()) / smooth.std()).astype(np.float32)
    return texture


def field(number: float, scale: float, x: FloatArray, y: FloatArray) -> FloatArray:
    """A smooth field of mean 0 and deviation 1.

    Args:
        number: uniform in [0, 1); which field.
        scale: diameter of a feature, pixels.
        x: world coordinates, any shape.
        y: the same shape.

    Returns:
        float32 of that shape.
    """
    angle = 2.0 * np.pi * ((number * 977.0) % 1.0)
    zoom = _TEXELS / scale
    u = (
        x * np.float32(np.cos(angle) * zoom)
        - y * np.float32(np.sin(angle) * zoom)
        + np.float32(number * 131.0 % 1.0 * _SIZE)
    )
    v = (
        x * np.float32(np.sin(angle) * zoom)
        + y * np.float32(np.cos(angle) * zoom)
        + np.float32(number * 7919.0 % 1.0 * _SIZE)
    )
    return _bilinear(_smooth(), u, v)


def fractal(number: float, scale: float, x: FloatArray, y: FloatArray, *, roughness: float = 0.5) -> FloatArray:
    """Two octaves of :func:`field`, the second at a third of the scale, of deviation about 1."""
    total = field(number, scale, x, y) + np.float32(roughness) * field((number * 3.7) % 1.0, scale / 3.0, x, y)
    return total / np.float32(np.hypot(1.0, roughness))


def streaks(along: FloatArray, across: FloatArray) -> FloatArray:
    """Fibres: nearest texel of the streak texture at coordinates along and across the fibres, pixels."""
    rows = across.astype(np.int32) & (_FINE - 1)
    columns = along.astype(np.int32) & (_FINE - 1)
    values: FloatArray = _streak_texture().ravel()[(rows << 9) | columns]
    return values


def _bilinear(texture: FloatArray, u: FloatArray, v: FloatArray) -> FloatArray:
    u0, v0 = np.floor(u), np.floor(v)
    fu, fv = u - u0, v - v0
    iu, iv = u0.astype(np.int32) & (_SIZE - 1), v0.astype(np.int32) & (_SIZE - 1)
    ju, jv = (iu + 1) & (_SIZE - 1), (iv + 1) & (_SIZE - 1)
    flat = texture.ravel()
    iv, jv = iv << 8, jv << 8
    top = flat[iv | iu] * (1 - fu) + flat[iv | ju] * fu
    bottom = flat[jv | iu] * (1 - fu) + flat[jv | ju] * fu
    values: FloatArray = top * (1 - fv) + bottom * fv
    return values
