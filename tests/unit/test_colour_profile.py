"""ICC profiles: read from every kind of file, applied only on request, damaged ones refused."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from staindiffuser.client.options import StainingOptions
from staindiffuser.client.staining import stain_slide
from staindiffuser.client.testing import FakeStainer
from staindiffuser.imaging.colour_profile import to_srgb
from staindiffuser.imaging.errors import SlideError
from staindiffuser.imaging.slides import open_slide
from tests.unit.test_patient_data import svs
from tests.unit.test_slides_faithful import TILED, image


@functools.cache
def swapped() -> bytes:
    """A profile of a scanner whose first channel is blue: the red and blue primaries of sRGB exchanged."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = int.from_bytes(profile[128:132], "big")
    for start in range(132, 132 + 12 * count, 12):
        name = bytes(profile[start : start + 4])
        exchanged = {b"rXYZ": b"bXYZ", b"bXYZ": b"rXYZ"}.get(name)
        if exchanged:
            profile[start : start + 4] = exchanged
    return bytes(profile)


def write(path: Path, profile: bytes | None) -> None:
    if path.suffix == ".tif":
        options: dict[str, Any] = {**TILED, "iccprofile": profile}
        tifffile.imwrite(path, image(), photometric="rgb", **options)
    else:
        Image.fromarray(image()).save(path, icc_profile=profile, dpi=(50800, 50800), quality=95)


@pytest.mark.parametrize("kind", ["a.tif", "a.png", "a.jpg"])
def test_the_profile_is_found_and_not_applied(tmp_path: Path, kind: str) -> None:
    write(tmp_path / kind, swapped())
    with open_slide(tmp_path / kind) as slide:
        assert slide.icc_profile == swapped()
        assert np.abs(slide.read(0, 0, 0, *slide.size).astype(int) - image()).mean() < 1.5


def test_openslide_gives_the_profile_of_a_slide(tmp_path: Path) -> None:
    svs(tmp_path / "a.svs")
    with open_slide(tmp_path / "a.svs") as slide:
        assert slide.format.startswith("aperio")
        assert slide.icc_profile is not None
        convert = to_srgb(slide.icc_profile, "slide")
        pixels = slide.read(0, 100, 100, 256, 256)
    assert np.abs(convert(pixels).astype(int) - pixels).max() <= 2, "it is sRGB"


def test_colours_are_converted_on_request(tmp_path: Path) -> None:
    write(tmp_path / "a.tif", swapped())
    results = {}
    for icc in ("ignore", "srgb"):
        options = StainingOptions(stains=("cd3",), cells=False, icc=icc, mask="none")
        run = stain_slide(tmp_path / "a.tif", tmp_path / icc, FakeStainer(), options)
        assert run.request.icc == icc
        results[icc] = tifffile.imread(tmp_path / icc / "cd3.ome.tiff").astype(int)
    assert np.abs(results["ignore"] - image()).mean() < 3
    assert np.abs(results["srgb"] - image()[..., ::-1]).mean() < 4, "red and blue are exchanged"


def test_a_slide_without_a_profile_is_stained_with_a_warning(tmp_path: Path) -> None:
    write(tmp_path / "a.tif", None)
    options = StainingOptions(stains=("cd3",), cells=False, icc="srgb")
    run = stain_slide(tmp_path / "a.tif", tmp_path / "out", FakeStainer(), options)
    assert any("no ICC profile" in warning for warning in run.warnings)


@pytest.mark.parametrize("profile", [b"nonsense" * 40, swapped()[:300]])
def test_a_damaged_profile_is_refused_only_if_it_is_needed(tmp_path: Path, profile: bytes) -> None:
    write(tmp_path / "a.tif", profile)
    options = StainingOptions(stains=("cd3",), cells=False, icc="srgb")
    with pytest.raises(SlideError, match="omit --icc"):
        stain_slide(tmp_path / "a.tif", tmp_path / "out", FakeStainer(), options)
    stain_slide(tmp_path / "a.tif", tmp_path / "out", FakeStainer(), StainingOptions(stains=("cd3",), cells=False))


def test_other_values_are_refused() -> None:
    with pytest.raises(ValueError, match="icc must be"):
        StainingOptions(icc="adobe")
