"""The tiles of a run, checked once: what it trains on, what it validates on, and their digest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from staindiffuser.training.config import ModelConfig, StainConfig, TrainConfig
from staindiffuser.training.data.dataset import CropDataset
from staindiffuser.training.data.targets import measure_stains
from staindiffuser.training.errors import DataError
from staindiffuser.training.evaluation.evaluate import check_data
from staindiffuser.training.tiles.digest import DataDigest, data_digest
from staindiffuser.training.tiles.folds import Fold
from staindiffuser.training.tiles.mixed_tiles import MixedTiles, open_tiles
from staindiffuser.training.tiles.paired_tiles import PairedTile, PairedTiles, spread
from staindiffuser.training.tiles.seen import SeenTiles

__all__ = ["TrainingData"]


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Checked tiles, ready to train on."""

    tiles: PairedTiles | MixedTiles
    dataset: CropDataset
    validation: tuple[PairedTile, ...]
    """The validation tiles, evenly spread over the split; of one size."""
    digest: DataDigest
    fold: Fold | None = None
    """The part of a cross-validation."""

    @classmethod
    def open(
        cls,
        data: Path | Sequence[str],
        config: TrainConfig,
        *,
        stains: tuple[str, ...] = (),
        decode: bool,
        fold: Fold | None = None,
    ) -> TrainingData:
        """Load and check paired tiles.

        Args:
            data: a folder, or several, each with its weight (see :func:`open_tiles`).
            stains: the stain columns that are needed; all of them if none are named (see :func:`open_tiles`).
            decode: decode every pixel, which finds truncated images; otherwise only the headers are read.
            fold: deal the patients of train and val anew; see :func:`deal_fold`.

        Raises:
            DataError: naming the file and the field.
        """
        tiles = open_tiles(
            [data] if isinstance(data, Path) else data,
            stains=stains,
            check="pixels" if decode else "headers",
            fold=fold,
        )
        dataset = CropDataset(
            tiles,
            crop=config.crop,
            seed=config.seed,
            augmentation=config.augmentation,
            rare_share=config.rare_share,
            exclusive=config.exclusive,
            mosaic=config.mosaic,
            jigsaw=config.jigsaw,
            images="images" in config.tasks,
            confounders=config.confounders,
            white_glass=config.white_glass,
        )
        validation = spread(tiles.scored("val"), config.validation_tiles)
        if not validation:
            path = tiles.folder / "tiles.csv"
            raise DataError(f"{path}: no rows with split 'val'; a run needs some to validate on")
        check_one_size(validation, "validate on")
        return cls(tiles=tiles, dataset=dataset, validation=validation, digest=data_digest(tiles), fold=fold)

    def check_fits(self, model: ModelConfig) -> None:
        """Refuse tiles that the model cannot use.

        Raises:
            DataError: a stain is missing, or the pixel size differs.
        """
        for part in self.tiles.parts:
            check_data(part, model)

    def measure_stains(self) -> tuple[StainConfig, ...]:
        """Each stain's standardisation constants; see :func:`measure_stains`."""
        return measure_stains(self.tiles)

    def seen(self, earlier: SeenTiles | None = None) -> SeenTiles:
        """The training tiles, with those that the weights had seen before."""
        return SeenTiles.of(self.tiles.split("train")) | earlier

    def provenance(self, changes: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        """What a checkpoint says of its data.

        Args:
            changes: where the run went on with other data.
        """
        tiles = self.tiles
        codes = {stain: code for part in tiles.parts for stain, code in part.tiles[0].mask_codes.items()}
        unusual = {stain: code for stain, code in codes.items() if code != "grey"}
        return {
            "folder": ", ".join(part.folder.name for part in tiles.parts),
            **({"shares": list(tiles.shares)} if len(tiles.parts) > 1 else {}),
            **({"fold": str(self.fold)} if self.fold else {}),
            **({"masks read as": unusual} if unusual else {}),
            "training tiles": len(tiles.split("train")),
            "validation tiles": len(tiles.split("val")),
            "SHA-256": self.digest["all"],
            **({"changed during training": list(changes)} if changes else {}),
        }


def check_one_size(rows: Sequence[PairedTile], purpose: str) -> None:
    """Refuse tiles of different sizes, or of one that the network cannot take.

    Args:
        purpose: for the message: "tiles to ``purpose`` must be of one size".

    Raises:
        DataError: naming the row.
    """
    for row in rows:
        width, height = row.size
        if row.size != rows[0].size or width % 16 or height % 16:
            raise DataError(
                f"{row.file}, row {row.row}: the tile is {width} × {height}; tiles to {purpose} must be of one size, "
                "a multiple of 16"
            )
