"""Coordinates of one section mapped to another, and images resampled there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from staindiffuser.imaging.arrays import FloatArray
from staindiffuser.training.prepare.registration.features import Structure
from staindiffuser.training.prepare.registration.resampling import sampled

__all__ = ["Affine", "Warp", "remapped", "warped"]

Affine = npt.NDArray[np.float64]
"""[2, 3]."""


@dataclass(frozen=True, kw_only=True)
class Warp:
    """Maps coordinates on the H&E slide to coordinates on the IHC slide, both in µm."""

    affine: Affine
    """Applied after the displacement."""
    displacement: FloatArray
    """[h, w, 2], µm on the H&E slide, on a grid of its own."""
    origin: tuple[float, float]
    """Top left corner of that grid, µm on the H&E slide."""
    mpp: float
    """Spacing of that grid, µm."""

    def points(self, um: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Map coordinates [n, 2] (x, y) on the H&E slide to the IHC slide, µm."""
        x, y = um[:, 0].astype(np.float32)[None], um[:, 1].astype(np.float32)[None]
        return np.asarray(self._mapped(x, y)[0], np.float64)

    def grid(
        self, origin: tuple[float, float], shape: tuple[int, ...], mpp: float, shift: FloatArray | None = None
    ) -> FloatArray:
        """Coordinates on the IHC slide of a rectangle's pixels.

        Args:
            origin: its top left corner, µm on the H&E slide.
            shape: its height and width, pixels.
            mpp: its pixel size, µm.
            shift: a further displacement [H, W, 2], in its pixels.

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
        displacement = sampled(self.displacement, np.stack([column, row], axis=-1), beyond=None)
        x, y = x + displacement[..., 0], y + displacement[..., 1]
        a = self.affine
        return np.stack(
            [a[0, 0] * x + a[0, 1] * y + a[0, 2], a[1, 0] * x + a[1, 1] * y + a[1, 2]], axis=-1, dtype=np.float32
        )


def warped(moving: Structure, matrix: Affine, shape: tuple[int, ...], shift: FloatArray | None = None) -> Structure:
    """The moving image on the fixed one's grid; glass where it does not reach.

    Args:
        moving: what to warp.
        matrix: [2, 3], fixed pixels to moving pixels.
        shape: height and width of the fixed image.
        shift: [H, W, 2], a displacement of the fixed grid before the matrix, pixels.
    """
    x, y = np.meshgrid(np.arange(shape[1], dtype=np.float32), np.arange(shape[0], dtype=np.float32))
    if shift is not None:
        x, y = x + shift[..., 0], y + shift[..., 1]
    column = matrix[0, 0] * x + matrix[0, 1] * y + matrix[0, 2]
    row = matrix[1, 0] * x + matrix[1, 1] * y + matrix[1, 2]
    return remapped(moving, np.stack([column, row], axis=-1, dtype=np.float32))


def remapped(moving: Structure, coordinates: FloatArray) -> Structure:
    """An image at the coordinates [H, W, 2] (x, y), pixels; glass beyond its edges."""
    return Structure(
        hematoxylin=sampled(moving.hematoxylin, coordinates),
        presence=sampled(moving.presence, coordinates),
        tissue=sampled(moving.tissue.astype(np.float32), coordinates) > 0.5,
    )
