"""Training that nobody watches: whatever happens, the run is right, or says what is wrong and keeps what it had."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from staindiffuser.errors import DependencyError, UsageError
from staindiffuser.training import train as training
from staindiffuser.training.checkpoint import WEIGHTS, Checkpoint
from staindiffuser.training.config import PRESETS, Preset
from staindiffuser.training.curves import read_curves
from staindiffuser.training.errors import CheckpointError, DivergedError
from staindiffuser.training.evaluation.evaluate import evaluate
from staindiffuser.training.journal import Journal
from staindiffuser.training.options import RunOptions, locked
from staindiffuser.training.receptive import effective_radius
from staindiffuser.training.snapshots import find_snapshot, read_snapshot
from staindiffuser.training.teacher import Teacher
from staindiffuser.training.tiles.folds import Fold, deal_fold
from staindiffuser.training.tiles.paired_tiles import PairedTiles, Split
from staindiffuser.training.train import train


def preset(steps: int, **changes: Any) -> Preset:
    recipe = dataclasses.replace(
        PRESETS["debug"].train, steps=steps, crop=32, warmup=2, cooldown=0.0, validate_every=100, validation_tiles=2
    )
    return dataclasses.replace(PRESETS["debug"], train=dataclasses.replace(recipe, **changes))


def options(folder: Path, **changes: Any) -> RunOptions:
    return dataclasses.replace(RunOptions(output=folder, name="test", log_every=1), **changes)


@pytest.fixture
def own_tiles(tiles_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiles that may be changed."""
    return Path(shutil.copytree(tiles_folder, tmp_path / "tiles"))


@pytest.fixture
def stopped(own_tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was asked to stop after its fourth step of six, with snapshots of every step."""
    folder, real = tmp_path / "run", Teacher.after_step

    def after_step(teacher: Teacher, step: int) -> None:
        real(teacher, step)
        if step == 4:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "after_step", after_step)
        with pytest.raises(
            KeyboardInterrupt, match="stopped after step 4 of 6, which is saved: the same command goes on"
        ):
            train(preset(6, checkpoint_steps=1), own_tiles, options(folder))
    return folder


def test_the_newest_three_snapshots_are_kept(stopped: Path) -> None:
    names = sorted(path.name for path in (stopped / "snapshots").iterdir())
    assert names == ["last.ckpt", "step-00000002.ckpt", "step-00000003.ckpt", "step-00000004.ckpt"]
    assert read_snapshot(stopped / "snapshots" / "last.ckpt").step == 4


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def spoil(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    next(iter(state["learner"].values())).fill_(float("nan"))
    torch.save(state, path)


@pytest.mark.parametrize(("damage", "reason"), [(truncate, "cannot be resumed from"), (spoil, "are not finite")])
def test_a_bad_snapshot_is_passed_over(
    stopped: Path, own_tiles: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], reason: str
) -> None:
    for step in (4, 3):
        damage(stopped / "snapshots" / f"step-0000000{step}.ckpt")
    train(preset(6, checkpoint_steps=1), own_tiles, options(stopped))
    said = capsys.readouterr().err
    assert said.count(reason) == 2
    assert "going on from step-00000002.ckpt" in said
    whole = train(preset(6), own_tiles, options(stopped.with_name("whole")))
    assert (stopped / "checkpoint" / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


def test_a_run_without_a_good_snapshot_is_refused_and_left_alone(stopped: Path, own_tiles: Path) -> None:
    for path in (stopped / "snapshots").glob("step-*"):
        truncate(path)
    before = sorted(path.name for path in stopped.rglob("*"))
    with pytest.raises(UsageError, match=r"step-00000004\.ckpt cannot be resumed from"):
        train(preset(6, checkpoint_steps=1), own_tiles, options(stopped))
    assert sorted(path.name for path in stopped.rglob("*")) == before


def test_a_run_of_an_earlier_version_is_left_alone(own_tiles: Path, tmp_path: Path) -> None:
    last = tmp_path / "run" / "snapshots" / "last.ckpt"
    last.parent.mkdir(parents=True)
    last.write_bytes(b"a night's work")
    with pytest.raises(UsageError, match="is of an earlier version, which cannot be resumed: choose another --output"):
        train(preset(1), own_tiles, options(tmp_path / "run"))
    assert last.read_bytes() == b"a night's work"


def exchange(tiles: Path, column: str) -> None:
    """Give two training tiles each other's images."""
    one, other = (tiles / column / name for name in ("t00.png", "t01.png"))
    first = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(first)


@pytest.mark.parametrize("column", ["he", "cd3"])
def test_other_data_are_noticed(stopped: Path, own_tiles: Path, column: str) -> None:
    exchange(own_tiles, column)
    with pytest.raises(UsageError, match=rf"other data \(the files of column {column} of split train\).*--accept-data"):
        train(preset(6, checkpoint_steps=1), own_tiles, options(stopped))
    with pytest.raises(UsageError, match="other data"):
        train(preset(6, checkpoint_steps=1), own_tiles, options(stopped, dry_run=True))
    folder = train(preset(6, checkpoint_steps=1), own_tiles, options(stopped, accept_data_change=True))
    changed = [{"step": 4, "differing": [f"the files of column {column} of split train"]}]
    assert Checkpoint.load(folder).config.provenance["data"]["changed during training"] == changed
    assert "changed during training" in (folder / "MODEL_CARD.md").read_text(encoding="utf-8")


def test_rows_that_are_gone_are_noticed_and_a_folder_may_move(stopped: Path, own_tiles: Path) -> None:
    moved = own_tiles.rename(own_tiles.with_name("moved"))
    table = moved / "tiles.csv"
    lines = table.read_text(encoding="utf-8").splitlines(keepends=True)
    table.write_text("".join(lines[:1] + lines[2:]), encoding="utf-8")
    with pytest.raises(UsageError, match=r"other data \(the rows of split train\)"):
        train(preset(6, checkpoint_steps=1), moved, options(stopped))
    table.write_text("".join(lines), encoding="utf-8")
    assert train(preset(6, checkpoint_steps=1), moved, options(stopped)).is_dir()


def test_weights_that_are_not_finite_are_not_saved(own_tiles: Path, tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"after step 1 \d+ of \d+ tensors are not finite") as caught:
        train(preset(1, learning_rate=1e38), own_tiles, options(tmp_path / "run"))
    assert caught.value.exit_code == 7
    assert not list(tmp_path.glob("run/snapshots/*"))
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_weights_that_are_not_finite_are_neither_written_nor_read(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    state = load_file(folder / WEIGHTS)
    next(iter(state.values())).view(-1)[0] = float("inf")
    save_file(state, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"1 of .* tensors are not finite"):
        Checkpoint.load(folder)
    checkpoint = Checkpoint.load(tiny_checkpoint)
    next(checkpoint.network.parameters()).view(-1)[0] = float("nan")
    with pytest.raises(DivergedError, match="the network's output is not finite"):  # golden samples too
        effective_radius(checkpoint.network, np.zeros((1, 64, 128, 3), np.uint8), sigmas=(80.0,))
    next(checkpoint.network.parameters()).view(-1)[0] = 1e6  # more than half precision holds
    with pytest.raises(DivergedError, match="is not written"):
        checkpoint.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_run_ends_with_the_best_weights(own_tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def score(_self: Any, network: Any, step: int, journal: Journal) -> float:
        return {2: 0.5, 4: 0.9, 6: 0.7}[step]

    monkeypatch.setattr(training.ImageValidation, "__call__", score)
    recipe = preset(6, validate_every=2, learning_rate=1e-2)
    best = Checkpoint.load(train(recipe, own_tiles, options(tmp_path / "best")))
    assert best.config.provenance["weights"] == {"of step": 4, "best validation": 0.9, "at step": 4}
    shorter = torch.load(tmp_path / "best" / "snapshots" / "best.ckpt", weights_only=True)
    assert (shorter["step"], shorter["score"]) == (4, 0.9)
    last = Checkpoint.load(train(recipe, own_tiles, options(tmp_path / "last", keep="last")))
    assert last.config.provenance["weights"]["of step"] == 6
    name = "images.cd3.head.gain"
    assert not torch.equal(best.network.state_dict()[name], last.network.state_dict()[name])
    torch.testing.assert_close(best.network.state_dict()[name], shorter["network"][name], rtol=1e-3, atol=1e-4)
    again = Checkpoint.load(train(recipe, own_tiles, options(tmp_path / "best")))  # a finished run stays what it was
    assert torch.equal(best.network.state_dict()[name], again.network.state_dict()[name])


def test_curves_that_were_cut_do_not_stop_a_run(stopped: Path, own_tiles: Path) -> None:
    curves = stopped / "csv" / "metrics.csv"
    os.truncate(curves, curves.stat().st_size - 40)
    train(preset(6, checkpoint_steps=1), own_tiles, options(stopped))
    assert list(read_curves(stopped)["loss"][0]) == [1, 2, 3, 5, 6]


def test_one_run_at_a_time(stopped: Path, own_tiles: Path) -> None:
    program = (
        "import sys, pathlib\n"
        "from staindiffuser.training.options import RunOptions, locked\n"
        "with locked(RunOptions(output=pathlib.Path(sys.argv[1]))):\n"
        "    print('locked', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(stopped)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(UsageError, match="another run is writing to"):
            train(preset(6, checkpoint_steps=1), own_tiles, options(stopped))
        other.kill()
    with locked(options(stopped)):  # what a killed run has locked is free again
        train(preset(6, checkpoint_steps=1), own_tiles, options(stopped))


def test_nothing_is_staged_in_the_systems_temporary_folder(
    own_tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "does not exist"))
    assert train(preset(2), own_tiles, options(tmp_path / "run")).is_dir()


PROGRAM = """
import dataclasses, resource, sys
from pathlib import Path
from staindiffuser.cli import main
if sys.argv[1].isdigit():
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.argv[:2] = ["staindiffuser"]
main()
"""


def command(*arguments: str | Path, limit: str = "-", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, limit, *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=250,
        check=False,
        env={**os.environ, **environment},
    )


def arguments(tiles: Path, output: Path, steps: int, *more: str) -> list[str | Path]:
    asked = ["--preset", "debug", "--steps", str(steps), "--crop", "32", "--no-progress", *more]
    return ["train", "--data", tiles, "--output", output, *asked]


def test_a_full_disk_keeps_the_last_good_snapshot(stopped: Path, own_tiles: Path) -> None:
    settings = stopped.with_name("settings.toml")
    settings.write_text(
        "[train]\ncheckpoint_steps = 1\nwarmup = 2\ncooldown = 0.0\nvalidate_every = 100\nvalidation_tiles = 2\n",
        encoding="utf-8",
    )
    size = (stopped / "snapshots" / "last.ckpt").stat().st_size
    before = {path.name for path in (stopped / "snapshots").iterdir()}
    result = command(*arguments(own_tiles, stopped, 6, "--config", str(settings)), limit=str(size // 2))
    assert result.returncode == 2, result.stderr
    lines = result.stderr.splitlines()
    assert [line for line in lines if line.startswith("error")] == [lines[-1]]
    assert "step-00000005.ckpt cannot be written: File too large: make room" in lines[-1]
    assert "step-00000004.ckpt is kept" in lines[-1]
    assert "Traceback" not in result.stderr
    assert {path.name for path in (stopped / "snapshots").iterdir()} == before
    assert command(*arguments(own_tiles, stopped, 6, "--config", str(settings))).returncode == 0


def test_a_locale_that_is_not_utf8(own_tiles: Path, tmp_path: Path) -> None:
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    named = ["--name", "Darm-Färbung", "--trained-on", "Gewebe, 5 µm"]
    own_tiles = own_tiles.rename(own_tiles.with_name("Gewebeproben-ä"))
    result = command(*arguments(own_tiles, tmp_path / "run", 1, *named), **locale)
    assert result.returncode == 0, result.stderr
    card = (tmp_path / "run" / "checkpoint" / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "Darm-Färbung" in card
    assert "Gewebe, 5 µm" in card
    result = command(
        "distill",
        tmp_path / "run/checkpoint",
        "--data",
        own_tiles,
        "--output",
        tmp_path / "few",
        "--steps",
        "1",
        "--gate-tiles",
        "1",
        "--no-search",
        **locale,
    )
    assert result.returncode == 0, result.stderr


def test_text_that_is_not_utf8_is_refused_before_training(own_tiles: Path, tmp_path: Path) -> None:
    result = command(*arguments(own_tiles, tmp_path / "run", 1, "--name", os.fsdecode(b"Darm-F\xe4rbung")))
    assert result.returncode == 2
    assert "--name holds bytes that are not UTF-8" in result.stderr


def test_the_umask_holds_for_the_weights(tiny_checkpoint: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        Checkpoint.load(tiny_checkpoint).save(tmp_path / "c")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "c").iterdir()}
    assert modes == {0o640}


def test_a_killed_loader_process_keeps_the_last_whole_step(own_tiles: Path, tmp_path: Path) -> None:
    asked = arguments(own_tiles, tmp_path / "run", 5000, "--workers", "2", "--log-every", "1")
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "-", *map(str, asked)], stderr=subprocess.PIPE, text=True, encoding="utf-8"
    ) as process:
        curves = tmp_path / "run" / "csv" / "metrics.csv"
        deadline = time.monotonic() + 200
        while not curves.is_file() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
        os.kill(int(children[-1]), signal.SIGKILL)
        error = process.communicate(timeout=100)[1]
    assert process.returncode == 6, error
    assert "Traceback" not in error
    assert "a loader process was killed" in error.splitlines()[-1]
    snapshot = find_snapshot(tmp_path / "run", True)
    assert snapshot
    steps = read_curves(tmp_path / "run")["loss"][0]
    assert snapshot.step == int(np.max(steps))


def test_patients_are_dealt_to_folds(own_tiles: Path, tmp_path: Path) -> None:
    """Slides here; of the three that are not test slides each is validated on in one fold."""
    for number in (1, 2, 3):
        folder = train(preset(1), own_tiles, options(tmp_path / str(number), fold=Fold(number=number, of=3)))
        data = Checkpoint.load(folder).config.provenance["data"]
        assert data["fold"] == f"{number}/3"
        assert (data["training tiles"], data["validation tiles"]) == (8, 4)


def test_an_evaluation_says_what_was_trained_on(own_tiles: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.load(train(preset(1), own_tiles, options(tmp_path / "first")))
    tiles = PairedTiles.load(own_tiles)
    splits: tuple[Split, ...] = ("train", "test")
    told = [evaluate(checkpoint, tiles, steps=1, split=split).head()["trained_on"] for split in splits]
    assert told == [
        {"tiles": 8, "of its slides": 8, "of its patients": 0},
        {"tiles": 0, "of its slides": 0, "of its patients": 0},
    ]
    folds = [Fold(number=number, of=3) for number in (1, 2, 3)]
    fold = next(fold for fold in folds if not deal_fold(tiles.tiles, fold)["s2"])
    asked = options(tmp_path / "more", start=tmp_path / "first" / "checkpoint", fold=fold)
    more = train(preset(1), own_tiles, asked)
    everything = Checkpoint.load(more).seen
    assert everything
    assert everything.slides == {"s0", "s1", "s2"}  # those of the first run too


def test_an_evaluation_shows_how_slides_differ(tiny_checkpoint: Path, own_tiles: Path) -> None:
    scored = evaluate(Checkpoint.load(tiny_checkpoint), PairedTiles.load(own_tiles), steps=1, split="train")
    slides = scored.slides("cd3")
    assert [(slide.slide, slide.tiles) for slide in slides] == [("s0", 4), ("s1", 4)]
    assert [s["slide"] for s in scored.figures()["slides"]["cd3"]] == ["s0", "s1"]


def test_an_evaluation_refuses_its_outputs_before_the_work(
    tiny_checkpoint: Path, own_tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from staindiffuser.cli import main

    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setattr("staindiffuser.training.checkpoint.Checkpoint.load", lambda _: pytest.fail("too late"))
    for option, place in (("--json", "file/scores.json"), ("--report", "file/report"), ("--json", ".")):
        asked = ["evaluate", tiny_checkpoint, "--data", own_tiles, option, tmp_path / place]
        monkeypatch.setattr(sys, "argv", ["staindiffuser", *map(str, asked)])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 2


def test_progress_that_a_log_can_hold(
    own_tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("staindiffuser.training.journal.SECONDS", 0.0)
    train(preset(4, validate_every=2), own_tiles, options(tmp_path / "run", progress="bar"))  # no terminal here
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "training from step 0 to 4"
    validated = r"step 2 of 4 \(50%\), \d:\d\d:\d\d left · loss \d.*validation DAB-Dice cd3 \d.* of memory"
    assert any(re.match(validated, line) for line in lines)


def test_curves_that_cannot_be_written_end_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Journal(tmp_path, first=0, steps=9, progress="none", write=True) as journal:
        journal.log({"loss": 1.0}, 1)
        (failed,) = [thread for thread in threading.enumerate() if "AsyncWriter" in type(thread).__name__]
        with pytest.MonkeyPatch.context() as patch:

            def full(*_: object) -> None:
                raise OSError(errno.ENOSPC, "No space left on device")

            patch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", full)
            with contextlib.suppress(UsageError):  # the thread may have failed on the first row
                journal.log({"loss": 1.0}, 2)
            failed.join(timeout=30)
            with pytest.raises(UsageError, match="tensorboard cannot be written: No space left on device: make room"):
                journal.log({"loss": 1.0}, 3)
    assert "Traceback" not in capfd.readouterr().err


def test_a_gpu_without_memory_says_what_to_do(own_tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*_: object) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Teacher, "forward", forward)
    with pytest.raises(DependencyError, match="memory ran out at step 0: use a smaller --batch"):
        train(preset(2), own_tiles, options(tmp_path / "run"))
