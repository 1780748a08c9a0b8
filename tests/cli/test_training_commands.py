"""Tiles → train → graphs → repository, as a user types it, on the debug preset."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from PIL import Image

from staindiffuser.cli import main
from tests.conftest import ROOT


def staindiffuser(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command line in its own process."""
    program = "from staindiffuser.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, timeout=240, check=False
    )


@pytest.fixture(scope="module")
def run_folder(tiles_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a few steps."""
    folder = tmp_path_factory.mktemp("run")
    options = ["--preset", "debug", "--steps", "4", "--crop", "32", "--no-progress", "--trained-on", "coloured blobs"]
    result = staindiffuser("train", "--data", tiles_folder, "--output", folder, *options)
    assert result.returncode == 0, result.stderr
    assert "checkpoint" in result.stdout
    return folder


def test_checkpoint_says_what_it_is(run_folder: Path) -> None:
    config = json.loads((run_folder / "checkpoint" / "config.json").read_text())
    assert "coloured blobs" in config["notice"]
    assert "no medical meaning" in config["notice"]
    assert config["provenance"]["recipe"]["steps"] == 4
    assert 0 <= config["provenance"]["speed"]["data_wait_share"] <= 1


def test_a_stain_is_added_to_it(run_folder: Path, tiles_folder: Path, tmp_path: Path) -> None:
    tiles = copy_tiles(tiles_folder, tmp_path / "tiles")
    edit(tiles, lambda text: text.replace("cd3", "ki67", 1))
    asked: list[str | Path] = [
        "--stain",
        "ki67",
        "--data",
        tiles,
        "--output",
        tmp_path / "run",
        "--name",
        "three",
        "--no-progress",
    ]
    result = staindiffuser("train", "add-stain", run_folder / "checkpoint", *asked)
    assert result.returncode == 0, result.stderr
    config = json.loads((tmp_path / "run" / "checkpoint" / "config.json").read_text())
    assert config["name"] == "three"
    assert [stain["name"] for stain in config["model"]["stains"]] == ["cd3", "ck818", "ki67"]
    assert config["provenance"]["added stains"]["ki67"]["recipe"] == config["provenance"]["recipe"]


def test_it_is_averaged_with_itself(run_folder: Path, tmp_path: Path) -> None:
    result = staindiffuser("train", "average", *[run_folder / "checkpoint"] * 2, "--output", tmp_path / "mean")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "mean" / "model.safetensors").is_file()
    again = staindiffuser("train", "average", *[run_folder / "checkpoint"] * 2, "--output", tmp_path / "mean")
    assert again.returncode == 2
    assert "is there already: choose another" in again.stderr


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command line in this process; it must end with the exit code. Returns its complaint."""

    def run(code: int, *arguments: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["staindiffuser", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == code
        return capsys.readouterr().err

    return run


def copy_tiles(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    return folder


def edit(tiles: Path, change: Callable[[str], str]) -> None:
    path = tiles / "tiles.csv"
    text = path.read_text()
    assert change(text) != text
    path.write_text(change(text))


def cut(image: Path) -> None:
    image.write_bytes(image.read_bytes()[:200])


def shrink(file: Path) -> None:
    with Image.open(file) as image:
        image.resize((48, 48)).save(file)


BAD_DATA: dict[str, tuple[Callable[[Path], None], str]] = {
    "unreadable tile": (lambda tiles: cut(tiles / "he" / "t00.png"), "row 2: he: .*t00.png cannot be read"),
    "pair of different size": (lambda tiles: shrink(tiles / "cd3" / "t01.png"), "row 3: cd3 .*48 x 48 .*64 x 64"),
    "missing column": (lambda tiles: edit(tiles, lambda t: t.replace("slide", "sled", 1)), "row 1: column 'slide'"),
    "mask without stain": (lambda tiles: edit(tiles, lambda t: t.replace("ck818", "cd8_mask", 1)), "'cd8_mask' is a"),
    "split that shares a slide": (
        lambda tiles: edit(tiles, lambda t: t.replace("s2,val", "s0,val", 1)),
        "row 4: slide 's0' is in split 'val' here and in 'train' in row 2",
    ),
    "mpp that is not the model's": (lambda tiles: edit(tiles, lambda t: t.replace(",0.5\n", ",0.25\n")), "mpp is 0.25"),
    "mpp that differs between rows": (lambda tiles: edit(tiles, lambda t: t.replace(",0.5\n", ",0.25\n", 1)), "mpp is"),
    "no validation": (lambda tiles: edit(tiles, lambda t: t.replace(",val,", ",test,")), "no rows with split 'val'"),
}


@pytest.mark.parametrize("dry_run", [True, False], ids=["dry run", "run"])
@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_is_refused_before_training(
    refused: Callable[..., str], tiles_folder: Path, tmp_path: Path, name: str, dry_run: bool
) -> None:
    tiles = copy_tiles(tiles_folder, tmp_path / "tiles")
    spoil, message = BAD_DATA[name]
    spoil(tiles)
    options = ["--preset", "debug", "--steps", "1", "--crop", "32", "--no-progress", *["--dry-run"][: int(dry_run)]]
    error = refused(4, "train", "--data", tiles, "--output", tmp_path / "run", *options)
    assert re.search(message, error), error
    assert str(tiles / "tiles.csv") in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "[train]\nstep = 5\n", "a.toml: train: step: unknown field"),
        ("a.toml", "[model.encoder]\nchanels = [1]\n", "a.toml: model: encoder.chanels: unknown field"),
        ("a.toml", "[training]\nsteps = 5\n", "a.toml: unknown field 'training'; known: preset, train, model"),
        ("a.toml", "[train]\nsteps = 'many'\n", 'a.toml: train: steps: input should be a valid integer, not "many"'),
        ("a.toml", "[train]\nsteps = 0\n", "a.toml: train: steps is 0, must be at least 1"),
        ("a.toml", "preset = 'tiny'\n", "a.toml: preset is 'tiny', must be one of debug, demo"),
        ("a.toml", "[train\n", "a.toml is not valid"),
        ("a.json", '{"model": {"mpp": "0.5"}}', 'a.json: model: mpp: input should be a valid number, not "0.5"'),
        ("a.json", "[1]", "a.json must hold fields"),
        ("a.toml", "[model]\nembedding = 0\n", "a.toml: model: embedding is 0, must be at least 1"),
        ("a.toml", "[train]\naccumulate = 2\n", "a.toml: train: accumulate is now called gradient_accumulation"),
        ("a.toml", "[train]\nbf16 = 1\n", "a.toml: train: bf16: input should be a valid boolean, not 1"),
        ("a.toml", "[model]\nencoder = 3\n", "a.toml: model: encoder: input should be"),
    ],
)
def test_bad_settings_are_refused(
    refused: Callable[..., str], tiles_folder: Path, tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    asked = ["--data", tiles_folder, "--output", tmp_path / "run", "--config", tmp_path / name]
    error = refused(2, "train", *asked, *([] if "preset" in text else ["--preset", "debug"]))
    assert f"{tmp_path}/{message}" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "run"], "Missing option '--data'"),
        (["--data", "tiles"], "Missing option '--output'"),
        (["--data", "tiles", "--output", "run", "--config", "none.toml"], "none.toml cannot be read: No such file"),
        (
            ["--data", "tiles", "--output", "run", "--batch", "7", "--gradient-accumulation", "2"],
            "gradient_accumulation is 2, must",
        ),
        (["--data", "tiles", "--output", "run", "--resume", "none.ckpt"], "--resume none.ckpt: no such snapshot"),
        (["--data", "tiles", "--output", "run", "--strategy", "fsdp"], "start them with torchrun"),
    ],
)
def test_wrong_usage_is_refused(
    refused: Callable[..., str], tiles_folder: Path, tmp_path: Path, monkeypatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiles").symlink_to(tiles_folder)
    assert message in refused(2, "train", *arguments)
    assert not (tmp_path / "run").exists()


def test_a_start_that_is_not_there_is_refused(refused: Callable[..., str], tiles_folder: Path, tmp_path: Path) -> None:
    error = refused(4, "train", "--data", tiles_folder, "--output", tmp_path / "run", "--from", tmp_path / "none")
    assert "none/config.json is missing" in error
    assert not (tmp_path / "run").exists()


def test_torchrun_in_front_takes_no_option_for_its_own() -> None:
    """It stops at any option of the command behind it that could be the beginning of two of its own."""
    from torch.distributed.run import get_args_parser

    from staindiffuser.training.cli import app

    train = typer.main.get_command(app)
    parser = get_args_parser()
    for option in (name for parameter in train.params for name in parameter.opts):
        parsed = parser.parse_args(["--nproc-per-node", "2", "--no-python", "staindiffuser", "train", option, "x"])
        assert parsed.training_script_args == ["train", option, "x"]


def test_settings_and_options_have_their_order(tmp_path: Path) -> None:
    from staindiffuser.training.settings import choose_preset

    path = tmp_path / "settings.toml"
    path.write_text(
        'preset = "debug"\n[train]\nsteps = 7\nbatch = 2\nbetas = [0.8, 0.9]\n[model]\nmpp = 1\n'
        "[model.encoder]\nblocks = 2\n[[model.stains]]\nname = 'er'\nlabel = 'ER'\n"
    )
    name, preset = choose_preset(None, path, {"batch": 3})
    assert (name, preset.train.steps, preset.train.batch, preset.train.betas) == ("debug", 7, 3, (0.8, 0.9))
    assert (preset.model.mpp, preset.model.encoder.blocks, preset.model.stains[0].label) == (1, 2, "ER")
    assert preset.model.encoder.channels == (16, 16, 24, 32)
    assert choose_preset("base", path, {})[0] == "base"
    assert choose_preset(None, None, {})[0] == "demo"


@pytest.mark.parametrize("path", sorted((ROOT / "checkpoints").rglob("*.toml")), ids=lambda path: path.name)
def test_settings_that_ship_can_be_read(path: Path) -> None:
    from staindiffuser.training.settings import choose_preset

    assert choose_preset(None, path, {})[0] == "demo"


def test_graphs_and_repository_follow(run_folder: Path, tmp_path: Path) -> None:
    checkpoint, graphs, repository = run_folder / "checkpoint", tmp_path / "graphs", tmp_path / "repository"
    result = staindiffuser("export", "graphs", checkpoint, "--steps", "1", "--tile", "64", "--output", graphs)
    assert result.returncode == 0, result.stderr
    result = staindiffuser("export", "build", graphs, "--target", "onnxruntime", "--output", repository)
    assert result.returncode == 0, result.stderr
    assert staindiffuser("export", "verify", repository).returncode == 0
