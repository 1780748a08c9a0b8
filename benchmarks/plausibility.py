"""Whether a result on a real slide is plausible where there is no real IHC to compare with.

Two things can be measured without one: bare glass must stay clean, and the nuclei of the virtual counterstain must lie
where those of the H&E do. Both are necessary, neither is sufficient: a pathologist still has to look.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tifffile
from scipy import ndimage
from skimage.filters import threshold_otsu

from staindiffuser.client.model_view import ModelView
from staindiffuser.client.names import find_slide
from staindiffuser.client.run_record import read_run
from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.optical_density import HE_MATRIX, dab_density, hematoxylin_density, optical_density
from staindiffuser.imaging.slides import open_slide

__all__ = ["Plausibility", "judge"]

GLASS = 0.04
"""Optical density, mean over the channels, below which a smoothed H&E pixel is bare glass."""


@dataclass(frozen=True, kw_only=True)
class Plausibility:
    """One stain of one result."""

    stain: str
    glass_dab: float
    """Mean DAB optical density on bare glass; NaN where the slide shows none."""
    nuclei_dice: float
    """Dice of the nuclei in the H&E and in the virtual stain (hematoxylin, or the DAB that hides it)."""


def judge(result: Path, slides: Sequence[Path] = ()) -> list[Plausibility]:
    """Judge a result folder that ``stain`` wrote. Images are read whole: meant for small slides.

    Args:
        result: the folder.
        slides: H&E slides, or folders of them, among which its own is; not needed where ``run.json`` tells its path.

    Raises:
        InputError: the folder holds no complete result of ``stain``, or the H&E cannot be read.
    """
    run = read_run(result)
    with open_slide(find_slide(run, slides)) as slide:
        view = ModelView(slide, run.input.mpp, run.model.mpp)
        he = view.read(0, 0, *view.size)
    glass = _glass(he)
    nuclei = _nuclei(_he_hematoxylin(he), ~glass)
    judged = []
    for stain in run.stains:
        virtual = tifffile.imread(result / f"{stain.name}.ome.tiff", series=0, level=0)
        dab = dab_density(virtual)
        # DAB hides the nuclei inside it: compare only where nothing is brown.
        visible = ~glass & (ndimage.uniform_filter(dab, 9) < 0.15)
        found = _nuclei(ndimage.gaussian_filter(hematoxylin_density(virtual), 1), visible)
        judged.append(
            Plausibility(
                stain=stain.name,
                glass_dab=float(dab[glass].mean()) if glass.any() else float("nan"),
                nuclei_dice=_dice(nuclei & visible, found & visible),
            )
        )
    return judged


def _glass(he: UInt8Array) -> npt.NDArray[np.bool_]:
    pale = ndimage.uniform_filter(optical_density(he).mean(axis=2), 9) < GLASS
    cleaned: npt.NDArray[np.bool_] = ndimage.binary_opening(pale, iterations=4)
    return cleaned


def _he_hematoxylin(he: UInt8Array) -> npt.NDArray[np.float32]:
    amount = optical_density(he) @ np.linalg.inv(HE_MATRIX)[:, 0].astype(np.float32)
    smooth: npt.NDArray[np.float32] = ndimage.gaussian_filter(amount, 1)
    return smooth


def _nuclei(hematoxylin: npt.NDArray[np.float32], where: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Above Otsu's threshold of the local contrast, which evens out slow changes of the stain."""
    contrast = hematoxylin - ndimage.uniform_filter(hematoxylin, 101)
    if not where.any():
        return np.zeros_like(where)
    found: npt.NDArray[np.bool_] = (contrast > threshold_otsu(contrast[where])) & where
    return found


def _dice(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> float:
    total = int(a.sum()) + int(b.sum())
    return float(2 * int((a & b).sum()) / total) if total else 0.0
