"""The pixel size of a slide (µm per pixel, "mpp") from the metadata of its file."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping

from staindiffuser.errors import UsageError

__all__ = [
    "LARGEST_GIVEN",
    "SAME_PIXEL_SIZE",
    "SMALLEST",
    "PixelSize",
    "check_given",
    "from_dpi",
    "from_imagej",
    "from_ome_xml",
    "from_openslide",
    "from_resolution",
    "plausible",
]

PixelSize = tuple[float, float]
"""Width and height of a pixel at level 0, µm."""

SMALLEST, LARGEST = 0.05, 10.0
"""Outside of these, what a file states is the resolution of a screen or a printer, or a mistake."""
SAME_PIXEL_SIZE = 0.02
"""Pixel sizes that differ by less than this share count as equal (ours: scanners are not calibrated any better)."""
LARGEST_GIVEN = 100.0
"""A user may name larger pixels than a file is believed: an overview image's."""

_UNIT_IN_UM = {"m": 1e6, "dm": 1e5, "cm": 1e4, "mm": 1e3, "µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "in": 25400.0}
_INCH, _CENTIMETRE = 2, 3


def plausible(mpp_x: float, mpp_y: float) -> PixelSize | None:
    """The pair, or None where it cannot be a microscope's."""
    fits = all(math.isfinite(mpp) and SMALLEST <= mpp <= LARGEST for mpp in (mpp_x, mpp_y))
    return (mpp_x, mpp_y) if fits and max(mpp_x, mpp_y) <= 2 * min(mpp_x, mpp_y) else None


def check_given(mpp: float | None, name: str) -> None:
    """Check a pixel size that a user gives, µm; None passes.

    Raises:
        UsageError: it is no number from 0.05 to 100; the message names ``name``.
    """
    if mpp is not None and not SMALLEST <= mpp <= LARGEST_GIVEN:
        raise UsageError(f"{name} is {mpp:g}; it must be µm per pixel, between {SMALLEST:g} and {LARGEST_GIVEN:g}")


def from_openslide(properties: Mapping[str, str]) -> PixelSize | None:
    """``openslide.mpp-x`` and ``openslide.mpp-y``, where the vendor gives them."""
    try:
        return plausible(float(properties["openslide.mpp-x"]), float(properties["openslide.mpp-y"]))
    except (KeyError, ValueError):
        return None


def from_ome_xml(xml: str | None, image: int = 0) -> PixelSize | None:
    """``PhysicalSizeX`` and ``PhysicalSizeY`` of an image; their unit is µm unless the file names another."""
    if not xml:
        return None
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError:
        return None
    pixels = [element for element in root.iter() if element.tag.rpartition("}")[2] == "Pixels"]
    try:
        element = pixels[image]
        sizes = [
            float(element.attrib[f"PhysicalSize{axis}"]) * _UNIT_IN_UM[element.get(f"PhysicalSize{axis}Unit", "µm")]
            for axis in "XY"
        ]
    except (IndexError, KeyError, ValueError):
        return None
    return plausible(*sizes)


def from_resolution(x: tuple[int, int] | None, y: tuple[int, int] | None, unit: int | None) -> PixelSize | None:
    """TIFF's resolution tags: pixels per unit as fractions; only inch (2) and centimetre (3) say a length."""
    if not x or not y or unit not in (_INCH, _CENTIMETRE) or not all((*x, *y)):
        return None
    length = 25400.0 if unit == _INCH else 10000.0
    return plausible(length * x[1] / x[0], length * y[1] / y[0])


def from_imagej(unit: str | None, x: tuple[int, int] | None, y: tuple[int, int] | None) -> PixelSize | None:
    """ImageJ's resolution: pixels per ``unit`` in TIFF's resolution tags, the unit in the image description."""
    name = (unit or "").strip().replace("\\u00B5", "µ").lower()
    length = _UNIT_IN_UM.get({"micron": "µm", "microns": "µm", "inch": "in", "centimeter": "cm"}.get(name, name))
    if not length or not x or not y or not all((*x, *y)):
        return None
    return plausible(length * x[1] / x[0], length * y[1] / y[0])


def from_dpi(dpi: tuple[float, float] | None) -> PixelSize | None:
    """Pixels per inch as PNG and JPEG give them."""
    if not dpi or min(dpi) <= 0:
        return None
    return plausible(25400.0 / float(dpi[0]), 25400.0 / float(dpi[1]))
