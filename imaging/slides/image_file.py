"""PNG and JPEG tiles, read into memory by Pillow."""

from __future__ import annotations

import warnings
from pathlib import Path

from PIL import Image, ImageOps

from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.errors import ImageError, SlideError
from staindiffuser.imaging.image_files import require_8_bits, rgb_of
from staindiffuser.imaging.pixel_size import from_dpi
from staindiffuser.imaging.slides.codestreams import DamagedCodestreamError, require_intact_jpeg
from staindiffuser.imaging.slides.slide import Slide

__all__ = ["ImageSlide"]

_MODES = {
    "1": "is black and white",
    "L": "is greyscale",
    "LA": "is greyscale",
    "CMYK": "is CMYK",
    "LAB": "is CIELab",
    "HSV": "is HSV",
    "P": "uses a colour palette",
    "PA": "uses a colour palette",
}


class ImageSlide(Slide):
    """A flat image, held in memory."""

    def __init__(self, path: Path) -> None:
        """Decode the file; an EXIF orientation is applied.

        Raises:
            SlideError: the image is damaged, not 8-bit RGB, or so large that it should be a tiled TIFF.
        """
        super().__init__(path)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(path) as image:
                    image.verify()  # a PNG's checksums, which decoding ignores
                with Image.open(path) as image:
                    if (frames := getattr(image, "n_frames", 1)) > 1 and image.format != "MPO":
                        raise SlideError(f"{path} holds {frames} images: save the H&E as a file of its own")
                    if image.format in ("JPEG", "MPO"):
                        require_intact_jpeg(path.read_bytes())
                    self.format = f"{(image.format or 'image').lower()} (pillow)"
                    dpi = image.info.get("dpi")
                    self.icc_profile = image.info.get("icc_profile") or None
                    require_8_bits(image, path)
                    upright = ImageOps.exif_transpose(image)
                    rotated = upright.size != image.size
                    self.mpp = from_dpi((dpi[1], dpi[0]) if dpi and rotated else dpi)
                    self._pixels_HW3 = _rgb(upright, path)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise SlideError(f"{path} is too large for a PNG or JPEG ({error}): make it a tiled TIFF") from error
        except ImageError as error:
            raise SlideError(str(error)) from error
        except DamagedCodestreamError as error:
            raise SlideError(f"{path} is damaged: {error}") from error
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
        """Do nothing: the file is already closed."""


def _rgb(image: Image.Image, path: Path) -> UInt8Array:
    if image.mode not in ("RGB", "RGBA"):
        raise SlideError(f"{path} {_MODES.get(image.mode, f'is {image.mode}')}: H&E must be 8-bit RGB")
    return rgb_of(image)
