"""What ``prepare mif`` is asked for."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from staindiffuser.training.errors import ConfigError
from staindiffuser.training.prepare.mif.markers import Floor
from staindiffuser.training.tiles.stain_names import KERATINS, is_stain_name
from staindiffuser.training.tiles.tile import MODEL_MPP

__all__ = ["MifRequest"]


@dataclass(frozen=True, kw_only=True)
class MifRequest:
    """Two folders of tiles, or two registered slides, and what their channels are."""

    he: Path
    mif: Path
    output: Path
    markers: Mapping[str, str]
    """Stain to the channel that shows its marker."""
    nuclei: str
    """The channel of the nuclei."""
    cytoplasmic: tuple[str, ...] | None = None
    """Stains whose marker is of the cytoplasm, so that what surrounds their nucleus decides; the keratins if
    not given."""
    channels: tuple[str, ...] = ()
    """Names of the channels in order, where the files do not name them."""
    he_mpp: float | None = None
    """Pixel size of the H&E, µm, where its file does not say."""
    mif_mpp: float | None = None
    mpp: float = MODEL_MPP
    """Pixel size of the tiles, µm."""
    tile: int = 256
    """Side of a tile, pixels; of slides only."""
    slide: str | None = None
    """Name of the slide; its file's by default."""
    region_pattern: re.Pattern[str] | None = None
    """Its first group, in a tile's name, is the region."""
    gains: Path | None = None
    """CSV of the stretch to be undone, per tile and channel."""
    splits: Path | None = None
    """CSV of each region's split; dealt by the hash of the region's name where it is not given."""
    val_share: float = 0.1
    test_share: float = 0.1
    floor: Floor = dataclasses.field(default_factory=Floor)
    least_correlation: float = 0.8
    """Of hematoxylin and the nuclei's channel, below which a tile is misaligned."""
    jobs: int = 1

    def __post_init__(self) -> None:
        if not self.markers:
            raise ConfigError("markers: name at least one, as --markers cd3=CD3")
        for stain in self.markers:
            if not is_stain_name(stain):
                raise ConfigError(
                    f"{stain!r} cannot name a stain: it must be lower case, such as cd3 ([a-z][a-z0-9_]*), and not "
                    "one of a tile's own columns"
                )
        if unknown := [stain for stain in self.cytoplasmic or () if stain not in self.markers]:
            raise ConfigError(f"cytoplasmic: {unknown[0]} is none of the stains ({', '.join(self.markers)})")
        for name in ("mpp", "he_mpp", "mif_mpp"):
            value = getattr(self, name)
            if value is not None and not 0.05 <= value <= 20:
                raise ConfigError(f"{name} is {value}; it must be µm per pixel, between 0.05 and 20")
        if self.tile < 16 or self.tile % 16:
            raise ConfigError(f"tile is {self.tile}; it must be a positive multiple of 16 pixels")
        if min(self.val_share, self.test_share) < 0 or self.val_share + self.test_share > 0.6:
            raise ConfigError(
                f"val-share {self.val_share} and test-share {self.test_share} must be at least 0 and sum to at most 0.6"
            )
        if not 0 <= self.least_correlation < 1:
            raise ConfigError(f"least-correlation is {self.least_correlation}; it must be at least 0 and below 1")
        if min(self.floor.removed, self.floor.kept) <= 0:
            raise ConfigError("floor: both levels must be above 0")
        if self.jobs < 1:
            raise ConfigError(f"jobs is {self.jobs}; it must be at least 1")

    def is_cytoplasmic(self, stain: str) -> bool:
        """Whether the stain's marker is of the cytoplasm."""
        return stain in (KERATINS if self.cytoplasmic is None else self.cytoplasmic)
