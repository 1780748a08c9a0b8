"""``staindiffuser simulate tiles`` and ``slide``."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from typer.testing import CliRunner

from staindiffuser.errors import UsageError
from staindiffuser.imaging.image_files import read_image
from staindiffuser.training.errors import ConfigError
from staindiffuser.training.simulate.cli import app
from staindiffuser.training.simulate.slide import SimulatedSlide
from staindiffuser.training.simulate.tiles import simulate_tile
from staindiffuser.training.tiles.paired_tiles import PairedTiles

runner = CliRunner()


def run(*arguments: object) -> str:
    result = runner.invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_help_shows_examples() -> None:
    for command in ("tiles", "slide"):
        assert "Examples" in run(command, "--help")


def test_tiles(tmp_path: Path) -> None:
    result = json.loads(
        run("tiles", "--output", tmp_path, "--count", 26, "--size", 64, "--seed", 5, "--jobs", 2, "--json")
    )
    assert (result["tiles"], result["written"]) == (26, 26)
    tiles = PairedTiles.load(tmp_path, check="pixels")
    assert tiles.stains == ("cd3", "ck818")
    assert {tile.split for tile in tiles.tiles} == {"train", "val", "test"}
    expected = simulate_tile(5, 11, size=64)
    np.testing.assert_array_equal(read_image(tiles.tiles[11].he), expected.he)
    mask = tiles.tiles[11].masks["ck818"]
    assert mask is not None
    np.testing.assert_array_equal(read_image(mask, mode="L"), expected.masks["ck818"])


def test_tiles_resume_and_grow(tmp_path: Path) -> None:
    base = ("tiles", "--output", tmp_path, "--size", 32, "--jobs", 1, "--stains", "cd3", "--no-masks", "--json")
    run(*base, "--count", 4)
    stamp = (tmp_path / "he/s0-0000002.png").stat().st_mtime_ns
    (tmp_path / "he/s0-0000001.png").unlink()
    result = json.loads(run(*base, "--count", 6))
    assert (result["tiles"], result["written"]) == (6, 3)
    assert (tmp_path / "he/s0-0000002.png").stat().st_mtime_ns == stamp
    assert len(PairedTiles.load(tmp_path).tiles) == 6
    with (tmp_path / "tiles.csv").open() as file:
        assert next(csv.reader(file)) == ["he", "cd3", "slide", "split", "mpp"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--seed", 1), "seed differs"),
        (("--size", 48), "size differs"),
        (("--stains", "cd3"), "stains differs"),
    ],
)
def test_tiles_of_another_simulation_are_not_mixed(tmp_path: Path, arguments: tuple[object, ...], words: str) -> None:
    base = ("tiles", "--output", tmp_path, "--size", 32, "--jobs", 1, "--count", 1)
    run(*base)
    with pytest.raises(UsageError, match=words):
        run(*base, *arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--count", 0), "count"),
        (("--size", 100), "multiple of 16"),
        (("--seed", -1), "seed"),
        (("--stains", "cd20"), "cd3, ck818"),
        (("--val-share", 0.9), "val-share"),
        (("--stains", ","), "at least one stain"),
    ],
)
def test_wrong_usage_of_tiles(tmp_path: Path, arguments: tuple[object, ...], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        run("tiles", "--output", tmp_path / "t", "--count", 1, *arguments)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "t").exists()


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        run("tiles", "--output", tmp_path / "file" / "t", "--count", 1)
    with pytest.raises(UsageError, match="cannot be written"):
        run("slide", "--output", tmp_path / "file" / "s.ome.tiff")


def test_slide(tmp_path: Path) -> None:
    openslide = pytest.importorskip("openslide", reason="needs openslide-python to see what OpenSlide sees")
    file = tmp_path / "s.ome.tiff"
    made = json.loads(run("slide", "-o", file, "--width", 1100, "--height", 700, "--seed", 4, "--ihc", "--json"))[
        "files"
    ]
    assert [Path(name).name for name in made] == ["s.ome.tiff", "s.cd3.ome.tiff", "s.ck818.ome.tiff"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(Path(name).name for name in made)
    slide = SimulatedSlide(4, 1100, 700)
    for name in made:
        with openslide.OpenSlide(name) as opened:
            assert opened.level_dimensions == ((1100, 700), (550, 350), (275, 175))
            assert float(opened.properties["openslide.mpp-x"]) == pytest.approx(0.5)
            image = np.asarray(opened.read_region((0, 0), 0, (1100, 700)).convert("RGB"))
        layer = name.split(".")[-3]
        truth = slide.read_ihc(layer, 0, 0, 1100, 700) if layer in ("cd3", "ck818") else slide.read(0, 0, 1100, 700)
        assert np.abs(image.astype(int) - truth).mean() < 3, "but for JPEG, the file holds what the slide reads"
        with tifffile.TiffFile(name) as tiff:
            assert tiff.is_ome
            assert [level.shape for level in tiff.series[0].levels] == [(700, 1100, 3), (350, 550, 3), (175, 275, 3)]


@pytest.mark.parametrize(
    ("arguments", "words"), [(("-o", "s.png"), "must end in"), (("-o", "s.tiff", "--width", 0), "width")]
)
def test_wrong_usage_of_slide(arguments: tuple[object, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        run("slide", *arguments)
