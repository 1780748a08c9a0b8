"""Glass that stays clean and nuclei that stay in place are told from glass that does not and nuclei that wander."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from staindiffuser.benchmarks.plausibility import Plausibility, judge
from staindiffuser.client import StainingOptions, stain_slide
from staindiffuser.client.testing import FakeStainer
from staindiffuser.errors import InputError

PALE_BLUE, BLUE, BROWN = (215, 215, 235), (90, 100, 170), (120, 75, 45)


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pink tissue with nuclei on the left, bare glass on the right."""
    rng = np.random.default_rng(0)
    he = np.full((480, 640, 3), 244, np.uint8)
    he[:, :400] = (225, 165, 205)
    yy, xx = np.mgrid[:480, :640]
    for x, y in rng.integers(10, (390, 470), (160, 2)):
        he[np.hypot(xx - x, yy - y) < 6] = (95, 65, 140)
    path = tmp_path_factory.mktemp("slide") / "slide.png"
    Image.fromarray(he).save(path)
    return path


def stained(
    slide: Path, folder: Path, *, shift: int = 0, glass: tuple[int, int, int] = (244, 244, 244)
) -> Plausibility:
    def paint(tensor: str, tiles: np.ndarray, origins: np.ndarray) -> np.ndarray:
        if tensor.startswith("CELLS_"):
            return np.zeros((*tiles.shape[:3], 1), np.uint8)
        nuclei = np.roll(tiles.min(axis=-1) < 110, shift, axis=2)
        bare = tiles.min(axis=-1) > 235
        image = np.where(nuclei[..., None], np.array(BLUE, np.uint8), np.array(PALE_BLUE, np.uint8))
        return np.where(bare[..., None], np.array(glass, np.uint8), image).astype(np.uint8)

    stain_slide(slide, folder, FakeStainer(paint), StainingOptions(stains=("cd3",), mpp=0.5))
    return judge(folder, [slide])[0]


def test_faithful_stain_passes(slide: Path, tmp_path: Path) -> None:
    judged = stained(slide, tmp_path / "out")
    assert judged.stain == "cd3"
    assert judged.glass_dab < 0.01
    assert judged.nuclei_dice > 0.85


def test_nuclei_that_wander_are_found_out(slide: Path, tmp_path: Path) -> None:
    assert stained(slide, tmp_path / "out", shift=9).nuclei_dice < 0.5


def test_brown_glass_is_found_out(slide: Path, tmp_path: Path) -> None:
    """Near the tissue, where tiles are stained, brown glass shows; far from it the client leaves white."""
    assert stained(slide, tmp_path / "out", glass=BROWN).glass_dab > 0.03


def test_a_folder_that_no_stain_wrote_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not hold a complete result"):
        judge(tmp_path)
