"""The images that are registered: the tissue of each slide, at one pixel size."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy import ndimage

from staindiffuser.imaging.glass import glass_percentile
from staindiffuser.training.errors import DataError
from staindiffuser.training.prepare.registration.features import structure
from staindiffuser.training.prepare.registration.register import WORKING_SIDE
from staindiffuser.training.prepare.sections import Section, SectionImage

__all__ = ["overviews", "tissue_box"]

Box = tuple[float, float, float, float]

_SIDE = 512
"""Long side of the image in which tissue is found, pixels."""
_SMALLEST = 0.01
"""Parts below this share of the tissue area are debris."""
_MARGIN = 0.04
"""Margin added around the tissue, as a share of its longer side."""


def tissue_box(section: Section) -> Box:
    """Where a slide's tissue is: (left, top, right, bottom), µm, with a margin.

    Raises:
        DataError: there is none.
    """
    width, height = section.size_um
    mpp = max(max(width, height) / _SIDE, *section.mpp)
    size = (max(1, int(width / mpp)), max(1, int(height / mpp)))
    rgb = section.read((0.0, 0.0), size, mpp).rgb
    tissue = structure(rgb, "he", glass_percentile(rgb)).tissue
    labels, count = ndimage.label(tissue, np.ones((3, 3)))
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    areas[0] = 0
    if areas.sum() < 0.001 * tissue.size:
        raise DataError(f"{section.path} shows no tissue")
    rows, columns = np.nonzero((areas >= _SMALLEST * areas.sum())[labels])
    left, right = columns.min() * mpp, (columns.max() + 1) * mpp
    top, bottom = rows.min() * mpp, (rows.max() + 1) * mpp
    margin = _MARGIN * max(right - left, bottom - top)
    return (
        max(0.0, left - margin),
        max(0.0, top - margin),
        min(width, right + margin),
        min(height, bottom + margin),
    )


def overviews(
    he: Section, ihc: Mapping[str, Section], *, side: int = WORKING_SIDE
) -> tuple[SectionImage, dict[str, SectionImage]]:
    """Read the tissue of every slide at one pixel size; the longest is about ``side`` pixels long.

    Raises:
        DataError: a slide shows no tissue.
        SlideError: a slide is damaged.
    """
    sections = {"he": he, **ihc}
    boxes = {name: tissue_box(section) for name, section in sections.items()}
    longest = max(max(x1 - x0, y1 - y0) for x0, y0, x1, y1 in boxes.values())
    # Enlarging a coarser slide would show nothing new.
    mpp = max(longest / side, *(max(section.mpp) for section in sections.values()))
    planes = {
        name: section.read((x0, y0), (max(1, round((x1 - x0) / mpp)), max(1, round((y1 - y0) / mpp))), mpp)
        for (name, section), (x0, y0, x1, y1) in zip(sections.items(), boxes.values(), strict=True)
    }
    return planes.pop("he"), planes
