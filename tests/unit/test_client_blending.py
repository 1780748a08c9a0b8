"""Composing tiles: exact where they agree, smooth where they do not, in any order."""

import dataclasses
import random

import numpy as np
import pytest

from staindiffuser.client.blending import Mosaic, OutputImage
from staindiffuser.client.testing import FAKE_CONTRACT
from staindiffuser.client.tiling import GridTile, TileGrid
from staindiffuser.imaging.tissue import TissueMask

IMAGE = OutputImage(tensor="STAIN_CD3", channels=3, glass=255)
CELLS = OutputImage(tensor="CELLS_CD3", channels=1, glass=0)
WIDTH, HEIGHT = 700, 533


def grid_of(margin: int = 32) -> TileGrid:
    return TileGrid.for_model(dataclasses.replace(FAKE_CONTRACT, margin=margin), WIDTH, HEIGHT)


def random_tiles(grid: TileGrid) -> dict[GridTile, dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    tiles = [grid.at(row, column) for row in range(grid.rows) for column in range(grid.columns)]
    return {
        tile: {
            IMAGE.tensor: rng.integers(0, 256, (256, 256, 3), dtype=np.uint8),
            CELLS.tensor: rng.integers(0, 256, (256, 256, 1), dtype=np.uint8),
        }
        for tile in tiles
    }


@pytest.mark.parametrize("margin", [0, 8, 24, 32])
def test_tiles_cut_from_an_image_give_the_image(margin: int) -> None:
    grid = grid_of(margin)
    side = 2 * 256
    world = np.random.default_rng(0).integers(0, 256, (HEIGHT + 2 * side, WIDTH + 2 * side, 3), dtype=np.uint8)
    mosaic = Mosaic(grid, (IMAGE,))
    for row in range(grid.rows):
        for column in range(grid.columns):
            tile = grid.at(row, column)
            y, x = tile.y + side, tile.x + side
            mosaic.add(tile, {IMAGE.tensor: world[y : y + 256, x : x + 256]})
    whole = mosaic.compose(IMAGE, 0, 0, WIDTH, HEIGHT)
    assert whole is not None
    np.testing.assert_array_equal(whole, world[side : side + HEIGHT, side : side + WIDTH])


def test_order_and_region_do_not_matter() -> None:
    grid = grid_of()
    tiles = random_tiles(grid)
    wholes = []
    for seed in (1, 2):
        order = list(tiles)
        random.Random(seed).shuffle(order)
        mosaic = Mosaic(grid, (IMAGE, CELLS))
        for tile in order:
            mosaic.add(tile, tiles[tile])
        wholes.append(mosaic.compose(IMAGE, 0, 0, WIDTH, HEIGHT))
    assert wholes[0] is not None
    assert wholes[1] is not None
    np.testing.assert_array_equal(wholes[0], wholes[1])
    part = mosaic.compose(IMAGE, 150, 170, 201, 99)
    assert part is not None
    np.testing.assert_array_equal(part, wholes[0][170:269, 150:351])


def test_the_step_between_two_tiles_is_spread_over_the_ramp() -> None:
    grid = grid_of()
    mosaic = Mosaic(grid, (CELLS,))
    for row in range(grid.rows):
        for column in range(grid.columns):
            level = 100 if column % 2 else 132
            mosaic.add(grid.at(row, column), {CELLS.tensor: np.full((256, 256, 1), level, dtype=np.uint8)})
    whole = mosaic.compose(CELLS, 0, 0, WIDTH, HEIGHT)
    assert whole is not None
    steps = np.abs(np.diff(whole[..., 0].astype(int), axis=1))
    assert steps.max() == 32 // grid.ramp
    assert np.abs(np.diff(whole[..., 0].astype(int), axis=0)).max() == 0


def test_missing_tiles_are_glass_and_leave_no_seam() -> None:
    grid = grid_of()
    mosaic = Mosaic(grid, (IMAGE, CELLS))
    assert mosaic.compose(IMAGE, 0, 0, 64, 64) is None
    tile = grid.at(1, 1)
    mosaic.add(
        tile, {IMAGE.tensor: np.full((256, 256, 3), 9, np.uint8), CELLS.tensor: np.full((256, 256, 1), 7, np.uint8)}
    )
    (x0, x1), (y0, y1) = grid.shown(tile.x, WIDTH), grid.shown(tile.y, HEIGHT)
    expected = np.full((HEIGHT, WIDTH, 3), 255, dtype=np.uint8)
    expected[y0:y1, x0:x1] = 9
    whole = mosaic.compose(IMAGE, 0, 0, WIDTH, HEIGHT)
    assert whole is not None
    np.testing.assert_array_equal(whole, expected)
    cells = mosaic.compose(CELLS, 0, 0, WIDTH, HEIGHT)
    assert cells is not None
    assert cells.sum() == 7 * (x1 - x0) * (y1 - y0)


def test_the_stain_fades_to_glass() -> None:
    grid = grid_of()
    shown = np.zeros((HEIGHT // 16 + 1, WIDTH // 16 + 1), dtype=np.float32)
    shown[:, :20] = 1
    mask = TissueMask(tissue=shown > 0, shown=shown, cell=(16.0, 16.0))
    mosaic = Mosaic(grid, (IMAGE, CELLS), mask)
    for tile, outputs in random_tiles(grid).items():
        mosaic.add(tile, {name: np.full_like(value, 100) for name, value in outputs.items()})
    image = mosaic.compose(IMAGE, 0, 0, WIDTH, HEIGHT)
    cells = mosaic.compose(CELLS, 0, 0, WIDTH, HEIGHT)
    assert image is not None
    assert cells is not None
    assert (image[:, :300] == 100).all()
    assert (image[:, 340:] == 255).all()
    assert (cells[:, 340:] == 0).all()
    assert np.abs(np.diff(image[0, :, 0].astype(int))).max() <= 12
    part = mosaic.compose(IMAGE, 290, 100, 60, 40)
    assert part is not None
    np.testing.assert_array_equal(part, image[100:140, 290:350])


@pytest.mark.parametrize(("painted", "away"), [(244, 255), (240, 255), (216, 216), (90, 90)])
def test_a_models_glass_turns_white_away_from_tissue_and_what_it_painted_stays(painted: int, away: int) -> None:
    grid = grid_of()
    shown = np.ones((HEIGHT // 16 + 1, WIDTH // 16 + 1), dtype=np.float32)
    near = np.zeros_like(shown)
    near[:, :10] = 1
    mosaic = Mosaic(grid, (IMAGE, CELLS), TissueMask(tissue=shown > 0, shown=shown, cell=(16.0, 16.0), near=near))
    for tile, outputs in random_tiles(grid).items():
        mosaic.add(tile, {name: np.full_like(value, painted) for name, value in outputs.items()})
    image, cells = mosaic.compose(IMAGE, 0, 0, WIDTH, HEIGHT), mosaic.compose(CELLS, 0, 0, WIDTH, HEIGHT)
    assert image is not None
    assert cells is not None
    assert (image[:, :150] == painted).all(), "in the tissue every pixel is the model's"
    assert (image[:, 180:] == away).all()
    assert (cells == painted).all()
    part = mosaic.compose(IMAGE, 140, 100, 60, 40)
    assert part is not None
    np.testing.assert_array_equal(part, image[100:140, 140:200])


def test_rows_are_forgotten() -> None:
    grid = grid_of()
    mosaic = Mosaic(grid, (IMAGE, CELLS))
    for tile, outputs in random_tiles(grid).items():
        mosaic.add(tile, outputs)
    mosaic.forget_above(grid.rows)
    assert mosaic.compose(IMAGE, 0, 0, WIDTH, HEIGHT) is None
