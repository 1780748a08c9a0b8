"""One row of a folder of paired tiles, and what holds for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.image_files import read_image
from staindiffuser.training.errors import DataError
from staindiffuser.training.tiles.mask_codes import MaskCode, as_coarse

__all__ = ["MASK", "MODEL_MPP", "MPP_TOLERANCE", "SPLITS", "TILES_CSV", "PairedTile", "Split"]

TILES_CSV = "tiles.csv"
MASK = "_mask"
"""Ends the name of a mask's column."""
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
MODEL_MPP = 0.5
"""Pixel size that models are made for, µm."""
MPP_TOLERANCE = 0.02
"""Pixel sizes that differ by a larger share are different."""


@dataclass(frozen=True, kw_only=True)
class PairedTile:
    """One row of ``tiles.csv``."""

    row: int
    """Line in ``tiles.csv``, the header being line 1."""
    he: Path
    """The H&E image, RGB."""
    stains: Mapping[str, Path | None]
    """Per stain its IHC image, RGB, of the same size; None where only a mask says what is positive, or nothing does."""
    masks: Mapping[str, Path | None]
    """Per stain its coarse mask (one channel, same size), or None: derived from the image where there is one."""
    mask_codes: Mapping[str, MaskCode] = field(default_factory=dict)
    """Per stain what the values of its masks mean, decided over the whole folder; ``grey`` where missing."""
    slide: str
    """Name of the slide the tile comes from."""
    split: Split
    mpp: float
    """Pixel size, µm."""
    size: tuple[int, int]
    """Width and height, pixels."""
    file: Path
    """The ``tiles.csv`` that the row stands in."""
    patient: str | None = None
    """Whose tissue it is; None where the table does not say."""

    def image(self, stain: str) -> Path:
        """The image of a stain.

        Raises:
            DataError: the tile has none.
        """
        path = self.stains[stain]
        if path is None:
            raise DataError(f"{self.file}, row {self.row}: {stain} is empty, and its image is needed here")
        return path

    def has_images(self, stains: Iterable[str]) -> bool:
        """Whether the tile has an image of each of ``stains``: without, it can be learned from but not scored."""
        return all(self.stains[stain] is not None for stain in stains)

    @property
    def patient_or_slide(self) -> str:
        """What must never be in two splits: the patient, or where none is named, the slide."""
        return self.slide if self.patient is None else f"patient {self.patient}"

    def read_mask(self, stain: str) -> UInt8Array | None:
        """A stain's mask with 0 for negative and 255 for positive, uint8 [H, W]; None where the tile has none.

        Raises:
            ImageError: it cannot be read.
            DataError: its values do not fit the code of the folder's masks.
        """
        path = self.masks[stain]
        if path is None:
            return None
        mask, code = read_image(path, mode="L"), self.mask_codes.get(stain, "grey")
        if code == "ones" and mask.max() > 1:
            raise DataError(
                f"{path} holds the value {mask.max()}, but the folder's other masks hold 0 and 1: convert all of them "
                "to 0 (negative) and 255 (positive)"
            )
        return as_coarse(mask, code)
