"""A command that serves takes the name of a model that ships, and a folder of that name goes first."""

from __future__ import annotations

from pathlib import Path

import pytest

from staindiffuser.export.manifest import Manifest
from staindiffuser.serving import demo


def test_a_model_that_ships_is_found_by_its_name(
    tiny_graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAINDIFFUSER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "shipped_models", lambda: {"demo": tmp_path / "none", "colon": tiny_graphs})
    monkeypatch.chdir(tmp_path)
    repository = demo.repository_of(Path("colon"))
    assert repository.is_relative_to(tmp_path / "cache")
    assert Manifest.load(repository).stains
    assert demo.repository_of(Path("colon")) == repository  # built once
    Path("colon").mkdir()
    assert demo.repository_of(Path("colon")) == Path("colon")


def test_any_other_name_is_a_folder(tmp_path: Path) -> None:
    assert demo.repository_of(tmp_path / "models") == tmp_path / "models"
    assert "demo" in demo.shipped_models()
    assert demo.demo_graphs() == demo.shipped_models()["demo"]
