"""OME-TIFF out: tifffile and OpenSlide see every level, with pixel size and what the image is."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile

from staindiffuser.imaging import ome_tiff
from staindiffuser.imaging.ome_tiff import Channel, ImageInfo, PyramidWriter, halved, level_sizes

INFO = ImageInfo(name="CD3", description="Synthetic — µ", mpp=(0.499, 0.499), channels=(Channel("CD3"),))


def smooth(height: int, width: int, channels: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    planes = [127 + 120 * np.sin(x / (40 + 9 * c) + y / 71) for c in range(channels)]
    return np.stack(planes, axis=-1).astype(np.uint8)


def write(path: Path, image: np.ndarray, background: int = 255) -> None:
    height, width, channels = image.shape

    def compose(x: int, y: int, w: int, h: int) -> np.ndarray | None:
        part = image[y : y + h, x : x + w]
        return None if (part == background).all() else part

    with (
        PyramidWriter(path.parent, width, height, channels=channels, glass=background) as writer,
        ThreadPoolExecutor(2) as workers,
    ):
        for row in range(writer.rows):
            writer.write_row(row, compose, workers)
        writer.finish(path, INFO)


@pytest.mark.parametrize("size", [(2967, 2220), (224, 224), (513, 1025), (1, 1), (512, 4096)])
@pytest.mark.parametrize("channels", [3, 1])
def test_every_level_is_seen_by_both(tmp_path: Path, size: tuple[int, int], channels: int) -> None:
    image = smooth(*size, channels)
    path = tmp_path / "a.ome.tiff"
    write(path, image)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.ome.tiff"]
    expected = level_sizes(size[1], size[0])
    assert len(expected) >= 3
    with tifffile.TiffFile(path) as tiff:
        assert len(tiff.series) == 1
        levels = tiff.series[0].levels
        assert [(level.shape[1], level.shape[0]) for level in levels] == expected
        reduced = image
        for level in levels:
            read = level.asarray().reshape(level.shape[0], level.shape[1], channels).astype(int)
            assert np.abs(read - reduced).mean() <= (2.0 if channels == 3 else 0)
            padded = np.pad(reduced, ((0, reduced.shape[0] % 2), (0, reduced.shape[1] % 2), (0, 0)), mode="edge")
            reduced = halved(padded)
        xml = tiff.ome_metadata
        assert xml is not None
        assert 'PhysicalSizeX="0.499"' in xml
        assert "Synthetic — µ" in xml
        assert tiff.pages.first.tags["XResolution"].value[0] > 0
    with openslide.OpenSlide(path) as slide:
        assert list(slide.level_dimensions) == expected
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.499, rel=1e-4)
        overview = np.asarray(slide.read_region((0, 0), 0, slide.dimensions))[..., :channels].astype(int)
    assert np.abs(overview - image).mean() <= (2.0 if channels == 3 else 0)


def test_colour_is_not_subsampled(tmp_path: Path) -> None:
    image = np.zeros((600, 600, 3), dtype=np.uint8)
    image[:, ::2] = (200, 30, 30)
    image[:, 1::2] = (30, 30, 200)
    write(tmp_path / "a.ome.tiff", image)
    read = tifffile.imread(tmp_path / "a.ome.tiff").astype(int)
    assert np.abs(read - image).mean() < 6
    with tifffile.TiffFile(tmp_path / "a.ome.tiff") as tiff:
        assert tiff.pages.first.tags["YCbCrSubSampling"].value == (1, 1)
        assert tiff.pages.first.photometric == tifffile.PHOTOMETRIC.YCBCR


def test_background_stays_exactly_background(tmp_path: Path) -> None:
    image = np.full((1500, 1500, 3), 255, dtype=np.uint8)
    image[700:720, 700:720] = 10
    write(tmp_path / "a.ome.tiff", image)
    read = tifffile.imread(tmp_path / "a.ome.tiff")
    assert (read[:500] == 255).all()
    assert (read[1100:] == 255).all()


def test_large_files_are_bigtiff(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ome_tiff, "CLASSIC_LIMIT", 10)
    path = tmp_path / "a.ome.tiff"
    write(path, smooth(1300, 1300, 3))
    with tifffile.TiffFile(path) as tiff:
        assert tiff.is_bigtiff
        assert len(tiff.series[0].levels) == 3
    with openslide.OpenSlide(path) as slide:
        assert slide.level_count == 3


def test_the_same_tiles_give_the_same_pixels_from_any_number_of_threads(tmp_path: Path) -> None:
    image = smooth(1300, 1700, 3)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "x.ome.tiff", image)
    np.testing.assert_array_equal(
        tifffile.imread(tmp_path / "a/x.ome.tiff"), tifffile.imread(tmp_path / "b/x.ome.tiff")
    )
