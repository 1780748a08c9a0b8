"""What can be wrong with a slide or an image::

InputError
├── SlideError             a slide is missing, damaged or of an unsupported kind
│   ├── IncompleteSlideError  its data continue after the end of its file
│   └── SlideReadError        the disk or network failed while it was read
├── PixelSizeError         a slide's pixel size contradicts the given one, or is too large for the model
├── MissingPixelSizeError  a slide does not state its pixel size
└── ImageError             a tile's image is missing, damaged or not 8-bit
"""

from __future__ import annotations

from staindiffuser.errors import InputError

__all__ = [
    "ImageError",
    "IncompleteSlideError",
    "MissingPixelSizeError",
    "PixelSizeError",
    "SlideError",
    "SlideReadError",
]


class SlideError(InputError):
    """A slide is missing, damaged or of an unsupported kind."""


class IncompleteSlideError(SlideError):
    """The slide's data go on after the end of its file: an interrupted copy or transfer."""


class SlideReadError(SlideError):
    """The disk or network failed while the slide was read; its data may be intact."""


class MissingPixelSizeError(InputError):
    """A slide does not state its pixel size."""


class PixelSizeError(InputError):
    """A slide's pixel size contradicts the given one, or is too large for the model."""


class ImageError(InputError):
    """The image of a tile is missing, damaged or not 8-bit."""
