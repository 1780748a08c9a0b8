"""Scores of a region that somebody drew."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from skimage.measure import points_in_poly

from staindiffuser.imaging.instances import lowest_grey
from staindiffuser.viewer.comparison import agreement
from staindiffuser.viewer.errors import RequestError
from staindiffuser.viewer.pyramids import SIDE, MapPyramid, Pyramid
from staindiffuser.viewer.results import OpenResult

__all__ = ["MAX_CORNERS", "parse_polygon", "positive_share", "region_scores"]

MAX_CORNERS = 1000
MAX_PIXELS = 4_000_000
"""Of a cell map that are looked at for the positive area; larger regions are measured on a reduced level."""

Polygon = NDArray[np.float64]


def parse_polygon(data: object, size: tuple[int, int]) -> Polygon:
    """Corners [N, 2] of a region in level-0 pixels, cut at the slide's edge.

    Raises:
        RequestError: it is not a polygon, or has no area on the slide.
    """
    if not isinstance(data, list) or not 3 <= len(data) <= MAX_CORNERS:
        raise RequestError(f"polygon: must have 3 to {MAX_CORNERS} corners")
    if not all(isinstance(point, list) and len(point) == 2 and all(map(_is_number, point)) for point in data):
        raise RequestError("polygon: each corner must be two finite numbers")
    corners = np.clip(np.array(data, np.float64), 0, np.array(size, np.float64))
    if _area(corners) < 1:
        raise RequestError("polygon: it has no area on the slide")
    return corners


def region_scores(
    result: OpenResult, polygon: Polygon, threshold: float, compared: Mapping[str, Pyramid]
) -> dict[str, Any]:
    """Cells, density and positive area of each stain in a region.

    Args:
        result: the result.
        polygon: corners [N, 2], level-0 pixels.
        threshold: mean probability from which a cell counts.
        compared: other images of the same stains, by the stain's name.

    Returns:
        ``area_mm2``, and per stain label ``cells``, ``cells_per_mm2`` (None while cells are being read, or without
        any) and ``positive_area_share`` (None without cell maps),
        and ``agreement`` with the other image.
    """
    mpp = result.run.input.mpp
    area = _area(polygon) * mpp[0] * mpp[1] / 1e6
    counts = _cells_within(result, polygon, threshold)
    stains = []
    for stain, image in result.stains.values():
        cell_map = result.maps.get(stain.name)
        cells = None if counts is None else counts.get(stain.label, 0)
        stains.append(
            {
                "label": stain.label,
                "cells": cells,
                "cells_per_mm2": None if cells is None else cells / area,
                "positive_area_share": positive_share(cell_map, polygon * _scale(result, cell_map), stain.threshold)
                if cell_map
                else None,
                "agreement": agreement(image, compared[stain.name], polygon * _scale(result, image), _mask, MAX_PIXELS)
                if stain.name in compared
                else None,
            }
        )
    return {"area_mm2": area, "stains": stains}


def positive_share(cell_map: MapPyramid, polygon: Polygon, threshold: float) -> float:
    """Share of a polygon where a cell map reaches a threshold.

    Args:
        cell_map: the map.
        polygon: corners [N, 2], pixels of the map. More than ``MAX_PIXELS`` are looked at on a reduced level.
        threshold: probability.
    """
    (x0, y0), (x1, y1) = polygon.min(axis=0), polygon.max(axis=0)
    level = 0
    while level + 1 < len(cell_map.levels) and (x1 - x0) * (y1 - y0) / 4**level > MAX_PIXELS:
        level += 1
    corners = polygon / 2**level
    width, height = cell_map.levels[level]
    left, top = max(0, int(x0 / 2**level)), max(0, int(y0 / 2**level))
    right, bottom = min(width, math.ceil(x1 / 2**level)), min(height, math.ceil(y1 / 2**level))
    positive = total = 0
    for row in range(top // SIDE, -(-bottom // SIDE)):
        for column in range(left // SIDE, -(-right // SIDE)):
            inside = _mask(corners - np.array([column * SIDE, row * SIDE]))
            if not inside.any():
                continue
            values = cell_map.values(level, column, row)
            inside = inside[: values.shape[0], : values.shape[1]]
            positive += int(((values >= lowest_grey(threshold)) & inside).sum())
            total += int(inside.sum())
    return positive / total if total else 0.0


def _cells_within(result: OpenResult, polygon: Polygon, threshold: float) -> dict[str, int] | None:
    index = result.cells.index()
    if index is None:
        return None
    (x0, y0), (x1, y1) = polygon.min(axis=0), polygon.max(axis=0)
    kind, probability, centroid = index.within(x0, y0, x1 + 1e-6, y1 + 1e-6)
    keep = probability >= threshold
    kind, centroid = kind[keep], centroid[keep]
    if not _is_rectangle(polygon):
        kind = kind[points_in_poly(centroid, polygon)]
    counts = np.bincount(kind, minlength=len(index.classes))
    return {one.name: int(count) for one, count in zip(index.classes, counts, strict=True)}


def _scale(result: OpenResult, image: MapPyramid | Pyramid) -> NDArray[np.float64]:
    """Pixels of the image per level-0 pixel of the slide."""
    return np.array(image.levels[0], np.float64) / np.array(result.run.input.size, np.float64)


def _mask(corners: Polygon) -> NDArray[np.bool_]:
    """The part of a polygon on a tile: bool [SIDE, SIDE]."""
    canvas = Image.new("1", (SIDE, SIDE))
    points: Sequence[tuple[float, float]] = [(float(x) - 0.5, float(y) - 0.5) for x, y in corners]
    ImageDraw.Draw(canvas).polygon(points, fill=1)
    return np.asarray(canvas)


def _is_rectangle(polygon: Polygon) -> bool:
    return len(polygon) == 4 and len(np.unique(polygon[:, 0])) == 2 and len(np.unique(polygon[:, 1])) == 2


def _area(corners: Polygon) -> float:
    x, y = (corners - corners[0]).T
    return abs(float(np.dot(x, np.roll(y, -1)) - np.dot(np.roll(x, -1), y))) / 2


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9
