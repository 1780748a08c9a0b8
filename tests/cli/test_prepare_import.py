"""``staindiffuser prepare import``, as a user types it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from staindiffuser.errors import StainDiffuserError
from staindiffuser.training.prepare.cli_import import EPILOG, LayoutName, import_
from staindiffuser.training.tiles.paired_tiles import PairedTiles

app = typer.Typer(rich_markup_mode="markdown")
app.command("import", epilog=EPILOG)(import_)
runner = CliRunner()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small BCI: eight training pairs, two test pairs."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 2)):
        for i in range(count):
            for side in ("HE", "IHC"):
                path = tmp_path / "BCI_dataset" / side / split / f"{i:05d}_{split}_2+.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(180, 250, (70, 70, 3), dtype=np.uint8)).save(path)
    return tmp_path / "BCI_dataset"


def run(*arguments: object) -> str:
    result = runner.invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_help_shows_every_layout_and_examples() -> None:
    text = run("--help")
    assert "Examples" in text
    for layout in LayoutName:
        assert layout.value in text


def test_import_in_two_processes_and_again(source: Path, tmp_path: Path) -> None:
    arguments = ("--layout", "bci", source, "--output", tmp_path / "tiles", "--tile", 32, "--jobs", 2, "--json")
    result = json.loads(run(*arguments))
    assert (result["pairs"], result["tiles"], result["written"]) == (10, 40, 40)
    assert result["slides"] == {"train": 7, "val": 1, "test": 2}
    assert result["tiles_per_split"] == {"train": 28, "val": 4, "test": 8}
    assert (result["source_mpp"], result["mpp"], result["dry_run"]) == (0.46, 0.5, False)
    tiles = PairedTiles.load(tmp_path / "tiles", check="pixels", mpp=0.5)
    assert [tile.split for tile in tiles.tiles].count("test") == 8
    assert json.loads(run(*arguments))["written"] == 0


def test_the_summary_says_what_to_know(source: Path, tmp_path: Path) -> None:
    text = run("--layout", "bci", source, "-o", tmp_path / "tiles", "--tile", 32, "--jobs", 1)
    assert "10 pairs of her2: 40 tiles" in text
    assert "0.46 → 0.5 µm" in text
    assert "note: 10 of 10 images do not tell which slide" in " ".join(text.split())


def test_dry_run_checks_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    text = run("--layout", "bci", source, "--output", tmp_path / "tiles", "--tile", 32, "--dry-run")
    assert "would be written" in text
    assert not (tmp_path / "tiles").exists()
    (source / "IHC/train/00002_train_2+.png").unlink()
    with pytest.raises(StainDiffuserError, match="no partner"):
        run("--layout", "bci", source, "--output", tmp_path / "tiles", "--tile", 32, "--dry-run")


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--layout", "mist"], 4, "expected TrainValAB"),
        (["--layout", "bci", "--tile", "20"], 2, "multiple of 16"),
        (["--layout", "bci", "--slide-pattern", "("], 2, "regular expression"),
        (["--layout", "bci", "--slide-pattern", "abc"], 2, "group"),
        (["--layout", "bci", "--stain", "HER2/neu"], 2, "cannot name a stain"),
        (["--layout", "bci", "--stain", "er", "--stain", "pr"], 2, "one stain"),
        (["--layout", "bci", "--mpp", "0"], 2, "µm per pixel"),
    ],
)
def test_errors_have_their_exit_code(source: Path, tmp_path: Path, options: list[str], code: int, words: str) -> None:
    with pytest.raises(StainDiffuserError, match=words) as caught:
        run(source, "--output", tmp_path / "t", *options)
    assert caught.value.exit_code == code


def test_nothing_heavy_is_loaded_for_help() -> None:
    program = (
        "import sys; import staindiffuser.training.prepare.cli_import; "
        "assert not {'torch', 'numpy', 'PIL'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
