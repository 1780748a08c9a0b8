"""A result appears under its final names complete, or not at all."""

import json
from pathlib import Path

import pytest

from staindiffuser.client.errors import OutputError
from staindiffuser.client.journal import JOURNAL
from staindiffuser.client.result_folder import ResultFolder
from staindiffuser.client.run_record import read_run, write_run
from tests.run_records import run_record


def fill(folder: ResultFolder, *names: str) -> None:
    for name in names:
        (folder.work / name).write_text("{}")
    write_run(folder.work, run_record(outputs=dict.fromkeys(names, 1)))
    folder.publish([*names, "run.json"])


def test_publishing_leaves_only_the_result(tmp_path: Path) -> None:
    output = tmp_path / "a/b/out"
    with ResultFolder(output) as folder:
        assert folder.work.parent == output
        assert not [p for p in output.iterdir() if not p.name.startswith(".")]
        fill(folder, "cd3.ome.tiff")
    assert sorted(p.name for p in output.iterdir()) == ["cd3.ome.tiff", "run.json"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_when_it_fails(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with ResultFolder(tmp_path / "a/out") as folder:
            (folder.work / "x").write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()
    (tmp_path / "a/mine").write_text("keep")
    with pytest.raises(error):
        fail()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["mine"]


def test_a_result_is_not_overwritten_unless_asked(tmp_path: Path) -> None:
    with ResultFolder(tmp_path / "out") as folder:
        fill(folder, "cd3.ome.tiff", "her2.ome.tiff")
    with pytest.raises(OutputError, match="--overwrite"), ResultFolder(tmp_path / "out"):
        pass
    (tmp_path / "out/notes.txt").write_text("mine")
    with ResultFolder(tmp_path / "out", overwrite=True) as folder:
        assert read_run(tmp_path / "out").outputs, "the old result stays until the new one is complete"
        fill(folder, "cd3.ome.tiff")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["cd3.ome.tiff", "notes.txt", "run.json"]


def test_two_runs_do_not_write_to_one_folder(tmp_path: Path) -> None:
    with ResultFolder(tmp_path / "out") as folder:
        with pytest.raises(OutputError, match="another run"), ResultFolder(tmp_path / "out"):
            pass
        fill(folder, "cd3.ome.tiff")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["cd3.ome.tiff", "run.json"]


def test_saved_work_stays(tmp_path: Path) -> None:
    """Also if a later run fails before it does anything, such as for a server that cannot be reached."""
    with ResultFolder(tmp_path / "out") as folder:
        (folder.work / JOURNAL).write_text("")
        (folder.work / "cd3.spool").write_text("half")
        folder.keep = True
    with pytest.raises(RuntimeError), ResultFolder(tmp_path / "out"):
        raise RuntimeError
    assert (folder.work / "cd3.spool").exists()
    with ResultFolder(tmp_path / "out") as folder:
        folder.clear()
        assert [p.name for p in folder.work.iterdir()] == ["lock"]
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("outputs", [{"../precious": 1}, {"": 1}])
def test_an_edited_record_cannot_delete_elsewhere(tmp_path: Path, outputs: dict[str, int]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "precious").write_text("keep")
    data = {**run_record().to_dict(), "outputs": outputs}
    (tmp_path / "out/run.json").write_text(json.dumps(data), encoding="utf-8")
    with ResultFolder(tmp_path / "out", overwrite=True) as folder:
        fill(folder, "a")
    assert (tmp_path / "precious").exists()


@pytest.mark.parametrize("output", ["file/out", "/proc/out"])
def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path, output: str) -> None:
    (tmp_path / "file").write_text("a file")
    with pytest.raises(OutputError, match="cannot be written"), ResultFolder(tmp_path / output):
        pass
    with pytest.raises(OutputError, match="cannot be written"), ResultFolder(tmp_path / "file"):
        pass
