"""Files are replaced whole or not at all, and caches lie where the platform keeps them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from staindiffuser.errors import UsageError
from staindiffuser.files import cache_folder, file_sha256, replacing, write_json


def test_the_old_file_stands_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "a.txt"
    with replacing(path) as temporary:
        temporary.write_text("old", encoding="utf-8")
    with replacing(path) as temporary:
        temporary.write_text("new", encoding="utf-8")
        assert path.read_text(encoding="utf-8") == "old"
    assert path.read_text(encoding="utf-8") == "new"
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_keeps_the_old_file_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old", encoding="utf-8")

    def fail(error: Exception) -> None:
        with replacing(path) as temporary:
            temporary.write_text("half", encoding="utf-8")
            raise error

    with pytest.raises(ZeroDivisionError):
        fail(ZeroDivisionError())
    with pytest.raises(UsageError, match=r"a\.txt cannot be written: No space left on device; choose another place"):
        fail(OSError(28, "No space left on device"))
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with replacing(path) as first, replacing(path) as second:
        first.write_text("first", encoding="utf-8")
        second.write_text("second", encoding="utf-8")
    assert path.read_text(encoding="utf-8") == "first"  # the outer block ended last
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_where_a_folder_should_be_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("", encoding="utf-8")
    with pytest.raises(UsageError, match="cannot be written"):
        write_json(tmp_path / "a" / "b.json", {})


def test_json_has_null_for_what_is_not_finite(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": [float("nan"), float("inf"), 1.5], "stain": "σ"})
    assert (tmp_path / "a.json").read_text(encoding="utf-8").split() == (
        ["{", '"x":', "[", "null,", "null,", "1.5", "],", '"stain":', '"σ"', "}"]
    )


def test_hash_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"stain" * 100_000)
    assert file_sha256(tmp_path / "a") == hashlib.sha256(b"stain" * 100_000).hexdigest()


def test_cache_folder_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAINDIFFUSER_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("STAINDIFFUSER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "staindiffuser"
