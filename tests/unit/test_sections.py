"""Sections are read by physical position; what cannot be read is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from staindiffuser.errors import InputError, UsageError
from staindiffuser.imaging.errors import MissingPixelSizeError
from staindiffuser.training.errors import DataError
from staindiffuser.training.prepare.registration.overview import overviews
from staindiffuser.training.prepare.sections import Section


def test_a_section_is_read_by_position(tmp_path: Path) -> None:
    y, x = np.mgrid[:200, :300]
    ramp = np.stack([x * 200 / 300, y, np.full_like(x, 90)], axis=-1).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    with Section(tmp_path / "ramp.png", mpp=0.5) as section:
        assert section.size_um == (150.0, 100.0)
        same = section.read((20.0, 10.0), (40, 30), 0.5)
        assert np.array_equal(same.rgb, ramp[20:50, 40:80])
        coarse = section.read((-10.0, 10.0), (60, 20), 2.0).rgb.astype(int)
        assert coarse.shape == (20, 60, 3)
        assert (coarse[:, :5] == 255).all()
        assert np.abs(coarse[5, 5:, 0] - (np.arange(55) * 4 + 1.5) * 200 / 300).max() <= 2
        assert np.abs(coarse[:, 30, 1] - (20 + np.arange(20) * 4 + 1.5)).max() <= 2
        between = section.read((20.25, 10.0), (40, 30), 0.5).rgb.astype(int)
        assert np.abs(between - (ramp[20:50, 40:80].astype(int) + ramp[20:50, 41:81]) / 2).max() <= 1
        assert (section.read((1000.0, 0.0), (4, 4), 0.5).rgb == 255).all()


def test_sections_that_cannot_be_used(tmp_path: Path) -> None:
    Image.fromarray(np.full((50, 60, 3), 240, np.uint8)).save(tmp_path / "glass.png")
    (tmp_path / "text.svs").write_text("no slide")
    for path, words in (
        ("glass.png", "give it in µm per pixel as --he-mpp"),
        ("text.svs", "not a supported slide or image"),
        ("no", "not exist"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            Section(tmp_path / path, option="--he-mpp")
        assert path in str(caught.value)
    with pytest.raises(UsageError, match=r"--mpp is 0.001; it must be .* between"):
        Section(tmp_path / "glass.png", mpp=0.001)
    with Section(tmp_path / "glass.png", mpp=0.5) as section, pytest.raises(DataError, match="no tissue"):
        overviews(section, {"cd3": section})


def test_a_pyramid_is_read_at_any_level(real_data: Path) -> None:
    with Section(real_data / "slides" / "CMU-1-Small-Region.svs") as section:
        assert section.mpp[0] == pytest.approx(0.499)
        plane, _ = overviews(section, {"again": section})
        assert max(plane.rgb.shape) <= 1010
        fine = section.read((400.0, 300.0), (400, 400), 0.5).rgb
        coarse = section.read((400.0, 300.0), (100, 100), 2.0).rgb
        averaged = np.asarray(Image.fromarray(fine).reduce(4)).astype(int)
        assert np.abs(coarse - averaged).mean() < 4


def test_the_resolution_of_a_screen_is_no_pixel_size(tmp_path: Path) -> None:
    path = tmp_path / "tiled.tif"
    pixels = np.full((512, 512, 3), 200, np.uint8)
    tifffile.imwrite(path, pixels, photometric="rgb", tile=(256, 256), resolution=(72, 72), resolutionunit="inch")
    with pytest.raises(MissingPixelSizeError, match=r"does not state its pixel size.*--he-mpp"):
        Section(path, option="--he-mpp")
