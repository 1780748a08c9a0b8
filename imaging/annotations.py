"""Regions drawn in a viewer: polygons in GeoJSON, as QuPath exports them, in level-0 pixels of the slide."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw

from staindiffuser.errors import InputError

__all__ = ["Polygon", "coverage", "read_regions"]

Polygon = list[NDArray[np.float64]]
"""Rings, [N, 2] x, y: the outline, then its holes."""
FINER = 3
"""Subdivisions of a pixel, on each axis, by which its coverage is found."""


def read_regions(path: Path) -> list[Polygon]:
    """The polygons of a GeoJSON file (``.geojson``, ``.json``, either with ``.gz``); points and lines are passed over.

    Raises:
        InputError: the file cannot be read, is not GeoJSON, or holds no polygon.
    """
    try:
        content = path.read_bytes()
        data = json.loads(gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content)
        polygons = [[_ring(ring) for ring in rings] for rings in _polygons(data)]
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, EOFError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is not GeoJSON: {' '.join(str(error).split())[:120]}") from error
    if not polygons:
        raise InputError(f"{path} holds no polygon: draw the regions to stain as areas")
    return polygons


def coverage(polygons: Sequence[Polygon], size: tuple[int, int], scale: tuple[float, float]) -> NDArray[np.float32]:
    """How much of each pixel of a grid the polygons cover: float32 [height, width], 0 … 1.

    Args:
        polygons: their union counts, each without its holes.
        size: width and height of the grid.
        scale: of its pixels, in the polygons' units.
    """
    width, height = size[0] * FINER, size[1] * FINER
    total = Image.new("1", (width, height))
    for rings in polygons:
        one = Image.new("1", (width, height))
        for ring in rings:
            layer = Image.new("1", (width, height))
            corners = [(x * FINER / scale[0] - 0.5, y * FINER / scale[1] - 0.5) for x, y in ring.tolist()]
            ImageDraw.Draw(layer).polygon(corners, fill=1)
            one = ImageChops.logical_xor(one, layer)
        total = ImageChops.logical_or(total, one)
    share: NDArray[np.float32] = np.asarray(total.convert("L").reduce(FINER), dtype=np.float32) / 255
    return share


def _polygons(data: Any) -> Iterator[Any]:
    if isinstance(data, list):  # QuPath's older versions export a bare list
        for item in data:
            yield from _polygons(item)
        return
    kind = data["type"]
    if kind == "FeatureCollection":
        yield from _polygons(data["features"])
    elif kind == "Feature":
        if data["geometry"] is not None:
            yield from _polygons(data["geometry"])
    elif kind == "GeometryCollection":
        yield from _polygons(data["geometries"])
    elif kind == "Polygon":
        yield data["coordinates"]
    elif kind == "MultiPolygon":
        yield from data["coordinates"]
    elif kind not in ("Point", "MultiPoint", "LineString", "MultiLineString"):
        raise ValueError(f"unknown type {kind!r}")


def _ring(corners: Any) -> NDArray[np.float64]:
    ring = np.array([(float(corner[0]), float(corner[1])) for corner in corners])
    if len(ring) < 3 or not all(math.isfinite(value) for value in ring.ravel()):
        raise ValueError("a polygon has fewer than three corners, or one that is no number")
    return ring
