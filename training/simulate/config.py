"""What a simulation can be asked to be."""

from __future__ import annotations

from dataclasses import dataclass

from staindiffuser.training.errors import ConfigError

__all__ = ["CHUNK", "MPP", "STAINS", "SimulatorConfig"]

MPP = 0.5
"""Pixel size of everything simulated, µm."""
CHUNK = 256
"""Edge of the squares that a slide is rendered in, pixels."""
STAINS = ("cd3", "ck818")
"""What can be simulated: CD3 on the membrane of T cells, CK8/18 in the cytoplasm of epithelium."""


@dataclass(frozen=True, kw_only=True)
class SimulatorConfig:
    """Settings of a simulation; with a seed they decide every pixel."""

    tiles_per_slide: int = 8
    """Tiles taken from one simulated slide before the next slide begins."""
    undecidable_share: float = 0.15
    """Share of lymphocytes whose kind nothing in the H&E tells: T or B by the toss of a coin."""
    misaligned_share: float = 0.15
    """Share of slides whose IHC is shifted and warped by up to 3 px against the H&E."""
    pen_share: float = 0.04
    """Share of slides with pen marks."""
    damage: bool = True
    """Whether there are folds, uneven and weak staining, scanner noise and JPEG artefacts."""

    def __post_init__(self) -> None:
        if self.tiles_per_slide < 1:
            raise ConfigError(f"tiles_per_slide is {self.tiles_per_slide}; it must be at least 1")
        for name in ("undecidable_share", "misaligned_share", "pen_share"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"{name} is {value}; it must lie between 0 and 1")
