"""The slide at the model's pixel size: no seams, no aliasing, reflected at the edges, in memory only while needed."""

from pathlib import Path

import numpy as np
import pytest

from staindiffuser.client.model_view import ModelView, reflected
from staindiffuser.imaging.pixel_size import PixelSize
from staindiffuser.imaging.slides import Slide


class ArraySlide(Slide):
    """A slide in memory, with levels."""

    def __init__(self, *levels: np.ndarray, mpp: PixelSize = (0.5, 0.5), chunk: int = 256) -> None:
        self.path, self.format, self.mpp = Path("array"), "array", mpp
        self.levels = levels
        self.level_sizes = tuple((level.shape[1], level.shape[0]) for level in levels)
        self.exact_levels = tuple(range(len(levels)))
        self.chunk = (chunk, chunk)
        self.reads = 0

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        assert x >= 0
        assert y >= 0
        assert x + width <= self.level_sizes[level][0]
        assert y + height <= self.level_sizes[level][1]
        self.reads += 1
        return self.levels[level][y : y + height, x : x + width]

    def close(self) -> None:
        pass


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("mpp", "resampled"), [(0.5, False), (0.491, False), (0.509, False), (0.48, True), (0.25, True)]
)
def test_none_within_two_percent(mpp: float, resampled: bool) -> None:
    slide = ArraySlide(noise(700, 900))
    view = ModelView(slide, (mpp, mpp), 0.5)
    assert view.resampled is resampled
    assert view.size[0] * view.mpp[0] == pytest.approx(900 * mpp), "the extent stays"
    assert view.size[0] * view.scale[0] == pytest.approx(900)
    if not resampled:
        np.testing.assert_array_equal(view.read(0, 0, 900, 700), slide.levels[0])


@pytest.mark.parametrize("mpp", [0.1234, 0.25, 0.4, 0.85])
def test_a_pixel_does_not_depend_on_the_region(mpp: float) -> None:
    view = ModelView(ArraySlide(noise(2300, 2900)), (mpp, mpp), 0.5)
    width, height = view.size
    whole = view.read(0, 0, width, height)
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y = int(rng.integers(0, width - 50)), int(rng.integers(0, height - 50))
        w, h = int(rng.integers(1, width - x)), int(rng.integers(1, height - y))
        np.testing.assert_array_equal(view.read(x, y, w, h), whole[y : y + h, x : x + w])


def test_a_ramp_stays_a_ramp_across_blocks() -> None:
    width = 5000
    ramp = np.broadcast_to((np.arange(width) // 20)[None, :, None], (600, width, 3)).astype(np.uint8)
    view = ModelView(ArraySlide(ramp), (0.23, 0.23), 0.5)
    row = view.read(0, 100, view.size[0], 1)[0, :, 0].astype(float)
    centre = (np.arange(view.size[0]) + 0.5) * view.scale[0]
    assert np.abs(row - (centre / 20 - 0.5)).max() <= 0.75
    assert (np.diff(row) >= 0).all(), "no seam"


def test_what_is_finer_than_the_pixels_averages_out() -> None:
    stripes = np.zeros((1200, 1200, 3), dtype=np.uint8)
    stripes[:, ::2] = 200
    view = ModelView(ArraySlide(stripes), (0.125, 0.125), 0.5)
    inner = view.read(20, 20, 200, 200).astype(int)
    assert np.abs(inner - 100).max() <= 3


def test_the_level_that_is_just_fine_enough_is_read() -> None:
    levels = (noise(2000, 2000), noise(1000, 1000), noise(500, 500))
    view = ModelView(ArraySlide(*levels), (0.25, 0.25), 0.5)
    assert view.level == 1
    assert not view.resampled
    np.testing.assert_array_equal(view.read(300, 200, 10, 10), levels[1][200:210, 300:310])
    assert ModelView(ArraySlide(*levels), (0.2, 0.2), 0.5).level == 1
    assert ModelView(ArraySlide(*levels), (0.5, 0.5), 0.5).level == 0


@pytest.mark.parametrize("size", [1, 2, 5, 40, 700])
def test_reflection_goes_to_and_fro(size: int) -> None:
    before, after = 37, 200
    there_and_back = np.concatenate([np.arange(size), np.arange(size - 2, 0, -1)])
    expected = there_and_back[np.arange(-before, size + after) % len(there_and_back)]
    np.testing.assert_array_equal(reflected(-before, before + size + after, size), expected)


def test_tiles_are_reflected_at_the_edge() -> None:
    pixels = noise(300, 350)
    view = ModelView(ArraySlide(pixels), (0.5, 0.5), 0.5)
    padded = np.pad(pixels, ((32, 300), (32, 300), (0, 0)), mode="reflect")
    for x, y in ((-32, -32), (160, -32), (160, 160), (0, 0), (-32, 160)):
        np.testing.assert_array_equal(view.read_tile(x, y, 256), padded[y + 32 : y + 288, x + 32 : x + 288])


def test_blocks_are_read_once_and_let_go() -> None:
    slide = ArraySlide(noise(3000, 1100), chunk=256)
    view = ModelView(slide, (0.5, 0.5), 0.5)
    tiles = [(x, y) for y in range(-32, 2900, 192) for x in range(-32, 1000, 192)]
    view.expect(tiles, 256)
    most = 0
    for x, y in tiles:
        view.read_tile(x, y, 256)
        view.done(x, y, 256)
        most = max(most, len(view._blocks))
    assert slide.reads == 3 * 6, "each block of 512 once"
    assert most <= 2 * 3, "two rows of blocks"
    assert not view._blocks
