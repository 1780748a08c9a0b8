"""Slide readers, one per kind of file; :func:`open_slide` chooses."""

from staindiffuser.imaging.slides.slide import DamagedRegion, Slide, open_slide

__all__ = ["DamagedRegion", "Slide", "open_slide"]
