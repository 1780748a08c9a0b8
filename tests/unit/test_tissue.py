"""Tissue: glass is left out, pale tissue and fat are not, dust is."""

from pathlib import Path

import numpy as np
import pytest

from staindiffuser.imaging.glass import bare_glass
from staindiffuser.imaging.slides import Slide, open_slide
from staindiffuser.imaging.tissue import Overview, TissueMask, find_tissue, read_overview

GLASS = 242


def glass(height: int = 200, width: int = 300, noise: float = 1.5) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.clip(rng.normal(GLASS, noise, (height, width, 3)), 0, 255)


def mask_of(image: np.ndarray, mpp: float = 8.0) -> TissueMask:
    pixels = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    return find_tissue(Overview(pixels=pixels, mpp=(mpp, mpp)), (mpp, mpp))


@pytest.mark.parametrize("level", [205, 230, 242, 250, 255])
def test_bare_glass_of_any_brightness_has_no_tissue(level: int) -> None:
    assert mask_of(glass() - GLASS + level).fraction == 0


class HugeSlide(Slide):
    """100,000 × 80,000 pixels, without memory for them."""

    def __init__(self, *levels: tuple[int, int]) -> None:
        super().__init__(Path("huge"))
        self.level_sizes = levels

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        assert level == 1
        return np.full((height, width, 3), 240, np.uint8)

    def close(self) -> None:
        pass


@pytest.mark.parametrize("reduced", [(6250, 5000), (12500, 10000), (3000, 2400)])
def test_the_overview_of_a_huge_slide_is_bounded(reduced: tuple[int, int]) -> None:
    overview = read_overview(HugeSlide((100_000, 80_000), reduced), (0.5, 0.5))
    height, width = overview.pixels.shape[:2]
    assert 5e5 < width * height <= 4.1e6
    assert width * overview.mpp[0] == pytest.approx(50_000, rel=0.01)


@pytest.mark.parametrize("tint", [(250, 250, 250), (240, 236, 244), (233, 228, 215)])
def test_bare_glass_is_told_from_pale_tissue(tint: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(0)
    image = np.array(tint) + rng.normal(0, 1.5, (128, 128, 3))
    image[40:90, 30:100] *= (0.93, 0.80, 0.90)  # pale stroma
    image[60:70, 60:70] *= (0.5, 0.5, 0.7)
    bare = bare_glass(np.clip(np.rint(image), 0, 255).astype(np.uint8))
    assert bare.dtype == np.float32
    assert bare[:30].min() > 0.9
    assert bare[45:85, 35:95].max() < 0.05
    assert 0.05 < bare[39, 35:95].mean() < 0.95  # soft at the edge


def test_uneven_glass_has_no_tissue() -> None:
    shade = np.linspace(-5, 5, 300)[None, :, None]
    assert mask_of(glass() + shade).fraction == 0


@pytest.mark.parametrize(
    "colour", [(235, 215, 228), (228, 228, 240), (225, 225, 225), (180, 120, 170), (240, 222, 234)]
)
def test_tissue_is_found_pale_as_it_may_be(colour: tuple[int, int, int]) -> None:
    image = glass()
    image[60:140, 80:200] += np.array(colour) - GLASS
    mask = mask_of(image)
    inside = np.zeros(mask.tissue.shape, dtype=bool)
    inside[60:140, 80:200] = True
    assert mask.tissue[inside].mean() > 0.99
    assert mask.shown[inside].min() == 1, "all of it shows"
    assert mask.tissue[~inside].mean() < 0.02


def test_fat_inside_tissue_belongs_to_it() -> None:
    image = glass()
    image[40:160, 40:260] -= (60, 110, 60)
    image[80:120, 100:200] = glass(40, 100)  # empty fat cells of 80 µm with membranes between them
    image[80:120:10, 100:200] -= (15, 35, 20)
    image[80:120, 100:200:10] -= (15, 35, 20)
    assert mask_of(image).shown[80:120, 100:200].min() == 1


def test_dust_is_left_out() -> None:
    image = glass()
    image[50:53, 50:53] = 60
    image[100, 100] = 30
    assert mask_of(image).fraction == 0


def test_what_was_not_scanned_is_no_tissue_and_not_taken_for_the_glass() -> None:
    for fill in (255, 0):
        image = glass()
        image[:, :80] = fill
        assert mask_of(image).fraction == 0
        image[60:140, 120:250] -= (20, 50, 25)
        assert mask_of(image).fraction == pytest.approx(80 * 130 / 60000, rel=0.1)


def test_a_image_full_of_tissue_is_all_tissue() -> None:
    rng = np.random.default_rng(1)
    image = np.clip(rng.normal((190, 130, 180), 20, (224, 224, 3)), 0, 255)
    assert mask_of(image, mpp=0.5).fraction > 0.99


def test_real_crops(real_data: Path) -> None:
    fractions = {}
    for name in ("no-tissue", "medium-nuclei-score-level1", "high-nuclei-score-red-pen-level1"):
        with open_slide(real_data / f"crops/{name}.png") as slide:
            fractions[name] = find_tissue(read_overview(slide, (1.0, 1.0)), (1.0, 1.0)).fraction
    assert fractions["no-tissue"] == 0
    assert fractions["medium-nuclei-score-level1"] > 0.9
    assert fractions["high-nuclei-score-red-pen-level1"] > 0.8


def test_orion_tiles_are_all_tissue(real_data: Path) -> None:
    paths = sorted(real_data.glob("orion-crc-he-tiles/topic*/*.tif"))[::7]
    assert paths
    lost = []
    for path in paths:
        with open_slide(path) as slide:
            mask = find_tissue(read_overview(slide, (0.5, 0.5)), (0.5, 0.5))
        if mask.shown.mean() < 0.8:
            lost.append((path.name, float(mask.shown.mean())))
    assert len(lost) <= 0.1 * len(paths), lost


def test_the_overview_is_an_area_mean(real_data: Path) -> None:
    with open_slide(real_data / "slides/CMU-1-Small-Region.svs") as slide:
        overview = read_overview(slide, (0.499, 0.499))
        pixels = slide.read(0, 0, 0, 2220, 2967)
    factor = round(overview.mpp[0] / 0.499)
    assert overview.pixels.shape == (-(-2967 // factor), -(-2220 // factor), 3)
    mean = pixels[: 10 * factor, : 20 * factor].reshape(10, factor, 20, factor, 3).mean(axis=(1, 3))
    assert np.abs(overview.pixels[:10, :20] - mean).max() <= 0.51


def test_opacity_does_not_depend_on_the_region() -> None:
    rng = np.random.default_rng(0)
    shown = rng.random((40, 60), dtype=np.float32)
    mask = TissueMask(tissue=shown > 0, shown=shown, cell=(16.3, 15.9))
    whole = mask.opacity(0, 0, 900, 600)
    assert whole is not None
    part = mask.opacity(333, 211, 100, 50)
    assert part is not None
    np.testing.assert_array_equal(part, whole[211:261, 333:433])


def test_a_region_that_does_not_touch_shows_nothing() -> None:
    shown = np.zeros((40, 60), dtype=np.float32)
    shown[10:12, 30:33] = 1
    mask = TissueMask(tissue=shown > 0, shown=shown, cell=(16.0, 16.0))
    whole = mask.opacity(0, 0, 960, 640)
    assert whole is not None
    for y in range(0, 640, 80):
        for x in range(0, 960, 80):
            visible = bool((whole[y : y + 80, x : x + 80] > 0).any())
            assert not visible or mask.touches(x, y, 80, 80)
