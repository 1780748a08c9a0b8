"""``--format ome-zarr``: the images of a result as NGFF 0.5, level by level the pixels of the OME-TIFF."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import zarr

from staindiffuser.client.options import StainingOptions
from staindiffuser.client.run_record import read_run
from staindiffuser.client.staining import stain_slide
from staindiffuser.client.testing import FakeStainer
from staindiffuser.imaging import ome_zarr
from staindiffuser.imaging.slides import open_slide

OPTIONS = StainingOptions(stains=("cd3",), formats=("ome-zarr",), combined=True, mask="none", nuclei=False)
IMAGES = ("cd3", "cd3.cells", "combined")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zarr")
    y, x = np.mgrid[:700, :1300]
    he = np.stack([180 + 40 * np.sin(x / 30), 110 + 40 * np.cos(y / 25), 160 + 0 * x], axis=-1).astype(np.uint8)
    he[100:130, 100:130] = 60
    tifffile.imwrite(folder / "he.tif", he, photometric="rgb", resolution=(20000, 20000), resolutionunit="CENTIMETER")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ome_zarr, "SHARD", 1024)
        stain_slide(folder / "he.tif", folder / "out", FakeStainer(), OPTIONS)
    return folder / "out"


@pytest.mark.parametrize("name", IMAGES)
def test_every_level_has_the_pixels_of_the_tiff(result: Path, name: str) -> None:
    root: Any = zarr.open_group(result / f"{name}.ome.zarr", mode="r")
    (multiscale,) = root.attrs["ome"]["multiscales"]
    assert root.attrs["ome"]["version"] == "0.5"
    assert [axis["name"] for axis in multiscale["axes"]] == ["c", "y", "x"]
    with tifffile.TiffFile(result / f"{name}.ome.tiff") as tiff:
        levels = [level.asarray() for level in tiff.series[0].levels]
    assert len(multiscale["datasets"]) == len(levels)
    for dataset, level in zip(multiscale["datasets"], levels, strict=True):
        expected = level.transpose(2, 0, 1) if name == "cd3" else level.reshape(-1, *level.shape[-2:])
        np.testing.assert_array_equal(np.asarray(root[dataset["path"]]), expected)
        scale = dataset["coordinateTransformations"][0]["scale"]
        assert scale == pytest.approx([1, 0.5 * 700 / expected.shape[1], 0.5 * 1300 / expected.shape[2]])


def test_it_says_what_it_is(result: Path) -> None:
    attributes = json.loads((result / "combined.ome.zarr/zarr.json").read_text())["attributes"]
    channels = attributes["ome"]["omero"]["channels"]
    assert [(one["label"], one["color"]) for one in channels] == [
        ("Hematoxylin", "4B6BFF"),
        ("CD3 (virtual)", "00E05A"),
    ]
    assert "research use only" in attributes["staindiffuser"]["notice"]
    assert attributes["staindiffuser"]["gate"] == "not passed: CD3 (radial power 0.34)"


def test_our_own_reader_takes_it_for_a_slide(result: Path) -> None:
    with open_slide(result / "cd3.ome.zarr") as slide:
        assert slide.size == (1300, 700)
        assert slide.mpp == pytest.approx((0.5, 0.5))
        read = slide.read(0, 0, 0, 1300, 700)
    np.testing.assert_array_equal(read, tifffile.imread(result / "cd3.ome.tiff"))


def test_a_result_with_folders_is_kept_replaced_and_missed(result: Path) -> None:
    run = read_run(result)
    assert all(run.outputs[f"{name}.ome.zarr"] > 1000 for name in IMAGES)
    he = result.parent / "he.tif"
    assert stain_slide(he, result, FakeStainer(), dataclasses.replace(OPTIONS, resume=True)) == run, "kept"
    without = dataclasses.replace(OPTIONS, formats=(), combined=False, overwrite=True)
    stain_slide(he, result, FakeStainer(), without)
    assert not list(result.glob("*.zarr")), "what it replaces is gone"
