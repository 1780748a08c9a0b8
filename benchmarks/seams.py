"""How much the grid of tiles shows, by the width of the margin.

A region is stained as one tile with all the context that the network can use, and in tiles of each margin, read,
blended and composed as the slide client does. torch in float32 computes both: the engines agree with it to one level.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from staindiffuser.client.blending import Mosaic, OutputImage
from staindiffuser.client.model_view import ModelView
from staindiffuser.client.tiling import GridTile, TileGrid
from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.slides import open_slide

if TYPE_CHECKING:
    from staindiffuser.training.checkpoint import Checkpoint

__all__ = ["SeamReport", "SeamRow", "bench_seams"]

MULTIPLE = 16
"""Of the origins of tiles, pixels."""


@dataclass(frozen=True, kw_only=True)
class SeamRow:
    """The difference that one margin leaves, over all outputs of their kind, grey levels."""

    margin: int
    """Pixels."""
    work: float
    """Pixels computed per pixel of the result, (tile / stride)²."""
    image_mean: float
    image_p999: float
    """99.9th percentile."""
    cells_mean: float
    cells_p999: float


@dataclass(frozen=True, kw_only=True)
class SeamReport:
    """A row per margin."""

    slide: str
    region: tuple[int, int, int]
    """x, y and side, pixels at the model's pixel size."""
    tile: int
    default_margin: int
    rows: tuple[SeamRow, ...]

    def lines(self) -> list[str]:
        """The report as a Markdown table."""
        lines = [
            "| margin | pixels computed per pixel | images: mean, p99.9 | cell maps: mean, p99.9 |",
            "|" + "---|" * 4,
        ]
        for row in self.rows:
            default = " (default)" if row.margin == self.default_margin else ""
            lines.append(
                f"| {row.margin}{default} | {row.work:.2f} | {row.image_mean:.2f}, {row.image_p999:.0f} "
                f"| {row.cells_mean:.2f}, {row.cells_p999:.0f} |"
            )
        return lines


class _Region:
    """A square of a slide, and the network that stains it."""

    def __init__(self, checkpoint: Checkpoint, view: ModelView, x: int, y: int, side: int) -> None:
        self.x, self.y, self.side = x, y, side
        self._checkpoint, self._view = checkpoint, view
        stains = checkpoint.config.model.stains
        self.images = tuple(
            OutputImage(tensor=f"{kind}_{stain.name.upper()}", channels=channels, glass=255)
            for stain in stains
            for kind, channels in (("STAIN", 3), ("CELLS", 1))
        )

    def whole(self) -> dict[str, UInt8Array]:
        """Every output, stained as one tile."""
        reach = math.ceil(self._checkpoint.config.receptive_radius / MULTIPLE) * MULTIPLE
        outputs = self._stain(self.x - reach, self.y - reach, self.side + 2 * reach)
        inside = slice(reach, reach + self.side)
        return {name: pixels[inside, inside] for name, pixels in outputs.items()}

    def tiled(self, grid: TileGrid) -> dict[str, UInt8Array]:
        """Every output, stained in the tiles of a grid."""
        mosaic = Mosaic(grid, self.images)
        for tile in self._tiles(grid):
            mosaic.add(tile, self._stain(tile.x, tile.y, grid.tile))
        composed = {image.tensor: mosaic.compose(image, self.x, self.y, self.side, self.side) for image in self.images}
        return {name: pixels for name, pixels in composed.items() if pixels is not None}

    def _tiles(self, grid: TileGrid) -> list[GridTile]:
        rows = grid.rows_that_show(self.y, self.y + self.side)
        columns = grid.columns_that_show(self.x, self.x + self.side)
        return [grid.at(row, column) for row in rows for column in columns]

    def _stain(self, x: int, y: int, side: int) -> dict[str, UInt8Array]:
        from staindiffuser.training.infer import stain_tiles

        config = self._checkpoint.config
        outputs = stain_tiles(
            self._checkpoint.network,
            self._view.read_tile(x, y, side)[None],
            sigmas=config.sigmas[str(config.steps)],
            seeds=np.zeros((1, 1), np.int64),
            origins=np.array([[x, y]], np.int64),
        )
        return {name: pixels[0] for name, pixels in outputs.items()}


def bench_seams(
    checkpoint: Path,
    slide: Path,
    margins: Sequence[int],
    *,
    tile: int | None = None,
    corner: tuple[int, int] = (0, 0),
    side: int = 768,
    progress: Callable[[str], None] = lambda line: None,
) -> SeamReport:
    """Stain a region of a slide as one tile and in tiles.

    Args:
        checkpoint: the model.
        slide: an H&E that states its pixel size.
        margins: multiples of 8 pixels.
        tile: side of the tiles, pixels; by default the checkpoint's.
        corner: x, y of the region, pixels at the model's pixel size; rounded down to multiples of 16.
        side: of the region, pixels; rounded down likewise.
        progress: told before each margin.
    """
    from staindiffuser.training.checkpoint import Checkpoint

    model = Checkpoint.load(checkpoint)
    tile = tile or model.config.tile
    x, y, side = (value // MULTIPLE * MULTIPLE for value in (*corner, side))
    with open_slide(slide) as opened:
        view = ModelView(opened, opened.pixel_size(), model.config.model.mpp)
        region = _Region(model, view, x, y, side)
        progress("as one tile")
        whole = region.whole()
        rows = []
        for margin in margins:
            progress(f"margin {margin}")
            stride = tile - 2 * margin
            grid = TileGrid(width=view.size[0], height=view.size[1], tile=tile, stride=stride, multiple=MULTIPLE)
            rows.append(_row(margin, (tile / stride) ** 2, whole, region.tiled(grid)))
            progress(str(rows[-1]))
    return SeamReport(
        slide=slide.name, region=(x, y, side), tile=tile, default_margin=model.config.margin, rows=tuple(rows)
    )


def _row(margin: int, work: float, whole: dict[str, UInt8Array], tiled: dict[str, UInt8Array]) -> SeamRow:
    def differences(kind: str) -> NDArray[np.float64]:
        return np.concatenate(
            [
                np.abs(tiled[name].astype(np.float64) - pixels).ravel()
                for name, pixels in whole.items()
                if name.startswith(kind)
            ]
        )

    image, cells = differences("STAIN"), differences("CELLS")
    return SeamRow(
        margin=margin,
        work=work,
        image_mean=float(image.mean()),
        image_p999=float(np.quantile(image, 0.999)),
        cells_mean=float(cells.mean()),
        cells_p999=float(np.quantile(cells, 0.999)),
    )
