"""Readers of slides and tiles, one per kind of file; ``open_slide`` chooses."""

from staindiffuser.imaging.slides.slide import Slide, open_slide

__all__ = ["Slide", "open_slide"]
