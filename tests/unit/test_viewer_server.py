"""What the viewer's server answers, over HTTP: images, cells, scores, and what it refuses."""

from __future__ import annotations

import csv
import io
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from staindiffuser.client.run_record import read_run
from staindiffuser.errors import StainDiffuserError
from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.viewer.errors import ResultGoneError
from staindiffuser.viewer.results import Library, find_results
from tests.viewer_results import Viewer, stain, viewing

PNG_OR_JPEG = "image/jpeg"


@pytest.fixture(scope="module")
def folder(viewed: Path) -> Path:
    """A slide and its result."""
    return viewed


@pytest.fixture(scope="module")
def viewer(folder: Path) -> Iterator[Viewer]:
    with viewing(folder / "slide-stained") as running:
        wait_for_cells(running)
        yield running


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A result that a test may spoil."""
    shutil.copytree(folder / "slide-stained", tmp_path / "slide-stained")
    return tmp_path / "slide-stained"


def wait_for_cells(viewer: Viewer, slide: str = "slide") -> dict:
    for _ in range(200):
        about = viewer.get(f"/api/slides/{slide}/cells").json()
        if about["state"] != "reading":
            return about
        time.sleep(0.05)
    raise AssertionError("the cells were not read in ten seconds")


def cells_of(viewer: Viewer) -> list[tuple[int, float, np.ndarray]]:
    """Class, probability and outline [N, 2] of all cells, from the blocks."""
    found = []
    for place in ("0_0", "1_0", "0_1", "1_1"):
        block = viewer.get(f"/slides/slide/cells/outlines/{place}.json").json()
        points = np.array(block["points"], float).reshape(-1, 2) / 10 + (block["x"], block["y"])
        parts = np.split(points, np.cumsum(block["lengths"])[:-1])
        found += list(zip(block["kinds"], block["probabilities"], parts, strict=True))
    return found


def pixels(answer_body: bytes) -> UInt8Array:
    return np.asarray(Image.open(io.BytesIO(answer_body)).convert("RGB"))


def test_the_page_and_the_slide_say_what_the_image_is(viewer: Viewer, folder: Path) -> None:
    page = viewer.get("/")
    assert page.status == 200
    assert b"Synthetic image, research use only" in page.body
    (line,) = viewer.get("/api/slides").json()["slides"]
    assert (line["name"], line["error"]) == ("slide", None)
    about = viewer.get("/api/slides/slide").json()
    run = read_run(folder / "slide-stained")
    assert about["model"]["version"] == run.model.version
    assert about["notice"] == run.model.notice
    assert about["size"] == [1700, 1300]
    assert {one["label"]: one["cells"] for one in about["scores"]} == run.cells
    with (folder / "slide-stained" / "scores.csv").open(encoding="utf-8", newline="") as file:
        for row, one in zip(csv.DictReader(file), about["scores"], strict=True):
            assert float(row["cells_per_mm2"]) == one["cells_per_mm2"]
            assert float(row["positive_share"]) == one["positive_share"]


def test_inner_tiles_are_those_of_the_file_and_edges_are_cut(viewer: Viewer, folder: Path) -> None:
    path = folder / "slide-stained" / "cd3.ome.tiff"
    with tifffile.TiffFile(path) as tiff:
        page = tiff.series[0].levels[0].keyframe
        columns = -(-page.imagewidth // 512)
        stored = path.read_bytes()[page.dataoffsets[columns + 1] :][: page.databytecounts[columns + 1]]
        whole = tiff.series[0].levels[0].asarray()
    answer = viewer.get("/slides/slide/stain/cd3/0/1_1.jpg")
    assert (answer.status, answer.headers["content-type"]) == (200, PNG_OR_JPEG)
    assert answer.body == stored
    corner = pixels(viewer.get("/slides/slide/stain/cd3/0/3_2.jpg").body)
    assert corner.shape == (1300 - 2 * 512, 1700 - 3 * 512, 3)
    assert np.abs(corner.astype(int) - whole[1024:, 1536:]).mean() < 2


def test_every_level_of_the_he_shows_the_slide(viewer: Viewer, folder: Path) -> None:
    with tifffile.TiffFile(folder / "slide.ome.tiff") as tiff:
        slide = tiff.series[0].levels[0].asarray()
    levels = viewer.get("/api/slides/slide").json()["he"]["levels"]
    assert levels == [[1700, 1300], [850, 650], [425, 325]]
    for level, (width, height) in enumerate(levels):
        shown = pixels(viewer.get(f"/slides/slide/he/{level}/0_0.jpg").body).astype(float)
        assert shown.shape[:2] == (min(512, height), min(512, width))
        side = 2**level
        wanted = slide[: shown.shape[0] * side, : shown.shape[1] * side].astype(float)
        wanted = wanted.reshape(shown.shape[0], side, shown.shape[1], side, 3).mean(axis=(1, 3))
        assert abs(shown.mean() - wanted.mean()) < 2
        assert np.corrcoef(shown.ravel(), wanted.ravel())[0, 1] > 0.9


def test_a_slide_without_levels_is_shown_whole(folder: Path, tmp_path: Path) -> None:
    """Coarse tiles are made of the tiles below where the slide has no small level."""
    from staindiffuser.imaging.slides import open_slide
    from staindiffuser.viewer import pyramids

    flat = np.full((2100, 2300, 3), 200, np.uint8)
    flat[:1050, :1150] = 40
    tifffile.imwrite(tmp_path / "flat.tif", flat, tile=(256, 256), photometric="rgb")
    image = pyramids.SlidePyramid(open_slide(tmp_path / "flat.tif"), pyramids.TileCache(10**7), "flat")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pyramids, "MAX_READ", 600**2)
        small = image.pixels(len(image.levels) - 1, 0, 0)
    assert small.shape == (263, 288, 3)
    assert small[:120, :130].mean() == pytest.approx(40, abs=2)
    assert small[150:250, 160:270].mean() == pytest.approx(200, abs=2)


def test_fluorescence_is_bright_where_the_stain_is_brown(viewer: Viewer) -> None:
    image = pixels(viewer.get("/slides/slide/stain/cd3/0/0_1.jpg").body).astype(int)
    brown = (image[..., 0] - image[..., 2]) > 50
    lit = pixels(viewer.get("/slides/slide/fluorescence/cd3/0/0_1.jpg").body).astype(int)
    assert brown.sum() > 1000
    assert lit[brown][:, 1].mean() > 100
    assert lit[~brown][:, 1].mean() < 20
    nuclei = pixels(viewer.get("/slides/slide/fluorescence/nuclei/0/0_1.jpg").body).astype(int)
    assert nuclei[..., 2].max() > 60
    all_ = pixels(viewer.get("/slides/slide/fluorescence/nuclei~cd3~ck818/0/0_1.jpg").body).astype(int)
    assert np.abs(all_ - np.minimum(lit + nuclei, 255)).mean() < 3  # at x < 512 no CK8/18; light adds up
    assert viewer.get("/slides/slide/fluorescence/nuclei~none/0/0_1.jpg").status == 404


def test_of_several_stains_the_darkest_pixel_is_shown(viewer: Viewer) -> None:
    place = "1/0_0.jpg"
    cd3, ck = (pixels(viewer.get(f"/slides/slide/stain/{name}/{place}").body).astype(int) for name in ("cd3", "ck818"))
    both = pixels(viewer.get(f"/slides/slide/stain/cd3~ck818/{place}").body).astype(int)
    assert np.abs(both - np.minimum(cd3, ck)).mean() < 2
    assert (np.abs(both - cd3).max(axis=-1) > 30).sum() > 500  # brown of CK8/18 that CD3 lacks


def test_cells_come_by_block_and_as_counts(viewer: Viewer, folder: Path) -> None:
    run = read_run(folder / "slide-stained")
    about = wait_for_cells(viewer)
    assert {one["name"]: one["count"] for one in about["classes"]} == run.cells
    found = cells_of(viewer)
    assert len(found) == sum(run.cells.values())
    for kind, probability, outline in found:
        assert 0 <= kind < len(about["classes"])
        assert 0 < probability <= 1
        assert len(outline) > 3
        assert (outline.min(axis=0) >= 0).all()
        assert (outline.max(axis=0) <= (1700, 1300)).all()
    for threshold, expected in ((0.0, len(found)), (0.75, sum(cell[1] >= 0.75 for cell in found))):
        bins = viewer.get(f"/slides/slide/cells/1/0_0.json?threshold={threshold}").json()["bins"]
        assert sum(sum(values[1::2]) for values in bins.values()) == expected
    assert viewer.get("/slides/slide/cells/outlines/7_7.json").json()["kinds"] == []


def test_the_whole_slide_as_a_region_has_the_scores_of_the_run(viewer: Viewer, folder: Path) -> None:
    run = read_run(folder / "slide-stained")
    everything = [[0, 0], [1700, 0], [1700, 1300], [0, 1300]]
    scores = viewer.post("/api/slides/slide/region", {"polygon": everything, "threshold": 0}).json()
    assert {one["label"]: one["cells"] for one in scores["stains"]} == run.cells
    assert scores["area_mm2"] == pytest.approx(1.7 * 1.3 / 4)
    assert run.scores is not None
    for found, known in zip(scores["stains"], run.scores.stains, strict=True):
        assert found["positive_area_share"] * scores["area_mm2"] == pytest.approx(known.positive_area_mm2, rel=1e-4)
    left, _ = scores["stains"]
    assert left["cells_per_mm2"] == pytest.approx(left["cells"] / scores["area_mm2"])
    half = viewer.post("/api/slides/slide/region", {"polygon": [[0, 0], [800, 0], [800, 1300], [0, 1300]]}).json()
    assert half["stains"][0]["cells"] > 50
    assert half["stains"][1]["cells"] == 0
    assert half["stains"][0]["positive_area_share"] > 0.01
    assert half["stains"][1]["positive_area_share"] == 0


def test_a_polygon_counts_what_lies_in_it_and_the_threshold_leaves_out(viewer: Viewer) -> None:
    triangle = [[100, 100], [1600, 650], [100, 1200]]
    expected = {0.0: 0, 0.75: 0}
    for _, probability, points in cells_of(viewer):
        x, y = (points.min(axis=0) + points.max(axis=0)) / 2
        inside = x >= 100 and abs(y - 650) < 550 * (1600 - x) / 1500
        for threshold in expected:
            expected[threshold] += inside and probability >= threshold
    for threshold, number in expected.items():
        scores = viewer.post("/api/slides/slide/region", {"polygon": triangle, "threshold": threshold}).json()
        assert sum(one["cells"] for one in scores["stains"]) == pytest.approx(number, abs=4)
    assert 0 < expected[0.75] < expected[0.0]


def test_a_result_that_vanishes_is_answered_cleanly(copied: Path) -> None:
    with viewing(copied) as viewer:
        assert viewer.get("/slides/slide/stain/cd3/0/0_0.jpg").status == 200
        shutil.rmtree(copied)
        for path in ("/api/slides/slide", "/slides/slide/stain/cd3/0/0_0.jpg", "/slides/slide/thumbnail.jpg"):
            answer = viewer.get(path)
            assert answer.status == 410
            assert "is gone" in answer.json()["error"]
        (line,) = viewer.get("/api/slides").json()["slides"]
        assert "does not exist" in line["error"]


def test_a_file_that_is_missing_or_damaged_is_answered_cleanly(copied: Path) -> None:
    (copied / "cd3.ome.tiff").write_bytes(b"II*\0" + bytes(100))
    (copied / "cells.geojson.gz").write_bytes((copied / "cells.geojson.gz").read_bytes()[:400])
    with viewing(copied) as viewer:
        answer = viewer.get("/api/slides/slide")
        assert answer.status == 410
        assert "cd3.ome.tiff" in answer.json()["error"]


def test_damaged_cells_leave_the_images_alone(copied: Path) -> None:
    path = copied / "cells.geojson.gz"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with viewing(copied) as viewer:
        about = wait_for_cells(viewer)
        assert about["state"] == "none"
        assert "cells.geojson.gz cannot be read" in about["problem"]
        assert viewer.get("/slides/slide/cells/outlines/0_0.json").status == 404
        scores = viewer.post("/api/slides/slide/region", {"polygon": [[0, 0], [900, 0], [900, 900]]}).json()
        assert scores["stains"][0]["cells"] is None
        assert scores["stains"][0]["positive_area_share"] > 0


def test_a_replaced_result_is_opened_anew(copied: Path) -> None:
    with viewing(copied) as viewer:
        before = viewer.get("/api/slides/slide").json()["version"]
        record = json.loads((copied / "run.json").read_text(encoding="utf-8"))
        record["seed"] = 7
        (copied / "run.json").write_text(json.dumps(record), encoding="utf-8")
        after = viewer.get("/api/slides/slide").json()
        assert after["version"] != before
        assert after["provenance"]["Seed"] == 7


def test_the_he_is_found_where_it_lies_now_and_never_another(copied: Path, folder: Path, tmp_path: Path) -> None:
    record = json.loads((copied / "run.json").read_text(encoding="utf-8"))
    record["input"]["path"] = "/nowhere/slide.ome.tiff"
    (copied / "run.json").write_text(json.dumps(record), encoding="utf-8")
    scans = tmp_path / "scans" / "deep"
    scans.mkdir(parents=True)
    with viewing(copied, slides=(tmp_path / "scans",)) as viewer:
        about = viewer.get("/api/slides/slide").json()
        assert about["he"] is None
        assert "--slides" in about["he_problem"]
        assert viewer.get("/slides/slide/he/0/0_0.jpg").status == 404
        assert viewer.get("/slides/slide/thumbnail.jpg").status == 200
    shutil.copy(folder / "slide.ome.tiff", scans / "renamed.tiff")
    with viewing(copied, slides=(tmp_path / "scans",)) as viewer:
        assert viewer.get("/slides/slide/he/0/0_0.jpg").status == 200
    content = bytearray((scans / "renamed.tiff").read_bytes())
    content[-1] ^= 1
    (scans / "renamed.tiff").write_bytes(content)
    with viewing(copied, slides=(tmp_path / "scans",)) as viewer:
        assert viewer.get("/api/slides/slide").json()["he"] is None


def test_a_batch_lists_its_slides_and_its_failures(folder: Path, tmp_path: Path) -> None:
    for name in ("b-stained", "a-stained"):
        shutil.copytree(folder / "slide-stained", tmp_path / name)
    (tmp_path / "broken-stained").mkdir()
    (tmp_path / "broken-stained" / "run.json").write_text("{", encoding="utf-8")
    (tmp_path / "summary.csv").write_text(
        f"slide,output,status,exit_code,error\nc.svs,{tmp_path / 'c-stained'},failed,4,c.svs is damaged\n",
        encoding="utf-8",
    )
    entries = find_results([tmp_path])
    assert [(entry.name, entry.error is None) for entry in entries] == [
        ("a", True), ("b", True), ("broken", False), ("c", False),
    ]  # fmt: skip
    assert entries[3].error == "c.svs is damaged"
    with viewing(tmp_path) as viewer:
        assert viewer.get("/api/slides/c").status == 410
        assert viewer.get("/api/slides/c").json()["error"] == "c.svs is damaged"


def test_the_same_name_twice_has_two_addresses(folder: Path, tmp_path: Path) -> None:
    for place in ("one", "two"):
        shutil.copytree(folder / "slide-stained", tmp_path / place / "slide-stained")
    first, second = find_results([tmp_path / "one", tmp_path / "two"])
    assert first.name == "slide"
    assert second.name.startswith("slide-")


@pytest.mark.parametrize("kind", ["missing", "empty", "a file"])
def test_what_holds_no_result_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "place"
    if kind == "empty":
        path.mkdir()
    elif kind == "a file":
        path.touch()
    with pytest.raises(ResultGoneError, match="staindiffuser stain"):
        find_results([path])


def test_many_results_do_not_keep_files_open(folder: Path, tmp_path: Path) -> None:
    for number in range(20):
        shutil.copytree(folder / "slide-stained", tmp_path / f"s{number}-stained")
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("this system does not list open files")
    with viewing(tmp_path) as viewer:
        for number in range(20):
            assert viewer.get(f"/slides/s{number}/thumbnail.jpg").status == 200
        opened = [link.resolve() for link in Path("/proc/self/fd").iterdir()]
        assert 0 < sum(path.is_relative_to(tmp_path) for path in opened) <= 12 * 4


def write_real_stain(path: Path, shift: int = 0, size: tuple[int, int] = (850, 650)) -> None:
    """White but for a brown square from (200, 200) to (600, 600) µm × 2, at half the slide's resolution."""
    image = np.full((size[1], size[0], 3), 238, np.uint8)
    image[100:300, 100 + shift : 300 + shift] = (120, 72, 40)
    tifffile.imwrite(path, image, photometric="rgb", tile=(256, 256), metadata=None)


def test_a_real_stain_is_shown_beside_and_compared(folder: Path, tmp_path: Path) -> None:
    write_real_stain(tmp_path / "real.tif")
    with viewing(folder / "slide-stained", truth=(f"CD3={tmp_path / 'real.tif'}",)) as viewer:
        (reference,) = viewer.get("/api/slides/slide").json()["references"]
        assert (reference["label"], reference["stains"]) == ("real", ["cd3"])
        name = reference["name"]
        shown = pixels(viewer.get(f"/slides/slide/reference/{name}/cd3/0/0_0.jpg").body).astype(int)
        assert np.abs(shown[250:500, 250:500] - (120, 72, 40)).max() < 12
        assert shown[:150].min() > 225
        virtual = pixels(viewer.get("/slides/slide/stain/cd3/0/0_0.jpg").body).astype(int)
        brown = (virtual[..., 0] - virtual[..., 2]) > 60
        change = pixels(viewer.get(f"/slides/slide/difference/{name}/cd3/0/0_0.jpg").body).astype(int)
        square = np.zeros((512, 512), bool)
        square[220:, 220:] = True
        outside = brown.copy()
        outside[180:, 180:] = False
        assert (change[square & ~brown][:, 2] > change[square & ~brown][:, 0] + 60).mean() > 0.6  # only there: blue
        assert (change[outside][:, 0] > change[outside][:, 2] + 60).mean() > 0.6  # only here: red
        inside = {"polygon": [[210, 210], [590, 210], [590, 590], [210, 590]], "reference": name}
        cd3, ck818 = viewer.post("/api/slides/slide/region", inside).json()["stains"]
        assert ck818["agreement"] is None
        found = cd3["agreement"]
        assert found["other_share"] == pytest.approx(1)
        assert found["dice"] == pytest.approx(2 * found["virtual_share"] / (1 + found["virtual_share"]), abs=1e-6)
        assert viewer.get(f"/slides/slide/reference/{name}/ck818/0/0_0.jpg").status == 404
        assert viewer.get("/slides/slide/difference/nothing/cd3/0/0_0.jpg").status == 404
        assert viewer.post("/api/slides/slide/region", {**inside, "reference": "nothing"}).status == 400


@pytest.mark.parametrize(
    ("truth", "words"),
    [
        (("REAL",), "say of which stain"),
        (("cd3=",), "say of which stain"),
        (("her2=REAL",), "cd3, ck818"),
        (("cd3=REAL", "CD3=REAL"), "twice"),
        (("cd3=WRONG",), "register it"),
        (("cd3=nowhere.tif",), "does not exist"),
    ],
)
def test_a_real_stain_that_does_not_fit_is_refused(
    folder: Path, tmp_path: Path, truth: tuple[str, ...], words: str
) -> None:
    write_real_stain(tmp_path / "real.tif")
    write_real_stain(tmp_path / "wrong.tif", size=(850, 600))
    given = [
        one.replace("REAL", str(tmp_path / "real.tif")).replace("WRONG", str(tmp_path / "wrong.tif")) for one in truth
    ]
    library = Library(find_results([folder / "slide-stained"]), (), given)
    with pytest.raises(StainDiffuserError, match=words):
        library.open("slide")


def test_two_results_of_one_slide_are_compared(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "slide-stained", tmp_path / "one-stained")
    stain(folder / "slide.ome.tiff", tmp_path / "two-stained", model_version="e" * 64)
    with viewing(tmp_path) as viewer:
        (reference,) = viewer.get("/api/slides/one").json()["references"]
        assert reference["name"] == "two"
        assert "eeeeee" in reference["label"]
        same = viewer.get("/slides/one/reference/two/cd3/0/1_1.jpg").body
        assert same == viewer.get("/slides/two/stain/cd3/0/1_1.jpg").body
        everything = {"polygon": [[0, 0], [1700, 0], [1700, 1300], [0, 1300]], "reference": "two"}
        for one in viewer.post("/api/slides/one/region", everything).json()["stains"]:
            assert one["agreement"]["dice"] == 1
            assert one["agreement"]["correlation"] == pytest.approx(1)
        change = pixels(viewer.get("/slides/one/difference/two/cd3/1/0_0.jpg").body)
        assert change.min() > 245
