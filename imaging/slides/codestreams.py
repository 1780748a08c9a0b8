"""Finds out whether a compressed JPEG or JPEG 2000 image is intact.

Decoders fill what is missing or corrupt with grey and report success, or at most print a warning. A slide decoded that
way is a wrong image, so every image is checked before it is used.
"""

from __future__ import annotations

import re

import simplejpeg

from staindiffuser.imaging.arrays import UInt8Array

__all__ = [
    "DamagedCodestreamError",
    "complete_jpeg",
    "decode_intact_jpeg",
    "require_intact_jpeg",
    "require_intact_jpeg2000",
]

_J2K_SIGNATURE = b"\xff\x4f\xff\x51"
_SOT, _SOD, _EOC = 0xFF90, b"\xff\x93", b"\xff\xd9"
_NOT_IN_PACKETS = re.compile(rb"\xff[\x90\x93-\xff]")
"""The coder never writes such bytes, but for the markers of packets, SOP and EPH (Annex B.10.1 and D.4.1)."""


_IS_RGB = bytes.fromhex("ffee000e") + b"Adobe" + bytes.fromhex("00640000000000")
"""Adobe's APP14 segment with transform 0: the three components are RGB, whatever a decoder would guess."""


class DamagedCodestreamError(ValueError):
    """A compressed image is corrupt or incomplete."""


def decode_intact_jpeg(data: bytes, tables: bytes | None = None, *, rgb: bool = False) -> UInt8Array:
    """Decode a JPEG of three components to RGB and check it on the way, see :func:`require_intact_jpeg`.

    Args:
        data: the image, which may lack its tables.
        tables: the tables' own stream.
        rgb: the components are RGB although nothing in the stream says so, as in Aperio's slides.

    Returns:
        uint8 [H, W, 3], the pixels that ``imagecodecs.jpeg8_decode`` gives.

    Raises:
        DamagedCodestreamError: the image is corrupt, or ends before its last row.
    """
    stream = complete_jpeg(data, tables, rgb=rgb)
    try:
        *_, space, _ = simplejpeg.decode_jpeg_header(stream, strict=True)
        if space not in ("RGB", "YCbCr"):
            raise DamagedCodestreamError(f"it is {space}, not a colour image of three components")
        pixels: UInt8Array = simplejpeg.decode_jpeg(stream, colorspace="RGB", strict=True)
    except DamagedCodestreamError:
        raise
    except ValueError as error:
        raise DamagedCodestreamError(" ".join(str(error).split())) from error
    return pixels


def require_intact_jpeg(data: bytes, tables: bytes | None = None) -> None:
    """Decode a JPEG strictly: libjpeg's warnings (corrupt, missing or superfluous data) count as errors.

    Args:
        data: the image, which may lack its tables (an abbreviated stream, as in TIFF).
        tables: the tables' own stream, from SOI to EOI.

    Raises:
        DamagedCodestreamError: the image is corrupt, or ends before its last row.
    """
    stream = complete_jpeg(data, tables)
    try:
        *_, space, _ = simplejpeg.decode_jpeg_header(stream, strict=True)
        # In greyscale only one component is transformed, but the entropy coding of all of them is read.
        simplejpeg.decode_jpeg(stream, colorspace="CMYK" if space in ("CMYK", "YCCK") else "GRAY", strict=True)
    except ValueError as error:
        raise DamagedCodestreamError(" ".join(str(error).split())) from error


def require_intact_jpeg2000(data: bytes) -> None:
    """Follow the tile-parts of a raw JPEG 2000 codestream to its end marker (ISO 15444-1, Annex A).

    Raises:
        DamagedCodestreamError: a tile-part is missing or cut off, or holds a marker where none can be. Other changes
            inside a packet cannot be detected; they spoil one block of coefficients.
    """
    if not data.startswith(_J2K_SIGNATURE):
        if data[4:8] == b"jP  ":  # a JP2 file: its codestream is inside
            start = data.find(_J2K_SIGNATURE)
            if start < 0:
                raise DamagedCodestreamError("it holds no codestream")
            data = data[start:]
        else:
            raise DamagedCodestreamError("it does not start as a JPEG 2000 codestream")
    position = 2
    while position + 4 <= len(data):
        marker = int.from_bytes(data[position : position + 2], "big")
        if marker == 0xFFD9:
            return
        if marker == _SOT:
            length = int.from_bytes(data[position + 6 : position + 10], "big")
            end = position + length if length else data.rfind(_EOC)  # 0: the last tile-part, up to the end marker
            packets = data.find(_SOD, position, end) + len(_SOD)
            if packets < len(_SOD) or _NOT_IN_PACKETS.search(data, packets, end):
                raise DamagedCodestreamError("a tile-part is damaged")
            if length == 0:
                break
            position += length
        elif marker > 0xFF00:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        else:
            raise DamagedCodestreamError("a tile-part is damaged")
    if data.rstrip(b"\x00")[-2:] != _EOC or data[position : position + 2] not in (_EOC, b"\xff\x90"):
        raise DamagedCodestreamError("its end marker is missing")


def complete_jpeg(data: bytes, tables: bytes | None = None, *, rgb: bool = False) -> bytes:
    """A JPEG that any decoder reads: with its tables, and marked as RGB if it is. Arguments as for
    :func:`decode_intact_jpeg`."""
    stream = data if not tables or len(tables) < 4 else tables[:-2] + data[2:]
    if not rgb:
        return stream
    at = stream.find(_IS_RGB[:9])
    before, after = (stream[:2], stream[2:]) if at < 0 else (stream[:at], stream[at + len(_IS_RGB) :])
    return before + _IS_RGB + after
