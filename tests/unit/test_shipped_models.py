"""A command that serves takes the name of a model that ships, and a folder of that name goes first."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from staindiffuser.errors import UsageError
from staindiffuser.export.description import GraphSet
from staindiffuser.export.graphs import UNGATED
from staindiffuser.export.manifest import Manifest
from staindiffuser.serving import demo
from tests.synthetic_graphs import write_graphs


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


def test_a_model_that_ships_without_passing_its_gate_is_served_and_says_so(
    tiny_graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ungated = tmp_path / "graphs"
    shutil.copytree(tiny_graphs, ungated)
    graphs = GraphSet.load(ungated)
    dataclasses.replace(graphs, gate={"cd3": ("DAB-Dice",)}, notice=f"{graphs.notice} {UNGATED}").save(ungated)
    monkeypatch.setenv("STAINDIFFUSER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "shipped_models", lambda: {"colon": ungated})
    manifest = Manifest.load(demo.repository_of(Path("colon")))
    assert manifest.gate == {"cd3": ("DAB-Dice",)}
    assert manifest.notice.endswith(UNGATED)


def test_any_other_name_is_a_folder(tmp_path: Path) -> None:
    assert demo.repository_of(tmp_path / "models") == tmp_path / "models"
    assert "demo" in demo.shipped_models()
    assert demo.demo_graphs() == demo.shipped_models()["demo"]


def test_fast_takes_what_was_measured_here_and_does_not_measure_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_graphs(tmp_path / "graphs", tile=32)
    monkeypatch.setenv("STAINDIFFUSER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "shipped_models", lambda: {"demo": tmp_path / "graphs"})
    said: list[str] = []
    repository = demo.repository_of(None, said.append, fast=True)
    manifest = Manifest.load(repository)
    assert manifest.choice is not None
    assert f"chosen for {manifest.choice.processor}: {manifest.target} {manifest.precision}" in said
    times = len([line for line in said if "ms a tile" in line])
    assert times == (len(manifest.choice.ms_per_tile) if len(manifest.choice.ms_per_tile) > 1 else 0)
    said.clear()
    assert demo.repository_of(Path("demo"), said.append, fast=True) == repository
    assert not any("ms a tile" in line for line in said)
    assert demo.repository_of(None) != repository  # the tests' environment asks for float32
    monkeypatch.delenv("STAINDIFFUSER_EXACT")
    assert demo.repository_of(None) == repository
    exact = Manifest.load(demo.repository_of(None, fast=False))
    assert [exact.target, exact.precision] == ["onnxruntime", "fp32"]
    with pytest.raises(UsageError, match=r"--fast is for models that ship: build .*models"):
        demo.repository_of(tmp_path / "models", fast=True)
