"""The grid of tiles over a slide at the model's pixel size.

The central part of a tile, ``stride`` wide, shows in the result; ``margin`` at each side is context. Neighbouring tiles
are blended in a ramp along their border, which extends ``ramp / 2`` into both margins. Origins are multiples of 16:
the network is equivariant to such shifts, so a pixel's result does not depend on the tile it lies in.
"""

from __future__ import annotations

from dataclasses import dataclass

from staindiffuser.client.contract import ModelContract

__all__ = ["GridTile", "TileGrid"]

RAMP = 16
"""Width of the ramp between two tiles, pixels (ours)."""


@dataclass(frozen=True)
class GridTile:
    """A tile of a grid."""

    row: int
    column: int
    x: int
    """x of its top-left pixel, margin included; may be negative."""
    y: int
    """y of its top-left pixel, margin included; may be negative."""


@dataclass(frozen=True, kw_only=True)
class TileGrid:
    """Tiles that cover a slide of ``width`` × ``height`` pixels."""

    width: int
    height: int
    tile: int
    """Side of a tile, pixels."""
    stride: int
    """Distance between neighbouring tiles, pixels; a multiple of ``multiple``."""
    multiple: int
    """Origins are multiples of this, pixels."""

    def __post_init__(self) -> None:
        if self.width < 1 or self.height < 1:
            raise ValueError(f"a slide of {self.width} × {self.height} pixels cannot be tiled")
        if self.stride % self.multiple or not 0 < self.stride <= self.tile:
            raise ValueError(f"stride: {self.stride} must be a multiple of {self.multiple}, at most {self.tile}")

    @classmethod
    def for_model(cls, contract: ModelContract, width: int, height: int) -> TileGrid:
        """The grid whose margin is at least the model's."""
        multiple = contract.origin_multiple
        stride = (contract.tile - 2 * contract.margin) // multiple * multiple
        return cls(width=width, height=height, tile=contract.tile, stride=stride, multiple=multiple)

    @property
    def margin(self) -> int:
        """Context at each side, pixels."""
        return (self.tile - self.stride) // 2

    @property
    def ramp(self) -> int:
        """Width of the ramp, pixels; even, and 0 without a margin."""
        return min(RAMP, 2 * self.margin, self.stride) // 2 * 2

    @property
    def start(self) -> int:
        """Origin of the first tile, on both axes: the largest multiple whose central part covers the slide's edge."""
        return (-self.margin // self.multiple) * self.multiple

    @property
    def columns(self) -> int:
        """Number of tiles across."""
        return self._count(self.width)

    @property
    def rows(self) -> int:
        """Number of tiles down."""
        return self._count(self.height)

    def at(self, row: int, column: int) -> GridTile:
        """The tile at this row and column."""
        return GridTile(row, column, self.start + column * self.stride, self.start + row * self.stride)

    def shown(self, origin: int, size: int) -> tuple[int, int]:
        """The part of a tile at ``origin`` that shows in the result, [first, last) on an axis of ``size`` pixels."""
        first = origin + self.margin - self.ramp // 2
        last = origin + self.tile - self.margin + self.ramp // 2
        return max(0, first), min(size, last)

    def rows_that_show(self, y0: int, y1: int) -> range:
        """Rows of tiles that show in the pixel rows [y0, y1)."""
        return self._that_show(y0, y1, self.rows)

    def columns_that_show(self, x0: int, x1: int) -> range:
        """Columns of tiles that show in the pixel columns [x0, x1)."""
        return self._that_show(x0, x1, self.columns)

    def row_segments(self, y0: int, y1: int) -> list[tuple[int, int, tuple[int, ...]]]:
        """The pixel rows [y0, y1), split where the tile rows that cover them change: (first, last, tile rows)."""
        return self._segments(y0, y1, self.rows)

    def column_segments(self, x0: int, x1: int) -> list[tuple[int, int, tuple[int, ...]]]:
        """The pixel columns [x0, x1), split likewise: (first, last, tile columns)."""
        return self._segments(x0, x1, self.columns)

    def _segments(self, first: int, last: int, count: int) -> list[tuple[int, int, tuple[int, ...]]]:
        begin = self.start + self.margin - self.ramp // 2
        segments: list[tuple[int, int, tuple[int, ...]]] = []
        for index in self._that_show(first, last, count):
            alone = begin + index * self.stride + self.ramp  # until here blended with the previous tile
            end = alone + self.stride - self.ramp
            if index == count - 1:
                end = max(end, last)
            before: tuple[int, ...] = (index - 1, index) if index > 0 else (index,)
            for low, high, covering in ((alone - self.ramp, alone, before), (alone, end, (index,))):
                if max(low, first) < min(high, last):
                    segments.append((max(low, first), min(high, last), covering))
        return segments

    def _that_show(self, first: int, last: int, count: int) -> range:
        begin = self.start + self.margin - self.ramp // 2  # the first pixel of tile 0 that shows
        reach = self.stride + self.ramp
        low = (first - begin - reach) // self.stride + 1
        high = (last - 1 - begin) // self.stride + 1
        return range(max(0, low), min(count, high))

    def _count(self, size: int) -> int:
        return max(1, -(-(size - self.start - self.margin) // self.stride))
