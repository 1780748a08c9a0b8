"""Building and publishing a model repository: complete, once, atomically, and only what fits together."""

import contextlib
import ctypes
import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from staindiffuser.export import publishing, triton_config, wire
from staindiffuser.export.builders import BuildOptions
from staindiffuser.export.description import ExportedStain, GraphSet, TensorSpec
from staindiffuser.export.errors import ExportUsageError, GraphsError, ManifestError, ParityError, UngatedError
from staindiffuser.export.manifest import Manifest, verify
from staindiffuser.export.repository import build, build_repository
from staindiffuser.files import file_sha256
from tests.synthetic_graphs import DEFAULT_STAINS, write_graphs


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    write_graphs(folder, tile=32)
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): file_sha256(p) for p in folder.rglob("*") if p.is_file()}


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


def test_graphs_whose_gate_failed_are_built_only_on_request(graphs: Path, tmp_path: Path) -> None:
    failed = tmp_path / "graphs"
    shutil.copytree(graphs, failed)
    description = GraphSet.load(failed)
    dataclasses.replace(description, gate={"cd3": ("radial power 0.34",)}).save(failed)
    with pytest.raises(UngatedError, match="--allow-ungated"):
        build(failed, tmp_path / "repository")
    assert not (tmp_path / "repository").exists()
    assert build(failed, tmp_path / "repository", allow_ungated=True).manifest.gate == {"cd3": ("radial power 0.34",)}
    config = triton_config.parse((tmp_path / "repository/staindiffuser/config.pbtxt").read_text())
    assert config.parameters["batch"].string_value == "1", "what suits a CPU"
    assert config.parameters["gate"].string_value == '{"cd3": ["radial power 0.34"]}', "clients are told"


def test_everything_triton_needs_is_there(graphs: Path, tmp_path: Path) -> None:
    output = build_repository(graphs, tmp_path / "repository", flavour="python", max_batch=4)
    models = {p.name for p in output.iterdir() if p.is_dir()}
    assert models == {"noise", "he_encoder", "stain_cd3", "cells_cd3", "stain_ck818", "cells_ck818", "staindiffuser"}
    assert (output / "noise/1/philox.py").is_file()
    assert (output / "noise/1/normal_quantiles.npy").is_file()
    version = int(GraphSet.load(graphs).model_version[:15], 16)
    assert (output / "staindiffuser" / str(version)).is_dir()
    for name in models - {"noise", "staindiffuser"}:
        assert len(list((output / name / "1").glob("*.onnx"))) == 1
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("flavour", ["single", "python"])
def test_configs_parse_back_and_carry_the_contract(graphs: Path, tmp_path: Path, flavour: str) -> None:
    output = build_repository(graphs, tmp_path / "repository", flavour=flavour, max_batch=4)
    description = GraphSet.load(graphs)
    configs = {p.parent.name: triton_config.parse(p.read_text()) for p in output.glob("*/config.pbtxt")}
    for name, config in configs.items():
        assert config.name == name
        assert config.max_batch_size == 4
        assert not config.response_cache.enable
        if config.platform != "ensemble":
            assert [warmup.batch_size for warmup in config.model_warmup] == [1]  # on a CPU
            shapes = {tensor.name: list(tensor.dims) for tensor in config.input}
            assert {key: list(value.dims) for key, value in config.model_warmup[0].inputs.items()} == shapes
            assert config.instance_group[0].count == 1
    ensemble = configs["staindiffuser"]
    told = {name: value.string_value for name, value in ensemble.parameters.items()}
    assert json.loads(told["stains"]) == [{"name": "cd3", "label": "CD3"}, {"name": "ck818", "label": "CK8/18"}]
    assert told["model_version"] == description.model_version
    assert (told["tile"], told["margin"], told["mpp"], told["steps"]) == ("32", "4", "0.5", "2")
    assert told["origin_multiple"] == "16"
    assert told["notice"] == description.notice
    assert [tensor.name for tensor in ensemble.input] == ["HE", "ORIGIN", "SEED"]
    assert [tensor.name for tensor in ensemble.output] == ["STAIN_CD3", "CELLS_CD3", "STAIN_CK818", "CELLS_CK818"]


def test_the_ensemble_has_one_first_step(graphs: Path, tmp_path: Path) -> None:
    """Two of them can freeze the server when one fails: see export/triton_config.py."""
    output = build_repository(graphs, tmp_path / "repository", flavour="python", max_batch=1)
    config = triton_config.parse((output / "staindiffuser" / "config.pbtxt").read_text())
    wire = {tensor.name for tensor in config.input}
    first = [step.model_name for step in config.ensemble_scheduling.step if set(step.input_map.values()) <= wire]
    assert first == ["he_encoder"]


def test_nothing_changed_builds_nothing(graphs: Path, tmp_path: Path) -> None:
    first = build(graphs, tmp_path / "repository")
    assert len(first.built) == 5
    before = {p: p.stat().st_mtime_ns for p in first.repository.rglob("*")}
    second = build(graphs, tmp_path / "repository")
    assert second.up_to_date
    assert second.built == ()
    assert {p: p.stat().st_mtime_ns for p in first.repository.rglob("*")} == before


@pytest.mark.timing
def test_what_is_up_to_date_is_known_within_two_seconds(graphs: Path, tmp_path: Path) -> None:
    build(graphs, tmp_path / "repository")
    start = time.perf_counter()
    build(graphs, tmp_path / "repository")
    assert time.perf_counter() - start < 2


def test_another_option_republishes_and_keeps_what_it_can(graphs: Path, tmp_path: Path) -> None:
    build(graphs, tmp_path / "repository", options=BuildOptions(max_batch=2))
    again = build(graphs, tmp_path / "repository", options=BuildOptions(max_batch=2, threads=1))
    assert not again.up_to_date
    assert again.built == ()
    assert verify(again.repository).threads == 1
    larger = build(graphs, tmp_path / "repository", options=BuildOptions(max_batch=3))
    assert len(larger.built) == 5


def test_a_damaged_repository_is_mended_with_a_fresh_engine(graphs: Path, tmp_path: Path) -> None:
    output = build_repository(graphs, tmp_path / "repository", max_batch=1)
    good = contents(output)
    engine = output / Manifest.load(output).engines["stain_cd3"].file
    engine.write_bytes(engine.read_bytes()[:-1] + b"\0")
    assert build(graphs, output, options=BuildOptions(max_batch=1)).built == ("stain_cd3",)
    assert contents(output) == good


def test_an_added_stain_builds_its_own_two_engines(graphs: Path, tmp_path: Path) -> None:
    output = build_repository(graphs, tmp_path / "repository", max_batch=1)
    before = {name: record.sha256 for name, record in Manifest.load(output).engines.items()}
    write_graphs(tmp_path / "more", tile=32, stains=(*DEFAULT_STAINS, ExportedStain(name="ki67", label="Ki-67")))
    report = build(tmp_path / "more", output, options=BuildOptions(max_batch=1))
    assert report.built == ("stain_ki67", "cells_ki67")
    after = {name: record.sha256 for name, record in report.manifest.engines.items()}
    assert {name: after[name] for name in before} == before


def wrong_tensor(graphs: GraphSet, engine: str, old: TensorSpec, new: TensorSpec) -> GraphSet:
    changed = graphs.engines[engine]
    swap: dict[str, Any] = {
        side: tuple(new if spec == old else spec for spec in getattr(changed, side)) for side in ("inputs", "outputs")
    }
    return dataclasses.replace(graphs, engines={**graphs.engines, engine: dataclasses.replace(changed, **swap)})


@pytest.mark.parametrize(
    ("engine", "side", "change", "words"),
    [
        ("stain_cd3", "inputs", {"shape": (9, 16, 16)}, r"stain_cd3 takes FEATURES_0 float16 \[9, 16, 16\], but"),
        ("stain_cd3", "inputs", {"dtype": "float32"}, "stain_cd3 takes FEATURES_0 float32"),
        ("he_encoder", "outputs", {"name": "FEATURE_0"}, "takes FEATURES_0 .* no such tensor"),
        ("cells_cd3", "outputs", {"dtype": "float32"}, "clients expect CELLS_CD3 uint8"),
        ("cells_cd3", "outputs", {"name": "STAIN_CD3"}, "cells_cd3 gives STAIN_CD3, which another model gives too"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    graphs: Path, engine: str, side: str, change: dict[str, Any], words: str
) -> None:
    description = GraphSet.load(graphs)
    old = getattr(description.engines[engine], side)[0]
    with pytest.raises(GraphsError, match=words):
        wire.check_ensemble(wrong_tensor(description, engine, old, dataclasses.replace(old, **change)))


def test_a_missing_engine_is_named(graphs: Path) -> None:
    description = GraphSet.load(graphs)
    engines = {name: engine for name, engine in description.engines.items() if name != "cells_cd3"}
    with pytest.raises(GraphsError, match=r"but the stains need .*cells_cd3"):
        wire.check_ensemble(dataclasses.replace(description, engines=engines))


def test_over_the_parity_limit_nothing_is_published(graphs: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(graphs, tmp_path / "graphs"))
    with np.load(other / "golden.npz") as archive:
        arrays = {name: archive[name] for name in archive.files}
    arrays["CELLS_CD3"] = arrays["CELLS_CD3"] ^ np.uint8(128)
    np.savez(other / "golden.npz", **arrays)
    description = GraphSet.load(other, verify=False)
    dataclasses.replace(description, golden_sha256=file_sha256(other / "golden.npz")).save(other)
    with pytest.raises(ParityError, match="cells_cd3 differs"):
        build(other, tmp_path / "repository", options=BuildOptions(max_batch=1))
    assert not (tmp_path / "repository").exists()
    good = build_repository(graphs, tmp_path / "repository", max_batch=1)
    before = contents(good)
    with pytest.raises(ParityError):
        build(other, tmp_path / "repository", options=BuildOptions(max_batch=1))
    assert contents(good) == before
    assert leftovers(tmp_path) == []


def test_damaged_graphs_are_refused(graphs: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(graphs, tmp_path / "graphs"))
    with (other / "stain_cd3.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ManifestError, match=r"stain_cd3\.onnx differs"):
        build(other, tmp_path / "repository")
    with pytest.raises(GraphsError, match="is missing"):
        build(tmp_path / "nowhere", tmp_path / "repository")


def test_unknown_target_and_precision(graphs: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportUsageError, match="unknown target"):
        build(graphs, tmp_path / "repository", target="abacus")
    other = Path(shutil.copytree(graphs, tmp_path / "graphs"))
    dataclasses.replace(GraphSet.load(other), precision="bf16").save(other)
    with pytest.raises(ExportUsageError, match="onnxruntime does not take bf16 graphs: export them as fp32, fp16"):
        build(other, tmp_path / "repository")


def test_a_folder_that_is_no_repository_is_left_alone(graphs: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_bytes(b"precious")
    with pytest.raises(ExportUsageError, match="is neither empty nor a model repository"):
        build(graphs, tmp_path / "photos")
    assert (tmp_path / "photos" / "one.jpg").read_bytes() == b"precious"
    with pytest.raises(ExportUsageError, match="is a file"):
        build(graphs, tmp_path / "photos" / "one.jpg")


def test_full_disk_publishes_nothing_and_leaves_the_old(
    graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = build_repository(graphs, tmp_path / "repository", max_batch=1)
    before = contents(output)

    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(ExportUsageError, match="cannot be written: No space left on device: nothing was published"):
        build(graphs, output, options=BuildOptions(max_batch=2))
    assert contents(output) == before
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("exchange", [True, False], ids=["renameat2", "two renames"])
def test_publishing_replaces_a_folder_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    output = tmp_path / "out"
    for text in ("old", "new"):
        with publishing.locked(output), publishing.staging_folder(output) as folder:
            (folder / text).write_text(text)
    assert [p.name for p in output.iterdir()] == ["new"]
    with contextlib.suppress(RuntimeError), publishing.locked(output), publishing.staging_folder(output) as folder:
        (folder / "half").write_text("half")
        raise RuntimeError
    assert [p.name for p in output.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


BUILD = """
    import os, sys, time
    from pathlib import Path
    from staindiffuser.export import repository
    from staindiffuser.export.builders import BuildOptions
    if len(sys.argv) > 3:
        def slow(*arguments):
            print("working", flush=True)
            time.sleep(60)
        repository._run_parity = slow
    report = repository.build(Path(sys.argv[1]), Path(sys.argv[2]), options=BuildOptions(max_batch=1))
    print(len(report.built), report.up_to_date, "torch" in sys.modules)
"""


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(BUILD), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_builds_at_once_publish_once(graphs: Path, tmp_path: Path) -> None:
    processes = [start(graphs, tmp_path / "repository") for _ in range(3)]
    results = sorted(process.communicate(timeout=60)[0].split() for process in processes)
    assert results == [["0", "True", "False"], ["0", "True", "False"], ["5", "False", "False"]]
    verify(tmp_path / "repository")
    assert leftovers(tmp_path) == []


def test_a_killed_build_is_cleaned_up_by_the_next(graphs: Path, tmp_path: Path) -> None:
    process = start(graphs, tmp_path / "repository", "slow")
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
    process.kill()
    process.communicate()
    assert any(name.startswith(".repository.building-") for name in leftovers(tmp_path))
    assert not (tmp_path / "repository").exists()
    assert len(build(graphs, tmp_path / "repository", options=BuildOptions(max_batch=1)).built) == 5
    assert leftovers(tmp_path) == []
