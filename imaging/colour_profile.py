"""Colours by a slide's own ICC profile: from the scanner's to sRGB."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageCms

from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.errors import SlideError

__all__ = ["to_srgb"]

NO_CACHE = 0x0040
"""Little CMS's flag: without it, threads that share a transform would share its cache of the last pixel."""


def to_srgb(profile: bytes, name: str) -> Callable[[UInt8Array], UInt8Array]:
    """What converts pixels, uint8 [H, W, 3], from the profile's colours to sRGB (relative colorimetric); thread-safe.

    Args:
        profile: an ICC profile of an RGB device.
        name: of the slide, for the error.

    Raises:
        SlideError: the profile is damaged, or not of an RGB device.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        flags = ImageCms.Flags(NO_CACHE)
        intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
        target = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(source, target, "RGB", "RGB", renderingIntent=intent, flags=flags)
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        raise SlideError(f"{name} has an ICC profile that cannot be used ({error}): omit --icc srgb") from error

    def convert(pixels_HW3: UInt8Array) -> UInt8Array:
        image = Image.fromarray(pixels_HW3)
        ImageCms.applyTransform(image, transform, inPlace=True)
        return np.asarray(image)

    return convert
