"""OME-Zarr slides of both formats are read, and those that are not H&E or are damaged are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import zarr

from staindiffuser.client.inputs import find_inputs
from staindiffuser.client.run_record import slide_sha256
from staindiffuser.imaging.errors import SlideError
from staindiffuser.imaging.slides import open_slide
from tests.unit.test_slides_faithful import image

AXES = [
    {"name": "t", "type": "time"},
    {"name": "c", "type": "channel"},
    {"name": "z", "type": "space", "unit": "micrometer"},
    {"name": "y", "type": "space", "unit": "micrometer"},
    {"name": "x", "type": "space", "unit": "micrometer"},
]


def write(
    path: Path,
    pixels: np.ndarray,
    *,
    version: Literal[2, 3] = 2,
    name: str = "image",
    group: Any = None,
    unit: str = "micrometer",
    scale: float = 0.5,
    omero: dict[str, Any] | None = None,
    depth: int = 1,
    **options: Any,
) -> Any:
    """A multiscale image of two levels, as bioformats2raw and ome-zarr-py write it."""
    root = zarr.create_group(path, zarr_format=version, overwrite=True) if group is None else group
    axes = [{**axis, "unit": unit} if axis["name"] in "yx" else axis for axis in AXES]
    datasets = []
    for level in range(2):
        shown = pixels[:: 2**level, :: 2**level]
        stack = np.repeat(np.moveaxis(shown, -1, 0)[None, :, None], depth, axis=2)
        array = root.create_array(
            str(level), shape=stack.shape, dtype=stack.dtype, chunks=(1, 1, 1, 128, 128), fill_value=0, **options
        )
        array[:] = stack
        factor = scale * 2**level
        transformation = {"type": "scale", "scale": [1.0, 1.0, 1.0, factor, factor]}
        datasets.append({"path": str(level), "coordinateTransformations": [transformation]})
    multiscales = [{"version": "0.4", "name": name, "axes": axes, "datasets": datasets}]
    attributes: dict[str, Any] = {"multiscales": multiscales, **({"omero": omero} if omero else {})}
    root.attrs.update({"ome": {"version": "0.5", **attributes}} if version == 3 else attributes)
    return root


def channels(*names: str, colours: tuple[str, ...] = ("FF0000", "00FF00", "0000FF")) -> dict[str, Any]:
    return {"channels": [{"label": name, "color": colour} for name, colour in zip(names, colours, strict=False)]}


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize(("unit", "scale"), [("micrometer", 0.5), ("millimeter", 0.0005), ("nanometer", 500.0)])
def test_both_formats_are_read(tmp_path: Path, version: Literal[2, 3], unit: str, scale: float) -> None:
    path = tmp_path / "s.ome.zarr"
    write(path, image(), version=version, unit=unit, scale=scale, omero=channels("Red", "Green", "Blue"))
    with open_slide(path) as slide:
        assert slide.level_sizes == ((640, 512), (320, 256))
        assert slide.mpp == pytest.approx((0.5, 0.5))
        assert slide.format == "ome-zarr (zarr)"
        assert slide.notes == ()
        np.testing.assert_array_equal(slide.read(0, 0, 0, 640, 512), image())
        np.testing.assert_array_equal(slide.read(1, 33, 50, 201, 130), image()[::2, ::2][50:180, 33:234])
        before = slide_sha256(slide.files)
    assert [slide.output for slide in find_inputs([path], None)] == [Path("s-stained")]
    assert [slide.path for slide in find_inputs([tmp_path], None)] == [path]
    chunk = max((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    chunk.write_bytes(chunk.read_bytes() + b" ")
    with open_slide(path) as slide:
        assert slide_sha256(slide.files) != before


def test_the_label_of_a_collection_is_not_the_slide(tmp_path: Path) -> None:
    root = zarr.create_group(tmp_path / "s.zarr", zarr_format=2)
    write(tmp_path, np.tile(image(), (2, 2, 1)), group=root.create_group("0"), name="label image")
    write(tmp_path, image(), group=root.create_group("1"), name="/1")
    with open_slide(tmp_path / "s.zarr") as slide:
        assert slide.size == (640, 512)


def test_chunks_that_are_not_stored_are_glass_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    write(path, image())
    for channel in range(3):
        (path / f"0/0.{channel}.0.1.2").unlink()
    with open_slide(path) as slide:
        pixels = slide.read(0, 0, 0, 640, 512)
        assert "3 of 60 chunks are not stored" in slide.notes[0]
    assert (pixels[128:256, 256:384] == 255).all()
    np.testing.assert_array_equal(pixels[:128], image()[:128])


def test_a_damaged_chunk_is_refused_or_left_out(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    write(path, image())
    chunk = path / "0/0.1.0.1.2"
    chunk.write_bytes(chunk.read_bytes()[:-200])
    with pytest.raises(SlideError, match=r"chunk at \(256, 128\) of level 0"), open_slide(path) as slide:
        slide.read(0, 0, 0, 640, 512)
    with open_slide(path, allow_damaged=True) as slide:
        pixels = slide.read(0, 0, 0, 640, 512)
        assert (pixels[128:256, 256:384] == 255).all()
        assert len(slide.damaged) == 1


@pytest.mark.parametrize("file", [".zattrs", "0/.zarray", ".zgroup"])
@pytest.mark.parametrize("content", ["", "{", "[]", '{"multiscales": [{}]}', '{"multiscales": [{"datasets": []}]}'])
def test_damaged_metadata_are_refused_in_one_line(tmp_path: Path, file: str, content: str) -> None:
    path = tmp_path / "s.zarr"
    write(path, image())
    (path / file).write_text(content, encoding="utf-8")
    try:
        with open_slide(path) as slide:
            np.testing.assert_array_equal(slide.read(0, 0, 0, 640, 512), image())
    except SlideError as error:
        message = str(error)
    else:
        return
    assert "\n" not in message
    assert "s.zarr" in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"omero": channels("DAPI", "CD3", "CK", colours=("0000FF", "00FF00", "FF0000"))}, "DAPI, CD3, CK"),
        ({"depth": 3}, "3 z"),
    ],
)
def test_what_is_no_he_is_refused(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    write(tmp_path / "s.zarr", image(), **options)
    with pytest.raises(SlideError, match=words):
        open_slide(tmp_path / "s.zarr")


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_other_samples_are_refused(tmp_path: Path, dtype: str) -> None:
    write(tmp_path / "s.zarr", image().astype(dtype))
    with pytest.raises(SlideError, match=dtype):
        open_slide(tmp_path / "s.zarr")


def test_channels_that_are_not_three_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "s.zarr", np.concatenate([image(), image()[..., :1]], axis=-1))
    with pytest.raises(SlideError, match="4 c"):
        open_slide(tmp_path / "s.zarr")


def test_a_unit_that_is_not_stated_is_not_guessed(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    write(path, image())
    attributes = json.loads((path / ".zattrs").read_text(encoding="utf-8"))
    for axis in attributes["multiscales"][0]["axes"]:
        axis.pop("unit", None)
    (path / ".zattrs").write_text(json.dumps(attributes), encoding="utf-8")
    with open_slide(path) as slide:
        assert slide.mpp is None


def test_a_group_without_an_image_is_refused(tmp_path: Path) -> None:
    zarr.create_group(tmp_path / "s.zarr", zarr_format=2)
    with pytest.raises(SlideError, match="no OME-Zarr image"):
        open_slide(tmp_path / "s.zarr")
