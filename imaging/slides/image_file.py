"""PNG and JPEG tiles, read whole by Pillow."""

from __future__ import annotations

import warnings
from pathlib import Path

from PIL import Image

from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.errors import ImageError, SlideError
from staindiffuser.imaging.image_files import require_8_bits, rgb_of
from staindiffuser.imaging.pixel_size import from_dpi
from staindiffuser.imaging.slides.slide import Slide

__all__ = ["ImageSlide"]


class ImageSlide(Slide):
    """An image held in memory."""

    def __init__(self, path: Path) -> None:
        """Decode the file.

        Raises:
            SlideError: it is damaged, not colour, or so large that it must be a tiled format.
        """
        self.path = path
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(path) as image:
                    self.format = f"{(image.format or 'image').lower()} (pillow)"
                    self.mpp = from_dpi(image.info.get("dpi"))
                    self._pixels_HW3 = _rgb(image, path)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise SlideError(f"{path} is too large for a PNG or JPEG ({error}): make it a tiled TIFF") from error
        except ImageError as error:
            raise SlideError(str(error)) from error
        except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all of these for damaged files
            raise SlideError(f"{path} is damaged or incomplete: {error}") from error
        height, width = self._pixels_HW3.shape[:2]
        self.level_sizes = ((width, height),)
        self.exact_levels = (0,)
        self.chunk = (512, 512)

    def read(self, level: int, x: int, y: int, width: int, height: int) -> UInt8Array:
        """See :meth:`Slide.read`."""
        return self._pixels_HW3[y : y + height, x : x + width]

    def close(self) -> None:
        """Nothing is open."""


def _rgb(image: Image.Image, path: Path) -> UInt8Array:
    require_8_bits(image, path)
    if image.mode not in ("RGB", "RGBA", "P"):
        raise SlideError(f"{path} is an image of mode {image.mode}: H&E must be 8-bit RGB")
    return rgb_of(image)
