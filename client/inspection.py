"""``staindiffuser info`` and ``check``: what a slide is, and whether it can be stained."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from staindiffuser.client.names import slide_identity
from staindiffuser.client.run_record import slide_sha256
from staindiffuser.imaging.slides import open_slide

__all__ = ["check_slide", "slide_info"]

BLOCK = 2048
"""Side of the regions that are read at once, pixels."""


def slide_info(path: Path) -> dict[str, Any]:
    """Format, size, levels, pixel size and files of a slide, and notes on what is odd about it.

    Raises:
        SlideError: the slide cannot be opened.
    """
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    with open_slide(path) as slide:
        return {
            "slide": str(path),
            "id": slide_identity(slide_sha256(slide.files)),
            "format": slide.format,
            "size": f"{slide.size[0]} × {slide.size[1]}",
            "mpp": None if slide.mpp is None else " × ".join(f"{mpp:.4g}" for mpp in slide.mpp),
            "levels": [f"{width} × {height}" for width, height in slide.level_sizes],
            "files": [str(file) for file in slide.files],
            "bytes": sum(file.stat().st_size for file in slide.files),
            "icc": None if slide.icc_profile is None else f"profile of {len(slide.icc_profile)} bytes",
            "notes": list(slide.notes),
        }


def check_slide(path: Path, mpp: float | None = None) -> str:
    """Decode every tile of every level; returns a line that describes the slide.

    Args:
        path: the slide.
        mpp: its pixel size, µm per pixel, if it does not state its own.

    Raises:
        SlideError: the slide cannot be opened, or part of it is damaged.
        MissingPixelSizeError: its pixel size is unknown.
    """
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    with open_slide(path) as slide:
        mpp_x, _ = slide.pixel_size(mpp, force="--force-mpp")
        for level, (width, height) in enumerate(slide.level_sizes):
            for y in range(0, height, BLOCK):
                for x in range(0, width, BLOCK):
                    slide.read(level, x, y, min(BLOCK, width - x), min(BLOCK, height - y))
        notes = "".join(f"; {note}" for note in slide.notes)
        return f"{path}: ok, {slide.format}, {slide.size[0]} × {slide.size[1]} pixels of {mpp_x:.3f} µm{notes}"
