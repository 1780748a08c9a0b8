"""The whole way with a stand-in that "stains" by doing nothing: the result must be the slide."""

import dataclasses
import gzip
import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import tifffile
from numpy.typing import NDArray

from staindiffuser.client.errors import OutputError
from staindiffuser.client.model_view import ModelView
from staindiffuser.client.options import StainingOptions
from staindiffuser.client.result_folder import UNFINISHED, ResultFolder
from staindiffuser.client.run_record import read_run, slide_sha256
from staindiffuser.client.staining import stain_slide
from staindiffuser.client.testing import FAKE_CONTRACT, FakeStainer, identity
from staindiffuser.errors import ServerLostError
from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.errors import MissingPixelSizeError, PixelSizeError, SlideError
from staindiffuser.imaging.slides import DamagedRegion, open_slide
from staindiffuser.imaging.tissue import find_tissue, read_overview

CMU = "slides/CMU-1-Small-Region.svs"
FILES = [
    "cd3.cells.ome.tiff",
    "cd3.ome.tiff",
    "cells.geojson.gz",
    "ck818.cells.ome.tiff",
    "ck818.ome.tiff",
    "run.json",
    "scores.csv",
]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def tissue_tile(path: Path, height: int = 400, width: int = 500) -> np.ndarray:
    """A tile that is tissue all over, smooth enough for JPEG, with some dark cells."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([170 + 30 * np.sin(x / 19), 120 + 30 * np.cos(y / 23), 160 + 20 * np.sin((x + y) / 31)], axis=-1)
    for cy, cx in np.random.default_rng(0).uniform(20, 380, (30, 2)):
        pixels[np.hypot(x - cx, y - cy) < 8] = (80, 50, 110)
    tile = pixels.astype(np.uint8)
    tifffile.imwrite(path, tile, photometric="rgb", resolution=(20000, 20000), resolutionunit="CENTIMETER")
    return tile


def test_a_real_slide_comes_back(real_data: Path, tmp_path: Path) -> None:
    stainer = FakeStainer()
    run = stain_slide(real_data / CMU, tmp_path / "out", stainer, StainingOptions(preview=True))
    assert names(tmp_path / "out") == sorted([*FILES, "preview.png"])
    with open_slide(real_data / CMU) as slide:
        source = slide.read(0, 0, 0, *slide.size)
        mask = find_tissue(read_overview(slide, (0.499, 0.499)), (0.499, 0.499))
    opacity, of_glass = mask.opacity(0, 0, 2220, 2967), mask.glass_opacity(0, 0, 2220, 2967)
    assert opacity is not None
    assert of_glass is not None
    for name in ("cd3.ome.tiff", "ck818.ome.tiff", "cd3.cells.ome.tiff"):
        with openslide.OpenSlide(tmp_path / "out" / name) as slide:
            assert slide.dimensions == (2220, 2967)
            assert slide.level_count >= 3
            assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.499, rel=1e-4)
    image = tifffile.imread(tmp_path / "out/cd3.ome.tiff")
    difference = np.abs(image.astype(int) - source)
    assert difference[(opacity == 256) & (of_glass == 256)].mean() < 2.5, "JPEG only"
    glass = (of_glass == 0) & (source.min(axis=-1) >= 236)
    assert image[glass].mean() > 254.5, "white, in gaps of the tissue as well"
    assert image[opacity == 0].min() >= 250, "glass is white, but for the rim of JPEG blocks"
    assert (image[opacity == 0] == 255).mean() > 0.99
    cells = tifffile.imread(tmp_path / "out/cd3.cells.ome.tiff")
    expected = np.where(source.min(axis=-1) < 100, 255, 0)
    np.testing.assert_array_equal(cells[opacity == 256], expected[opacity == 256])
    assert (cells[opacity == 0] == 0).all()
    assert run.tiles.stained == sum(stainer.batches)
    assert run.tiles.stained < run.tiles.total
    assert run == read_run(tmp_path / "out")
    assert run.input.sha256 == "ed92d5a9f2e86df67640d6f92ce3e231419ce127131697fbbce42ad5e002c8a7"
    assert run.seed == 0
    assert run.steps == 2
    assert run.model.version == FAKE_CONTRACT.model_version
    assert {"python", "staindiffuser", "tifffile", "numpy"} <= run.versions.keys()
    assert run.seconds.stages_summed_over_threads.keys() >= {"tissue", "read", "stain", "cells"}
    collection = json.loads(gzip.decompress((tmp_path / "out/cells.geojson.gz").read_bytes()))
    assert len(collection["features"]) == sum(run.cells.values()) > 100
    assert FAKE_CONTRACT.notice in collection["staindiffuser"]["notice"]
    assert run.model.gate == {"cd3": ("radial power 0.34",), "ck818": ()}
    assert collection["staindiffuser"]["gate"] == "not passed: CD3 (radial power 0.34)"
    for name, gate in {"cd3": "not passed: CD3 (radial power 0.34)", "ck818": "passed"}.items():
        with tifffile.TiffFile(tmp_path / f"out/{name}.ome.tiff") as tiff:
            about = tiff.ome_metadata or ""
            assert FAKE_CONTRACT.notice in about
            assert FAKE_CONTRACT.model_version in about
            assert f'<M K="gate">{gate}</M>' in about


def position(tensor: str, tiles_BTT3: UInt8Array, origins_B2: NDArray[np.int64]) -> UInt8Array:
    """Each pixel's place in the slide, which only tile and origin together tell."""
    side = tiles_BTT3.shape[1]
    x = origins_B2[:, 0, None, None] + np.arange(side)[None, None, :]
    y = origins_B2[:, 1, None, None] + np.arange(side)[None, :, None]
    value = ((x // 3 + y // 5) % 256).astype(np.uint8)
    return np.broadcast_to(value[..., None], (*value.shape, 3 if tensor.startswith("STAIN") else 1)).copy()


def all_positive(tensor: str, tiles_BTT3: UInt8Array, origins_B2: NDArray[np.int64]) -> UInt8Array:
    """A brown image, and cells everywhere."""
    value, channels = (100, 3) if tensor.startswith("STAIN") else (255, 1)
    return np.full((*tiles_BTT3.shape[:3], channels), value, np.uint8)


@pytest.mark.parametrize(("batch", "in_flight"), [(1, 1), (3, 4), (8, 2)])
def test_origins_fit_the_tiles_in_any_batch(tmp_path: Path, batch: int, in_flight: int) -> None:
    tissue_tile(tmp_path / "t.tif", 1100, 700)
    options = StainingOptions(batch=batch, in_flight=in_flight)
    stainer = FakeStainer(position)
    stain_slide(tmp_path / "t.tif", tmp_path / "out", stainer, options)
    cells = tifffile.imread(tmp_path / "out/ck818.cells.ome.tiff")
    y, x = np.mgrid[:1100, :700]
    np.testing.assert_array_equal(cells, (x // 3 + y // 5) % 256)
    assert max(stainer.batches) <= batch


def test_late_answers_change_nothing(tmp_path: Path) -> None:
    tissue_tile(tmp_path / "t.tif", 900, 900)
    results = []
    for wait in (False, True):
        turn = iter(range(1000))

        def slow(
            tensor: str, tiles: UInt8Array, origins: NDArray[np.int64], *, wait: bool = wait, turn: Any = turn
        ) -> UInt8Array:
            if wait and next(turn) % 3 == 0:
                threading.Event().wait(0.02)
            return identity(tensor, tiles, origins)

        out = tmp_path / f"out{wait}"
        stain_slide(tmp_path / "t.tif", out, FakeStainer(slow), StainingOptions(batch=2, in_flight=5))
        results.append((tifffile.imread(out / "cd3.ome.tiff"), (out / "cells.geojson.gz").read_bytes()))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_a_plain_tile_goes_the_same_way(tmp_path: Path) -> None:
    tile = tissue_tile(tmp_path / "t.tif", 224, 224)
    run = stain_slide(tmp_path / "t.tif", tmp_path / "out", FakeStainer())
    assert names(tmp_path / "out") == FILES
    assert np.abs(tifffile.imread(tmp_path / "out/cd3.ome.tiff").astype(int) - tile).mean() < 2
    assert run.tiles.stained == 4
    assert run.cells["CD3"] > 5


def test_input_is_resampled_to_the_model(real_data: Path, tmp_path: Path) -> None:
    path = real_data / "crops/OS-2-ndpi.ome.tif"
    run = stain_slide(path, tmp_path / "out", FakeStainer(), StainingOptions(stains=("cd3",)))
    assert names(tmp_path / "out") == [
        "cd3.cells.ome.tiff",
        "cd3.ome.tiff",
        "cells.geojson.gz",
        "run.json",
        "scores.csv",
    ]
    assert run.result.resampled is True
    assert run.result.mpp == pytest.approx([0.5, 0.5], rel=0.01)
    with open_slide(path) as slide:
        view = ModelView(slide, slide.pixel_size(), 0.5)
        expected = view.read(0, 0, *view.size)
        opacity = find_tissue(read_overview(slide, slide.pixel_size()), view.mpp).opacity(0, 0, *view.size)
    image = tifffile.imread(tmp_path / "out/cd3.ome.tiff")
    assert image.shape == expected.shape == (1000, 1000, 3)
    shows = np.ones(image.shape[:2], bool) if opacity is None else opacity == 256
    assert np.abs(image.astype(int) - expected)[shows].mean() < 3
    features = json.loads(gzip.decompress((tmp_path / "out/cells.geojson.gz").read_bytes()))["features"]
    corner = np.max([np.max(feature["geometry"]["coordinates"][0]) for feature in features])
    assert 1500 < corner <= 2202, "cells are in the pixels of the input"


def test_no_cells_and_chosen_stains(tmp_path: Path) -> None:
    tissue_tile(tmp_path / "t.tif")
    stain_slide(tmp_path / "t.tif", tmp_path / "out", FakeStainer(), StainingOptions(cells=False, stains=("ck818",)))
    assert names(tmp_path / "out") == ["ck818.ome.tiff", "run.json"]


def test_a_blank_slide_gives_an_empty_result(real_data: Path, tmp_path: Path) -> None:
    stainer = FakeStainer()
    run = stain_slide(
        real_data / "crops/no-tissue.png", tmp_path / "out", stainer, StainingOptions(mpp=1.0, preview=True)
    )
    assert stainer.batches == []
    assert "no tissue" in run.warnings[0] or "no tissue" in run.warnings[1]
    assert (tifffile.imread(tmp_path / "out/cd3.ome.tiff") == 255).all()
    assert (tifffile.imread(tmp_path / "out/cd3.cells.ome.tiff") == 0).all()


def test_margins_other_than_16s_and_larger_tiles(tmp_path: Path) -> None:
    tile = tissue_tile(tmp_path / "t.tif", 700, 900)
    for side, margin in ((512, 40), (256, 24), (64, 8)):
        contract = dataclasses.replace(FAKE_CONTRACT, tile=side, margin=margin)
        out = tmp_path / f"out{side}"
        stain_slide(tmp_path / "t.tif", out, FakeStainer(contract=contract))
        expected = np.where(tile.min(axis=-1) < 100, 255, 0)
        np.testing.assert_array_equal(tifffile.imread(out / "cd3.cells.ome.tiff"), expected)


@pytest.mark.parametrize("after", [0, 1])
def test_a_server_that_is_lost_before_anything_is_saved_leaves_nothing(tmp_path: Path, after: int) -> None:
    tissue_tile(tmp_path / "t.tif", 1200, 1200)
    stainer = FakeStainer(fail_after=after)
    with pytest.raises(ServerLostError):
        stain_slide(tmp_path / "t.tif", tmp_path / "out", stainer, StainingOptions(batch=4))
    assert stainer.cancelled
    assert names(tmp_path) == ["t.tif"]
    assert not [t for t in threading.enumerate() if t.name.startswith(("stain", "write", "code"))]


def test_an_interrupt_before_anything_is_saved_leaves_nothing(tmp_path: Path) -> None:
    tissue_tile(tmp_path / "t.tif", 1200, 1200)

    class Interrupting:
        def say(self, line: str) -> None: ...
        def start(self, name: str, tiles: int) -> None: ...
        def stop(self) -> None: ...
        def advance(self, tiles: int) -> None:
            raise KeyboardInterrupt

    stainer = FakeStainer()
    with pytest.raises(KeyboardInterrupt):
        stain_slide(tmp_path / "t.tif", tmp_path / "out", stainer, StainingOptions(batch=4), Interrupting())
    assert stainer.cancelled
    assert names(tmp_path) == ["t.tif"]


def test_a_damaged_tile_is_found_while_reading_and_leaves_nothing(tmp_path: Path) -> None:
    pixels = tissue_tile(tmp_path / "t.tif", 1200, 1200)
    path = tmp_path / "hurt.tif"
    tifffile.imwrite(
        path, pixels, photometric="rgb", tile=(256, 256), compression="zlib",
        resolution=(20000, 20000), resolutionunit="CENTIMETER",
    )  # fmt: skip
    with tifffile.TiffFile(path) as tiff:
        offset, count = tiff.pages.first.dataoffsets[12], tiff.pages.first.databytecounts[12]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(count))
    with pytest.raises(SlideError, match="tile 12"):
        stain_slide(path, tmp_path / "out", FakeStainer())
    assert names(tmp_path) == ["hurt.tif", "t.tif"]


def test_a_damaged_tile_may_be_left_out(tmp_path: Path) -> None:
    pixels = tissue_tile(tmp_path / "t.tif", 1200, 1200)
    path = tmp_path / "hurt.tif"
    tifffile.imwrite(
        path, pixels, photometric="rgb", tile=(256, 256), compression="zlib",
        resolution=(20000, 20000), resolutionunit="CENTIMETER",
    )  # fmt: skip
    with tifffile.TiffFile(path) as tiff:
        offset, count = tiff.pages.first.dataoffsets[12], tiff.pages.first.databytecounts[12]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(count))
    stainer = FakeStainer(all_positive)
    run = stain_slide(path, tmp_path / "out", stainer, StainingOptions(allow_damaged=True))
    assert run.damaged == (DamagedRegion(level=0, x=512, y=512, width=256, height=256),)
    assert read_run(tmp_path / "out").damaged == run.damaged
    cells = tifffile.imread(tmp_path / "out/cd3.cells.ome.tiff")
    assert (cells[512:768, 512:768] == 0).all()
    assert (tifffile.imread(tmp_path / "out/cd3.ome.tiff")[520:760, 520:760] == 255).all()
    cells[512:768, 512:768] = 255
    assert (cells[:, :500] == 255).all(), "only the damaged tile is left out"


@pytest.mark.parametrize("mpp", [1.03, 50.0])
def test_pixels_too_large_for_the_model_are_refused(tmp_path: Path, mpp: float) -> None:
    tissue_tile(tmp_path / "t.tif")
    stainer = FakeStainer()
    with pytest.raises(PixelSizeError, match=r"needs 0\.5 µm and at most 2 times"):
        stain_slide(tmp_path / "t.tif", tmp_path / "out", stainer, StainingOptions(mpp=mpp, force_mpp=True))
    assert stainer.batches == []
    assert names(tmp_path) == ["t.tif"]


def test_a_given_pixel_size_overrides_the_files_only_by_force(tmp_path: Path) -> None:
    tissue_tile(tmp_path / "t.tif")
    with pytest.raises(PixelSizeError, match="--force-mpp"):
        stain_slide(tmp_path / "t.tif", tmp_path / "out", FakeStainer(), StainingOptions(mpp=0.25))
    run = stain_slide(tmp_path / "t.tif", tmp_path / "out", FakeStainer(), StainingOptions(mpp=0.25, force_mpp=True))
    assert run.input.mpp == (0.25, 0.25)
    assert run.input.mpp_from == "--force-mpp"


def test_the_hash_covers_every_file_of_a_slide(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"1")
    two.write_bytes(b"2")
    assert slide_sha256([one]) == hashlib.sha256(b"1").hexdigest()
    both = slide_sha256([one, two])
    assert both == slide_sha256([two, one])
    two.write_bytes(b"3")
    assert both != slide_sha256([one, two])


def test_a_full_disk_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tissue_tile(tmp_path / "t.tif")

    def full(self: ResultFolder, names: list[str]) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ResultFolder, "publish", full)
        with pytest.raises(OutputError, match="No space left"):
            stain_slide(tmp_path / "t.tif", tmp_path / "out", FakeStainer())
    assert names(tmp_path / "out") == [UNFINISHED]
    stainer = FakeStainer()
    assert stain_slide(tmp_path / "t.tif", tmp_path / "out", stainer).resumed_rows == 1
    assert stainer.batches == []
    assert names(tmp_path / "out") == FILES


def test_without_a_pixel_size_nothing_is_made(real_data: Path, tmp_path: Path) -> None:
    path = real_data / "slides/tcga-cr-7395-01a-01-ts1.svs"
    with pytest.raises(MissingPixelSizeError, match="--mpp"):
        stain_slide(path, tmp_path / "out", FakeStainer())
    assert names(tmp_path) == []


def test_results_are_kept_replaced_or_resumed(tmp_path: Path) -> None:
    tissue_tile(tmp_path / "t.tif")
    first = stain_slide(tmp_path / "t.tif", tmp_path / "out", FakeStainer())
    with pytest.raises(OutputError, match="--overwrite"):
        stain_slide(tmp_path / "t.tif", tmp_path / "out", FakeStainer())
    stainer = FakeStainer()
    assert stain_slide(tmp_path / "t.tif", tmp_path / "out", stainer, StainingOptions(resume=True)) == first
    assert stainer.batches == []
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(OutputError, match="seed 0 → 1"):
        stain_slide(tmp_path / "t.tif", tmp_path / "out", stainer, StainingOptions(resume=True, seed=1))
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before, "--resume removes nothing"
    replaced = stain_slide(
        tmp_path / "t.tif", tmp_path / "out", FakeStainer(), StainingOptions(overwrite=True, stains=("cd3",))
    )
    assert sorted([*replaced.outputs, "run.json"]) == names(tmp_path / "out")


@pytest.mark.parametrize(
    "values",
    [{"seed": -1}, {"seed": 2**63}, {"mpp": 0.0}, {"mpp": float("nan")}, {"batch": 0}, {"in_flight": 0},
     {"overwrite": True, "resume": True}],
)  # fmt: skip
def test_impossible_options_are_refused_by_name(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        StainingOptions(**values)
