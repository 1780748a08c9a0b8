"""``combined.ome.tiff``: a channel per stain, with names, colours and every level, of the densities of the images."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from staindiffuser.client.options import StainingOptions
from staindiffuser.client.staining import stain_slide
from staindiffuser.client.testing import FakeStainer
from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.ome_tiff import SIDE

SIZE = (700, 600)
DAB_OD_1 = (138, 69, 43)
"""About what a DAB density of 1 looks like: 255 × 10^(−0.268, −0.570, −0.776)."""


def paint(tensor: str, tiles_BTT3: UInt8Array, origins_B2: NDArray[np.int64]) -> UInt8Array:
    """CD3 is all blue hematoxylin, CK8/18 all brown DAB."""
    if tensor.startswith("STAIN"):
        colour = DAB_OD_1 if tensor.endswith("CK818") else (57, 50, 132)
        return np.broadcast_to(np.array(colour, np.uint8), tiles_BTT3.shape).copy()
    return np.zeros((*tiles_BTT3.shape[:3], 1), np.uint8)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("combined")
    slide = np.full((SIZE[1], SIZE[0], 3), 255, np.uint8)
    slide[:, :400] = (170, 90, 150)
    tifffile.imwrite(
        folder / "he.tif", slide, photometric="rgb", resolution=(20000, 20000), resolutionunit="CENTIMETER"
    )
    run = stain_slide(
        folder / "he.tif", folder / "out", FakeStainer(paint), StainingOptions(combined=True, cells=False, mask="none")
    )
    assert run.outputs["combined.ome.tiff"] > 0
    assert run.request.combined
    return folder / "out"


def test_each_stain_is_a_channel_of_its_density(result: Path) -> None:
    with tifffile.TiffFile(result / "combined.ome.tiff") as tiff:
        (series,) = tiff.series
        assert series.axes == "CYX"
        assert [level.shape[1:] for level in series.levels] == [(600, 700), (300, 350), (150, 175)]
        for level in series.levels:
            hematoxylin, cd3, ck = level.asarray().astype(int)
            assert np.median(hematoxylin) == pytest.approx(100, abs=3)
            assert np.median(cd3) <= 5
            assert np.median(ck) == pytest.approx(100, abs=3)
            assert np.ptp(ck, axis=1).max() <= 3, "no seams"


def test_names_colours_and_pixel_size_are_told(result: Path) -> None:
    ome_types = pytest.importorskip("ome_types", reason="reading OME-XML as others do needs ome-types")
    image = ome_types.from_tiff(result / "combined.ome.tiff").images[0]
    assert [channel.name for channel in image.pixels.channels] == ["Hematoxylin", "CD3 (virtual)", "CK8/18 (virtual)"]
    assert [channel.color.as_hex() for channel in image.pixels.channels] == ["#4b6bff", "#00e05a", "#ff4fd8"]
    assert image.pixels.physical_size_x == pytest.approx(0.5)
    assert image.pixels.size_c == 3
    assert [block.first_c for block in image.pixels.tiff_data_blocks] == [0, 1, 2]
    assert "research use only" in image.description


def test_a_region_is_read_without_the_rest(result: Path) -> None:
    zarr = pytest.importorskip("zarr", reason="reading regions needs zarr")
    with tifffile.TiffFile(result / "combined.ome.tiff") as tiff:
        store = tiff.series[0].aszarr(level=0)
        region = np.asarray(zarr.open(store, mode="r")[2, SIDE - 5 : SIDE + 5, :20])
    assert np.median(region) == pytest.approx(100, abs=3)
