"""Images on disk: decoded fast and to 8 bits, written whole or not at all."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Literal

import imagecodecs
import numpy as np
from PIL import Image, UnidentifiedImageError

from staindiffuser.files import replacing
from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.errors import ImageError

__all__ = ["WHITE", "image_size", "on_white", "read_image", "require_8_bits", "rgb_of", "write_png"]

WHITE = 255
_UNREADABLE = (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError)


def read_image(path: Path, *, mode: Literal["RGB", "L"] = "RGB") -> UInt8Array:
    """Decode an image: uint8 [H, W, 3], or [H, W] with mode ``L``.

    Transparent pixels are white in an RGB image, as glass is, and 0 with mode ``L``. With mode ``L`` an image with a
    coloured palette gives its indices: labels are saved that way.

    Raises:
        ImageError: the file is missing, no image, truncated, or of more than 8 bits a channel.
    """
    try:
        if path.suffix == ".png":
            # A third faster than Pillow. What it refuses, or decodes to another form, is left to Pillow.
            with contextlib.suppress(imagecodecs.PngError):
                decoded: UInt8Array = imagecodecs.png_decode(path.read_bytes())
                if decoded.dtype == np.uint8 and decoded.shape[2:] == ((3,) if mode == "RGB" else ()):
                    return decoded
        with Image.open(path) as image:
            require_8_bits(image, path)
            # A copy: what asarray gives cannot be written to.
            return np.array(rgb_of(image) if mode == "RGB" else _grey_of(image))
    except FileNotFoundError:
        raise ImageError(f"{path} does not exist") from None
    except _UNREADABLE as error:
        raise ImageError(f"{path} cannot be read as an image: {error}") from error


def image_size(path: Path, *, decode: bool = False) -> tuple[int, int]:
    """Width and height of an image, pixels, from its header; with ``decode`` its pixels are tried as well.

    Raises:
        ImageError: the file is no image, one of more than 8 bits a channel, or (with ``decode``) truncated.
    """
    try:
        with Image.open(path) as image:
            require_8_bits(image, path)
            if decode:
                image.load()
            return image.size
    except _UNREADABLE as error:
        raise ImageError(f"{path} cannot be read as an image: {error}") from error


def rgb_of(image: Image.Image) -> UInt8Array:
    """The pixels of an image that Pillow opened, uint8 [H, W, 3]; transparent ones are white."""
    return on_white(np.asarray(image.convert("RGBA"))) if _is_transparent(image) else np.asarray(image.convert("RGB"))


def on_white(rgba_HW4: UInt8Array, *, premultiplied: bool = False) -> UInt8Array:
    """Composite an image with transparency onto white, like glass.

    Args:
        rgba_HW4: the image.
        premultiplied: the colours are already multiplied by alpha.
    """
    alpha_HW1 = rgba_HW4[..., 3:].astype(np.uint16)
    if alpha_HW1.min(initial=255) == 255:
        return np.ascontiguousarray(rgba_HW4[..., :3])
    if premultiplied:
        return np.minimum(rgba_HW4[..., :3] + (WHITE - alpha_HW1), WHITE).astype(np.uint8)
    blended = rgba_HW4[..., :3] * alpha_HW1 + WHITE * (255 - alpha_HW1)
    return ((blended + 127) // 255).astype(np.uint8)


def write_png(path: Path, image: UInt8Array) -> None:
    """Write uint8 [H, W, 3] or [H, W] as PNG, by :func:`staindiffuser.files.replacing`.

    Raises:
        UsageError: the file cannot be written.
    """
    # Run lengths of differences to the left neighbour: scanner noise has no longer matches to find. Slightly larger
    # than zlib's default strategy with a choice among all filters, in less than half the time.
    png, pixels = imagecodecs.PNG, np.ascontiguousarray(image)
    encoded = imagecodecs.png_encode(pixels, level=1, strategy=png.STRATEGY.RLE, filter=png.FILTER.SUB)
    with replacing(path) as temporary:
        temporary.write_bytes(encoded)


def require_8_bits(image: Image.Image, path: Path) -> None:
    """Refuse deeper images: Pillow would drop their low bits, and 12-bit data in 16 bits would come out black.

    Raises:
        ImageError: the image that Pillow opened has more than 8 bits a channel.
    """
    # Pillow opens 16-bit RGB as RGB; only the decoder's raw mode ("RGB;16B") still says what the file holds.
    if image.mode.startswith(("I", "F")) or ";16" in str(getattr(image, "tile", "")):
        raise ImageError(f"{path} has more than 8 bits a channel: convert it to 8, from its own black to its own white")


def _is_transparent(image: Image.Image) -> bool:
    return "A" in image.getbands() or "transparency" in image.info


def _grey_of(image: Image.Image) -> UInt8Array:
    if image.mode == "P" and np.ptp(np.asarray(image.convert("RGB")), axis=-1).any():
        return np.asarray(image)
    if _is_transparent(image):
        rgba = image.convert("RGBA")
        opaque = np.asarray(rgba)[..., 3] >= 128
        return np.where(opaque, np.asarray(rgba.convert("RGB").convert("L")), np.uint8(0))
    return np.asarray(image.convert("L"))
