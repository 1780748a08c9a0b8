"""The OME-XML of an image: what it is, who made it, its pixel size, objective and channel (OME schema 2016-06)."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from dataclasses import dataclass, field

from staindiffuser.imaging.pixel_size import PixelSize

__all__ = ["Channel", "ImageInfo", "ome_xml"]

NAMESPACE = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
_SCHEMA = f"{NAMESPACE} {NAMESPACE}/ome.xsd"
_XSI = "http://www.w3.org/2001/XMLSchema-instance"
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 cannot hold, even escaped."""
_OBJECTIVE = 10.0
"""Nominal magnification × pixel size in µm: a 20× objective gives about 0.5 µm."""


@dataclass(frozen=True)
class Channel:
    """A channel of an image."""

    name: str
    colour: str = ""
    """``#rrggbb``, in which viewers draw it; empty to leave it to them."""


@dataclass(frozen=True, kw_only=True)
class ImageInfo:
    """What the file says of itself."""

    name: str
    """Shown by viewers, such as ``CK8/18 (virtual)``."""
    description: str
    """The notice, and by which model, seed and steps it was made."""
    mpp: PixelSize
    """Pixel size of level 0, µm."""
    channels: tuple[Channel, ...]
    """One per plane of the file; RGB is one channel."""
    creator: str = "StainDiffuser"
    """The program and its version."""
    about: Mapping[str, str] = field(default_factory=dict)
    """Facts for programs: model, seed, source."""


def ome_xml(info: ImageInfo, size: tuple[int, int], samples: int) -> bytes:
    """Describe one image whose planes are the first directories of its file, one per channel; UTF-8.

    Characters that XML cannot hold become ``?``.

    Args:
        info: what it says.
        size: width and height, pixels.
        samples: per pixel of a plane: 3 for RGB, else 1.
    """
    root = ElementTree.Element(
        "OME", {"xmlns": NAMESPACE, "xmlns:xsi": _XSI, "xsi:schemaLocation": _SCHEMA, "Creator": _clean(info.creator)}
    )
    instrument = ElementTree.SubElement(root, "Instrument", ID="Instrument:0")
    magnification = _OBJECTIVE / ((info.mpp[0] + info.mpp[1]) / 2)
    ElementTree.SubElement(
        instrument, "Objective", ID="Objective:0:0", NominalMagnification=f"{float(f'{magnification:.2g}'):g}"
    )
    image = ElementTree.SubElement(root, "Image", ID="Image:0", Name=_clean(info.name))
    ElementTree.SubElement(image, "Description").text = _clean(info.description)
    ElementTree.SubElement(image, "InstrumentRef", ID="Instrument:0")
    ElementTree.SubElement(image, "ObjectiveSettings", ID="Objective:0:0")
    pixels = ElementTree.SubElement(
        image,
        "Pixels",
        {
            "ID": "Pixels:0",
            "DimensionOrder": "XYCZT",
            "Type": "uint8",
            "SizeX": str(size[0]),
            "SizeY": str(size[1]),
            "SizeC": str(samples * len(info.channels)),
            "SizeZ": "1",
            "SizeT": "1",
            "Interleaved": "true" if samples > 1 else "false",
            "PhysicalSizeX": repr(float(info.mpp[0])),
            "PhysicalSizeXUnit": "µm",
            "PhysicalSizeY": repr(float(info.mpp[1])),
            "PhysicalSizeYUnit": "µm",
        },
    )
    for number, channel in enumerate(info.channels):
        colour = {"Color": str(_signed_rgba(channel.colour))} if channel.colour else {}
        about = {"ID": f"Channel:0:{number}", "Name": _clean(channel.name), "SamplesPerPixel": str(samples)}
        ElementTree.SubElement(pixels, "Channel", about | colour)
    for number in range(len(info.channels)):
        ElementTree.SubElement(pixels, "TiffData", IFD=str(number), FirstC=str(number), PlaneCount="1")
    if info.about:
        ElementTree.SubElement(image, "AnnotationRef", ID="Annotation:0")
        annotations = ElementTree.SubElement(root, "StructuredAnnotations")
        map_annotation = ElementTree.SubElement(
            annotations, "MapAnnotation", ID="Annotation:0", Namespace="staindiffuser/about"
        )
        value = ElementTree.SubElement(map_annotation, "Value")
        for key, text in info.about.items():
            ElementTree.SubElement(value, "M", K=_clean(key)).text = _clean(text)
    return bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True))


def _signed_rgba(colour: str) -> int:
    """The schema's colour: a signed 32-bit integer of red, green, blue and opacity."""
    return int.from_bytes(bytes.fromhex(colour.removeprefix("#") + "ff"), "big", signed=True)


def _clean(text: str) -> str:
    return _NOT_XML.sub("?", text)
