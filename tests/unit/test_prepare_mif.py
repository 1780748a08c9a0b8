"""Paired tiles from H&E and fluorescence, on simulated tissue whose fluorescence is made from its own IHC."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from typer.testing import CliRunner

from staindiffuser.cli import app
from staindiffuser.errors import UsageError
from staindiffuser.imaging.arrays import FloatArray
from staindiffuser.imaging.image_files import read_image, write_png
from staindiffuser.imaging.nuclei import find_nuclei, label_means
from staindiffuser.imaging.optical_density import dab_density, dab_mask, he_densities
from staindiffuser.training.errors import ConfigError, DataError
from staindiffuser.training.prepare.mif.alignment import align, shifted
from staindiffuser.training.prepare.mif.cells import cell_mask
from staindiffuser.training.prepare.mif.markers import Floor, MarkerHistogram
from staindiffuser.training.prepare.mif.request import MifRequest
from staindiffuser.training.prepare.mif.run import prepare_mif
from staindiffuser.training.prepare.mif.slides import ChannelSlide
from staindiffuser.training.simulate.tiles import SimulatedTile, simulate_tile
from staindiffuser.training.tiles.paired_tiles import PairedTiles

CHANNELS = ("DAPI", "CD3", "PanCK")
MARKERS = {"cd3": "CD3", "ck818": "PanCK"}
MPP = 0.5


@pytest.fixture(scope="module")
def tissue() -> list[SimulatedTile]:
    return [simulate_tile(5, index, size=256, stains=("cd3", "ck818")) for index in range(8)]


def fluorescence(tile: SimulatedTile) -> NDArray[np.uint8]:
    """DAPI from hematoxylin, each marker from its DAB: uint8 [H, W, 3]."""
    nuclei = np.maximum(he_densities(tile.he)[..., 0] - 0.2, 0) * 120
    markers = [np.maximum(dab_density(tile.stains[stain]) - 0.1, 0) * 100 for stain in MARKERS]
    return np.clip(np.rint(np.stack([nuclei, *markers], axis=-1)), 0, 255).astype(np.uint8)


def write_tiles(folder: Path, tissue: list[SimulatedTile]) -> tuple[Path, Path]:
    for index, tile in enumerate(tissue):
        write_png(folder / "he" / f"r{index // 4}_{index}.png", tile.he)
        write_png(folder / "mif" / f"r{index // 4}_{index}.png", fluorescence(tile))
    return folder / "he", folder / "mif"


def request_for(he: Path, mif: Path, output: Path, **options: object) -> MifRequest:
    common = {"markers": MARKERS, "nuclei": "DAPI", "channels": CHANNELS, "he_mpp": MPP, "least_correlation": 0.5}
    given = {**common, "region_pattern": re.compile(r"^(r[0-9])_"), **options}
    return MifRequest(he=he, mif=mif, output=output, **given)  # type: ignore[arg-type]


def dice(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return float(2 * (a & b).sum() / max(1, a.sum() + b.sum()))


def test_tiles_carry_the_stain_that_the_fluorescence_showed(tissue: list[SimulatedTile], tmp_path: Path) -> None:
    he, mif = write_tiles(tmp_path, tissue)
    result = prepare_mif(request_for(he, mif, tmp_path / "tiles"))
    assert result.kept >= 6
    assert result.written == result.kept
    tiles = PairedTiles.load(tmp_path / "tiles", check="pixels")
    assert tiles.stains == ("cd3", "ck818")
    drawn, real, masks, coarse = [], [], [], []
    for row in tiles.tiles:
        truth = tissue[int(row.he.stem.split("_")[1])]
        drawn.append(dab_mask(read_image(row.image("ck818"))))
        real.append(dab_mask(truth.stains["ck818"]))
        mask = row.masks["ck818"]
        assert mask is not None
        masks.append(read_image(mask, mode="L") >= 128)
        coarse.append(truth.masks["ck818"] >= 128)
    assert dice(np.stack(drawn), np.stack(real)) > 0.85
    assert dice(np.stack(masks), np.stack(coarse)) > 0.85


def test_a_region_is_in_one_split_and_the_chosen_one(tissue: list[SimulatedTile], tmp_path: Path) -> None:
    he, mif = write_tiles(tmp_path, tissue)
    (tmp_path / "splits.csv").write_text("region,split\nr0,test\nr1,train\n", encoding="utf-8")
    prepare_mif(request_for(he, mif, tmp_path / "tiles", splits=tmp_path / "splits.csv"))
    tiles = PairedTiles.load(tmp_path / "tiles").tiles
    assert {(tile.slide, tile.split) for tile in tiles} == {("r0", "test"), ("r1", "train")}
    (tmp_path / "splits.csv").write_text("region,split\nr0,test\n", encoding="utf-8")
    with pytest.raises(DataError, match="no row for the region r1"):
        prepare_mif(request_for(he, mif, tmp_path / "other", splits=tmp_path / "splits.csv"))


def test_a_second_run_writes_nothing_new_and_other_settings_are_refused(
    tissue: list[SimulatedTile], tmp_path: Path
) -> None:
    he, mif = write_tiles(tmp_path, tissue[:4])
    first = prepare_mif(request_for(he, mif, tmp_path / "tiles"))
    again = prepare_mif(request_for(he, mif, tmp_path / "tiles"))
    assert (again.kept, again.written) == (first.kept, 0)
    with pytest.raises(UsageError, match="floor differs"):
        prepare_mif(request_for(he, mif, tmp_path / "tiles", floor=Floor(removed=5.0, kept=9.0)))


def test_a_stretch_is_undone(tissue: list[SimulatedTile], tmp_path: Path) -> None:
    he, mif = write_tiles(tmp_path, tissue[:4])
    prepare_mif(request_for(he, mif, tmp_path / "plain"))
    gains = ["name,gain_dapi,gain_cd3,gain_panck"]
    for index, path in enumerate(sorted(mif.iterdir())):
        channels = read_image(path).copy()
        stretch = np.array([2, 3, 1]) if index % 2 else np.array([1, 1, 2])
        stretch = np.where(channels.reshape(-1, 3).max(axis=0) * stretch <= 255, stretch, 1)
        write_png(path, (channels * stretch).astype(np.uint8))
        gains.append(f"{path.stem},{','.join(str(float(value)) for value in stretch)}")
    (tmp_path / "gains.csv").write_text("\n".join(gains) + "\n", encoding="utf-8")
    prepare_mif(request_for(he, mif, tmp_path / "restored", gains=tmp_path / "gains.csv"))
    for path in sorted((tmp_path / "plain").rglob("*.png")):
        other = tmp_path / "restored" / path.relative_to(tmp_path / "plain")
        np.testing.assert_array_equal(read_image(path), read_image(other))


def test_a_small_shift_is_corrected_and_other_tissue_is_dropped(tissue: list[SimulatedTile], tmp_path: Path) -> None:
    he, mif = write_tiles(tmp_path, tissue[:3])
    files = sorted(mif.iterdir())
    write_png(files[0], np.roll(read_image(files[0]), (3, -2), axis=(0, 1)))
    write_png(files[1], np.ascontiguousarray(read_image(files[1])[::-1]))
    result = prepare_mif(request_for(he, mif, tmp_path / "tiles"))
    report = json.loads((tmp_path / "tiles" / "mif" / "mif.json").read_text(encoding="utf-8"))
    assert report["per_field"]["r0_0"]["shift"] == [2, -3]
    assert not report["per_field"]["r0_1"]["kept"]
    assert result.misaligned == 1
    assert result.moved == 1


def test_registered_slides_give_the_tiles_of_their_grid(tissue: list[SimulatedTile], tmp_path: Path) -> None:
    he = np.concatenate([np.concatenate([t.he for t in tissue[i : i + 2]], axis=1) for i in (0, 2)])
    channels = [np.concatenate([fluorescence(t) for t in tissue[i : i + 2]], axis=1) for i in (0, 2)]
    mif = np.moveaxis(np.concatenate(channels), -1, 0).astype(np.uint16)
    write_png(tmp_path / "case.png", he)
    tifffile.imwrite(
        tmp_path / "case.ome.tiff",
        mif,
        ome=True,
        tile=(128, 128),
        compression="zlib",
        metadata={
            "axes": "CYX",
            "Channel": {"Name": list(CHANNELS)},
            "PhysicalSizeX": MPP,
            "PhysicalSizeXUnit": "µm",
            "PhysicalSizeY": MPP,
            "PhysicalSizeYUnit": "µm",
        },
    )
    options = ["--he", str(tmp_path / "case.png"), "--mif", str(tmp_path / "case.ome.tiff"), "--he-mpp", str(MPP)]
    options += ["--markers", "cd3=CD3,ck818=PanCK", "--nuclei", "DAPI", "--least-correlation", "0.5"]
    options += ["--output", str(tmp_path / "tiles"), "--json"]
    done = CliRunner().invoke(app, ["prepare", "mif", *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["kept"] >= 3
    for row in PairedTiles.load(tmp_path / "tiles", check="pixels").tiles:
        line, column = (int(part) for part in row.he.stem.split("-")[1:])
        truth = tissue[2 * line + column]
        np.testing.assert_array_equal(read_image(row.he), truth.he)
        if dab_mask(truth.stains["ck818"]).mean() > 0.02:
            assert dice(dab_mask(read_image(row.image("ck818"))), dab_mask(truth.stains["ck818"])) > 0.8


def test_a_channel_slide_is_read_by_position(tmp_path: Path) -> None:
    data = np.arange(2 * 96 * 128, dtype=np.uint16).reshape(2, 96, 128)
    tifffile.imwrite(tmp_path / "x.tif", data, tile=(32, 32), photometric="minisblack", metadata={"axes": "CYX"})
    slide = ChannelSlide(tmp_path / "x.tif", mpp=1.0)
    try:
        assert slide.channels == ("0", "1")
        np.testing.assert_array_equal(slide.read((30, 20), (50, 40), 1.0, [1])[..., 0], data[1, 20:60, 30:80])
        edge = slide.read((-10, 90), (20, 10), 1.0, [0])[..., 0]
        assert not edge[:, :10].any()
        assert not edge[6:].any()
        np.testing.assert_array_equal(edge[:6, 10:], data[0, 90:, :10])
        halved = slide.read((0, 0), (64, 48), 2.0, [0])[..., 0]
        np.testing.assert_allclose(halved, data[0].reshape(48, 2, 64, 2).mean(axis=(1, 3)))
    finally:
        slide.close()
    with pytest.raises(DataError, match="--mif-mpp"):
        ChannelSlide(tmp_path / "x.tif")


def test_mistakes_are_named(tissue: list[SimulatedTile], tmp_path: Path) -> None:
    he, mif = write_tiles(tmp_path, tissue[:2])
    with pytest.raises(DataError, match="no channel 'CD20'"):
        prepare_mif(request_for(he, mif, tmp_path / "t", markers={"cd20": "CD20"}))
    with pytest.raises(DataError, match="names 2 channels"):
        prepare_mif(request_for(he, mif, tmp_path / "t", channels=("DAPI", "CD3"), markers={"cd3": "CD3"}))
    with pytest.raises(DataError, match="two folders of tiles, or two slides"):
        prepare_mif(request_for(he, sorted(mif.iterdir())[0], tmp_path / "t"))
    with pytest.raises(ConfigError, match="cannot name a stain"):
        request_for(he, mif, tmp_path / "t", markers={"CD3": "CD3"})
    sorted(mif.iterdir())[0].unlink()
    with pytest.raises(DataError, match="has no partner"):
        prepare_mif(request_for(he, mif, tmp_path / "t"))
    assert not (tmp_path / "t").exists()


def test_threshold_is_a_quarter_of_the_regions_bright_level_but_not_below_the_floor() -> None:
    rng = np.random.default_rng(0)

    def rule(bright: float, share: float, background: float) -> tuple[float, float, bool, bool]:
        values = np.full((200, 200), background, np.float32)
        values.flat[: int(share * values.size)] = bright * rng.uniform(0.98, 1.0, int(share * values.size))
        histogram = MarkerHistogram()
        histogram.add(values)
        found = histogram.rule()
        return found.removed, found.kept, found.weak, found.faint

    removed, kept, weak, faint = rule(160, 0.2, 0)
    assert removed == pytest.approx(40, rel=0.02)
    assert kept == removed
    assert not weak
    assert not faint
    assert rule(40, 0.2, 0) == (12.0, 28.0, False, True)
    assert not rule(44, 0.2, 0)[3]
    assert rule(160, 0.2, 6)[1] == pytest.approx(40, rel=0.02)
    assert not rule(40, 0.2, 6)[3]  # nothing was removed with a background that is still there
    assert rule(160, 0.0, 0) == (12.0, 28.0, True, False)  # no marker: noise is not called positive


def test_training_tiles_go_without_a_faint_marker(tissue: list[SimulatedTile], tmp_path: Path) -> None:
    """Of a tumour that was removed with the background they would say that it is none; a test keeps its tiles."""
    he, mif = write_tiles(tmp_path, tissue)
    for path in mif.glob("r1_*.png"):
        values = read_image(path).astype(np.float32)
        values[..., 2] = np.where(values[..., 2] * 0.4 < 8, 0, values[..., 2] * 0.4)
        write_png(path, np.rint(values).astype(np.uint8))
    for split in ("train", "test"):
        splits = tmp_path / f"{split}.csv"
        splits.write_text(f"region,split\nr0,val\nr1,{split}\n")
        result = prepare_mif(request_for(he, mif, tmp_path / split, splits=splits))
        assert result.regions["r1"].markers["ck818"].faint
        assert not result.regions["r0"].markers["ck818"].faint
        assert not result.regions["r1"].markers["cd3"].faint
        rows = PairedTiles.load(tmp_path / split, check="pixels").split(split)
        assert rows
        for row in rows:
            told = [row.stains["ck818"], row.masks["ck818"]]
            assert told == [None, None] if split == "train" else None not in told
            assert row.stains["cd3"] is not None
    assert not list((tmp_path / "train" / "ck818").glob("r1_*"))
    splits = tmp_path / "train.csv"
    alone = prepare_mif(request_for(he, mif, tmp_path / "alone", splits=splits, markers={"ck818": "PanCK"}))
    assert (alone.kept, alone.untold, alone.misaligned) == (4, 4, 0)
    assert {row.slide for row in PairedTiles.load(tmp_path / "alone").tiles} == {"r0"}
    for path in [*he.glob("r0_*.png"), *mif.glob("r0_*.png")]:
        path.unlink()
    with pytest.raises(DataError, match="PanCK was removed with the background"):
        prepare_mif(request_for(he, mif, tmp_path / "none", splits=splits, markers={"ck818": "PanCK"}))


def test_a_stained_ring_makes_the_whole_cell_positive() -> None:
    y, x = np.mgrid[:64, :96]
    dapi: FloatArray = np.zeros((64, 96), np.float32)
    for centre in (24, 72):
        dapi += 50 * np.exp(-0.5 * (np.hypot(y - 32, x - centre) / 4.5) ** 4).astype(np.float32)
    nuclei = find_nuclei(dapi, 0.5, bright=50.0)
    assert nuclei.max() == 2
    radius = np.hypot(y - 32, x - 24)
    ring = (radius > 4.5) & (radius < 9)
    mask = cell_mask(nuclei, ring, 0.5)
    assert mask[32, 24] == 255
    assert mask[32, 72] == 0
    np.testing.assert_allclose(np.sort(label_means(nuclei, mask >= 128)), [0, 1], atol=0.05)
    unsure = cell_mask(nuclei, ring & (x < 22), 0.5)[32, 24]
    assert 25 < unsure < 230  # part of a ring teaches nothing


def test_crowded_cells_of_stained_epithelium_are_positive_by_their_cytoplasm() -> None:
    """Nuclei that almost touch, as at the base of a gland: most of each cell is nucleus, and that is never stained."""
    y, x = np.mgrid[:96, :192]
    nuclei = np.zeros((96, 192), np.int32)
    for number, (row, column) in enumerate([(r, c) for r in range(8, 96, 16) for c in range(8, 192, 16)], start=1):
        nuclei[np.hypot(y - row, x - column) < 7.2] = number
    stained = (x < 96) & (nuclei == 0)
    inside = [number for number in np.unique(nuclei[24:72, 24:72]) if number]
    outside = [number for number in np.unique(nuclei[24:72, 120:168]) if number]
    by_area = label_means(nuclei, cell_mask(nuclei, stained, 0.5) >= 230)
    mask = cell_mask(nuclei, stained, 0.5, cytoplasmic=True)
    found = label_means(nuclei, mask >= 230)
    assert all(by_area[number - 1] < 0.1 for number in inside)
    assert all(found[number - 1] > 0.95 for number in inside)
    assert all(label_means(nuclei, mask <= 25)[number - 1] == 1 for number in outside)


def test_a_nucleus_without_cytoplasm_of_its_own_is_judged_by_its_neighbourhood() -> None:
    y, x = np.mgrid[:64, :128]
    nuclei = np.zeros((64, 128), np.int32)
    for number, centre in enumerate((32, 96)):
        distance = np.hypot(y - 32, x - centre)
        nuclei[distance < 16] = 2 * number + 1  # a nucleus that surrounds another
        nuclei[distance < 6] = 2 * number + 2
    mask = cell_mask(nuclei, (x < 64) & (nuclei == 0), 0.5, cytoplasmic=True)
    assert mask[32, 32] >= 128 > mask[32, 96]


def test_keratins_are_of_the_cytoplasm_unless_told_otherwise(tissue: list[SimulatedTile], tmp_path: Path) -> None:
    he, mif = write_tiles(tmp_path, tissue)
    for name, given, expected in (("by-name", None, ["ck818"]), ("none", (), []), ("given", ("cd3",), ["cd3"])):
        prepare_mif(request_for(he, mif, tmp_path / name, cytoplasmic=given))
        assert json.loads((tmp_path / name / "mif.json").read_text(encoding="utf-8"))["cytoplasmic"] == expected
    masks = [sorted((tmp_path / name / "ck818_mask").iterdir()) for name in ("by-name", "none")]
    assert any(a.read_bytes() != b.read_bytes() for a, b in zip(*masks, strict=True))
    with pytest.raises(ConfigError, match="cytoplasmic: ck7 is none of the stains"):
        request_for(he, mif, tmp_path / "other", cytoplasmic=("ck7",))


def test_fluorescence_is_moved_to_where_it_fits() -> None:
    rng = np.random.default_rng(3)
    fixed = rng.random((128, 128), dtype=np.float32)
    moving = np.roll(fixed, (5, -4), axis=(0, 1))
    found = align(fixed, moving, 0.5)
    assert found.shift == (4, -5)
    assert found.correlation > 0.95
    inside = np.s_[16:-16, 16:-16]
    np.testing.assert_array_equal(shifted(moving[..., None], found.shift)[inside][..., 0], fixed[inside])
    assert align(fixed, np.zeros_like(fixed), 0.5).correlation == 0.0
