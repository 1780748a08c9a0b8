"""Marker pen, borders, vignettes and tinted glass: what a pathologist would leave out is left out, and no more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage

from staindiffuser.imaging.slides import open_slide
from staindiffuser.imaging.tissue import Overview, TissueMask, find_tissue, mask_image, read_overview

PENS = {
    "black": (30, 30, 34),
    "blue": (35, 60, 165),
    "green": (20, 130, 70),
    "red": (205, 30, 40),
    "turquoise": (10, 140, 150),
}
MPP = 8.0


def found(pixels: np.ndarray) -> TissueMask:
    image = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
    return find_tissue(Overview(pixels=image, mpp=(MPP, MPP)), (MPP, MPP))


@pytest.fixture(scope="module")
def slide(real_data: Path) -> np.ndarray:
    """Real skin at 8 µm, with glass around it."""
    with open_slide(real_data / "slides/CMU-1-Small-Region.svs") as slide:
        small = np.asarray(Image.fromarray(slide.read(0, 0, 0, *slide.size)).reduce(16))
    return surrounded(small)


def surrounded(small: np.ndarray, by: int = 60) -> np.ndarray:
    rng = np.random.default_rng(0)
    height, width = small.shape[:2]
    whole = rng.normal(243, 1.2, (height + 2 * by, width + 2 * by, 3))
    whole[by:-by, by:-by] = small
    return whole


def marked(slide: np.ndarray, ink: tuple[int, int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A stroke of half a millimetre across the slide, which lets through what ink does; where it is."""
    rng = np.random.default_rng(seed)
    height, width = slide.shape[:2]
    drawn = Image.new("L", (width * 4, height * 4))
    points = [(rng.uniform(0.1, 0.9) * width * 4, rng.uniform(0.1, 0.9) * height * 4) for _ in range(4)]
    ImageDraw.Draw(drawn).line(points, fill=255, width=int(500 / MPP * 4), joint="curve")
    small = drawn.filter(ImageFilter.GaussianBlur(4)).resize((width, height), Image.Resampling.BOX)
    share = np.asarray(small, dtype=np.float64) / 255
    amount = np.clip(share * 0.93 * (1 + 0.12 * rng.standard_normal((height, width))), 0, 1)[..., None]
    return slide * (1 - amount + amount * (np.array(ink) + 2) / 245), share > 0.5


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pen", list(PENS))
def test_pen_is_left_out_on_glass_and_over_tissue(slide: np.ndarray, pen: str, seed: int) -> None:
    clean = found(slide)
    pixels, drawn = marked(slide, PENS[pen], seed)
    mask = found(pixels)
    away = ~ndimage.binary_dilation(drawn, iterations=8)
    assert mask.tissue[drawn].mean() < 0.03
    assert mask.shown[drawn].mean() < 0.05, "and it does not show"
    assert mask.tissue[clean.tissue & away].mean() > 0.93
    assert mask.tissue[~clean.tissue & ~drawn].mean() < 0.01
    assert mask.pen_fraction == pytest.approx(drawn.mean(), rel=0.25)


def test_the_red_pen_of_a_real_slide_is_found(real_data: Path) -> None:
    with open_slide(real_data / "crops/high-nuclei-score-red-pen-level1.png") as slide:
        mask = find_tissue(read_overview(slide, (1.0, 1.0)), (1.0, 1.0))
    assert mask.pen is not None
    height, width = mask.pen.shape
    rows, columns = np.nonzero(mask.pen)
    assert 0.03 < mask.pen_fraction < 0.2
    assert rows.max() < 0.6 * height, "the upper stroke; the fold across the middle is tissue"
    assert 0.3 * width < columns.min()
    assert mask.fraction > 0.8


@pytest.mark.parametrize(
    "name", ["crops/medium-nuclei-score-level1.png", "crops/OS-1-detail.ome.tif", "slides/tcga-cr-7395-01a-01-ts1.svs"]
)
def test_real_tissue_has_no_pen(real_data: Path, name: str) -> None:
    with open_slide(real_data / name) as slide:
        mpp = slide.mpp or (0.5, 0.5)
        mask = find_tissue(read_overview(slide, mpp), mpp)
    assert mask.pen_fraction == 0


def test_tiles_of_many_regions_have_no_pen(real_data: Path) -> None:
    paths = sorted((real_data / "hemit-regions/he").glob("*.jpg"))[::40]
    assert paths
    for path in paths:
        image = np.asarray(Image.open(path).convert("RGB"))
        mask = find_tissue(Overview(pixels=image[::4, ::4], mpp=(1.0, 1.0)), (1.0, 1.0))
        assert mask.pen_fraction == 0, path.name


def vignette(depth: float) -> Callable[[np.ndarray], np.ndarray]:
    def darkened(slide: np.ndarray) -> np.ndarray:
        height, width = slide.shape[:2]
        y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
        return slide * (1 - depth * (x * x + y * y) / 2)[..., None]

    return darkened


def tinted(*factors: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda slide: slide * np.array(factors) + np.random.default_rng(3).normal(0, 1, slide.shape)


LIGHT: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "weak vignette": vignette(0.1),
    "strong vignette": vignette(0.3),
    "yellow glass": tinted(0.98, 0.94, 0.80),
    "grey glass": tinted(0.785, 0.785, 0.785),
    "yellow glass with a vignette": lambda slide: vignette(0.2)(tinted(0.98, 0.94, 0.82)(slide)),
}


@pytest.mark.parametrize("kind", list(LIGHT))
def test_glass_is_glass_in_any_light(slide: np.ndarray, kind: str) -> None:
    clean, mask = found(slide), found(LIGHT[kind](slide))
    assert mask.tissue[clean.tissue].mean() > 0.99
    assert mask.tissue[~clean.tissue].mean() < 0.005
    assert mask.pen_fraction == 0


@pytest.mark.parametrize("share", [0.35, 0.15])
def test_pale_tissue_is_found(slide: np.ndarray, share: float) -> None:
    clean, mask = found(slide), found(243 - (243 - slide) * share)
    assert mask.tissue[clean.tissue].mean() > 0.89
    assert mask.tissue[~clean.tissue].mean() < 0.005


@pytest.mark.parametrize("level", [0, 8, 40, 100])
def test_dark_borders_are_neither_tissue_nor_pen(slide: np.ndarray, level: float) -> None:
    clean, framed = found(slide), slide.copy()
    rng = np.random.default_rng(1)
    border = np.ones(slide.shape[:2], bool)
    border[25:-12, 25:] = False
    framed[border] = rng.normal(level, 1.5, (int(border.sum()), 3))
    mask = found(framed)
    assert mask.tissue[border].mean() == 0
    assert mask.tissue[clean.tissue & ~border].mean() > 0.99
    assert mask.tissue[~clean.tissue & ~border].mean() < 0.002
    assert mask.unscanned_fraction == pytest.approx(border.mean(), abs=0.06)


def test_a_round_field_of_view(slide: np.ndarray) -> None:
    clean, image = found(slide), slide.copy()
    y, x = np.meshgrid(np.linspace(-1, 1, image.shape[0]), np.linspace(-1, 1, image.shape[1]), indexing="ij")
    outside = x * x + y * y > 1.2
    image[outside] = 12
    mask = found(image)
    assert mask.tissue[outside].mean() == 0
    assert mask.tissue[clean.tissue & ~outside].mean() > 0.99
    assert mask.tissue[~clean.tissue].mean() < 0.002


def test_the_mask_can_be_looked_at(slide: np.ndarray) -> None:
    pixels, drawn = marked(slide, PENS["green"], 0)
    mask = found(pixels)
    image = mask_image(mask)
    assert mask.pen is not None
    assert set(np.unique(image)) <= {0, 50, 100, 170, 255}
    assert (image[mask.tissue] == 255).all()
    assert (image[drawn] == 100).mean() > 0.9
