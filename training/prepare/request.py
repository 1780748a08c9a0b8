"""What ``prepare pairs`` is asked for."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from staindiffuser.imaging.pixel_size import check_given
from staindiffuser.training.errors import ConfigError, DataError
from staindiffuser.training.prepare.registration.register import WORKING_SIDE
from staindiffuser.training.tiles.paired_tiles import Split
from staindiffuser.training.tiles.stain_names import is_stain_name
from staindiffuser.training.tiles.tile import MODEL_MPP

__all__ = ["PairRequest", "split_of"]


def split_of(slide: str, *, val_share: float, test_share: float) -> Split:
    """A slide's split, from the hash of its name: the same on every machine, whatever other slides there are."""
    draw = int.from_bytes(hashlib.sha256(slide.encode()).digest()[:6], "big") / 2**48
    return "val" if draw < val_share else "test" if draw < val_share + test_share else "train"


@dataclass(frozen=True, kw_only=True)
class PairRequest:
    """What ``prepare pairs`` is asked for."""

    he: Path
    ihc: Mapping[str, Path]
    """Stain to slide."""
    output: Path
    slide: str | None = None
    """Name of the slide in the tiles; the H&E's file name by default."""
    patient: str | None = None
    """Whose tissue it is; then patients are dealt to splits instead of slides."""
    tile: int = 256
    """Edge of a tile, pixels."""
    mpp: float = MODEL_MPP
    """Pixel size of the tiles, µm."""
    he_mpp: float | None = None
    """Pixel size of the H&E's level 0, µm, where its file does not say."""
    ihc_mpp: float | None = None
    """The same for the IHC slides."""
    landmarks: Mapping[str, tuple[Path, Path]] = dataclasses.field(default_factory=dict)
    """Stain to the landmarks on the H&E and on its IHC."""
    split: Split | None = None
    """Of the slide; by default dealt by its name."""
    val_share: float = 0.1
    test_share: float = 0.1
    least_tissue: float = 0.25
    """Share of a tile that must be tissue."""
    jobs: int = 1
    dry_run: bool = False
    """Register and report, cut no tiles."""
    working_side: int = WORKING_SIDE
    """Long side of the images that are registered, pixels."""

    def __post_init__(self) -> None:
        if not self.ihc:
            raise ConfigError("ihc: give at least one IHC slide, as --ihc cd3=SLIDE")
        for stain in (*self.ihc, *self.landmarks):
            if not is_stain_name(stain):
                raise ConfigError(
                    f"{stain!r} cannot name a stain: it must be lower case, such as cd3 ([a-z][a-z0-9_]*), and not "
                    "one of a tile's own columns"
                )
        for stain in self.landmarks:
            if stain not in self.ihc:
                raise ConfigError(f"landmarks for {stain!r}, but --ihc names {', '.join(self.ihc)}")
        if self.tile < 16 or self.tile % 16:
            raise ConfigError(f"tile is {self.tile}; it must be a positive multiple of 16 pixels")
        for name in ("mpp", "he_mpp", "ihc_mpp"):
            check_given(getattr(self, name), name)
        if min(self.val_share, self.test_share) < 0 or self.val_share + self.test_share > 0.6:
            raise ConfigError(
                f"val-share {self.val_share} and test-share {self.test_share} must be at least 0 and sum to at most 0.6"
            )
        if not 0 < self.least_tissue <= 1:
            raise ConfigError(f"min-tissue is {self.least_tissue}; it must be a share above 0 and at most 1")
        if self.slide is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", self.slide):
            raise ConfigError(f"slide is {self.slide!r}; it must be letters, digits and . _ + -")

    @property
    def name(self) -> str:
        """Of the slide."""
        return self.slide or re.sub(r"[^A-Za-z0-9+-]+", "_", self.he.name.split(".")[0]).strip("_-") or "slide"

    @property
    def chosen_split(self) -> Split:
        """The split asked for, or dealt."""
        return self.split or split_of(self.patient or self.name, val_share=self.val_share, test_share=self.test_share)

    def settings(self) -> dict[str, Any]:
        """What must be equal for a run to continue another."""
        files = {"he": self.he, **self.ihc}
        try:
            sizes = {name: [path.name, path.stat().st_size, _fingerprint(path)] for name, path in files.items()}
        except OSError as error:
            raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error
        return {
            "files": sizes,
            "he_mpp": self.he_mpp,
            "ihc_mpp": self.ihc_mpp,
            "patient": self.patient,
            "split": self.chosen_split,
            "least_tissue": self.least_tissue,
            "working_side": self.working_side,
        }


def _fingerprint(path: Path) -> str:
    """Distinguishes slides of the same name and size: SHA-256 of eight samples of 64 KiB, spread over the file."""
    digest, sample = hashlib.sha256(), 65536
    last = max(0, path.stat().st_size - sample)
    with path.open("rb") as file:
        for part in range(8):
            file.seek(part * last // 7)
            digest.update(file.read(sample))
    return digest.hexdigest()[:16]
