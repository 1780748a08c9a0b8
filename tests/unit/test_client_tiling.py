"""The grid: everything is covered, origins lie on the lattice, ramps meet."""

import dataclasses
import itertools

import numpy as np
import pytest

from staindiffuser.client.blending import ramp_weights
from staindiffuser.client.testing import FAKE_CONTRACT
from staindiffuser.client.tiling import TileGrid

SIZES = [1, 7, 16, 191, 192, 193, 224, 256, 512, 1000, 2220]
MARGINS = [0, 8, 20, 24, 32, 40, 64]


def grid_of(margin: int, width: int, height: int = 100, tile: int = 256) -> TileGrid:
    contract = dataclasses.replace(FAKE_CONTRACT, margin=margin, tile=tile)
    return TileGrid.for_model(contract, width, height)


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("size", SIZES)
def test_every_pixel_is_covered_with_context_and_weight(margin: int, size: int) -> None:
    grid = grid_of(margin, size)
    weight = np.zeros(size, dtype=int)
    for column in range(grid.columns):
        tile = grid.at(0, column)
        assert tile.x % 16 == 0
        first, last = grid.shown(tile.x, size)
        weight[first:last] += ramp_weights(grid)[first - tile.x : last - tile.x]
    assert (weight > 0).all()
    plateau = max(1, 2 * grid.ramp)
    inner = slice(grid.ramp, size - grid.ramp)
    assert (weight[inner] == plateau).all(), "neighbours' weights add up to the plateau"
    assert grid.margin >= margin


@pytest.mark.parametrize("margin", MARGINS)
def test_no_tile_is_superfluous(margin: int) -> None:
    for size in SIZES:
        grid = grid_of(margin, size)
        last = grid.at(0, grid.columns - 1)
        assert last.x + grid.margin < size
        assert grid.at(0, 0).x + grid.margin <= 0


@pytest.mark.parametrize("size", [256, 1000, 2220])
def test_segments_tell_which_tiles_cover(size: int) -> None:
    grid = grid_of(32, size)
    covering: dict[int, set[int]] = {x: set() for x in range(size)}
    for column in range(grid.columns):
        first, last = grid.shown(grid.at(0, column).x, size)
        for x in range(first, last):
            covering[x].add(column)
    for low in (0, 13, 200, size - 50):
        high = min(size, low + 311)
        segments = grid.column_segments(low, high)
        assert segments[0][0] == low
        assert segments[-1][1] == high
        for (_, end, _), (begin, _, _) in itertools.pairwise(segments):
            assert end == begin
        for begin, end, columns in segments:
            assert all(covering[x] == set(columns) for x in range(begin, end))
        assert set(grid.columns_that_show(low, high)) == set().union(*(covering[x] for x in range(low, high)))


def test_a_slide_without_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be tiled"):
        grid_of(32, 0)
    with pytest.raises(ValueError, match="stride"):
        TileGrid(width=10, height=10, tile=256, stride=100, multiple=16)
