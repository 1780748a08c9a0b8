"""``serve`` starts nothing that is not what its manifest says: one line that names the field or the file, exit 5."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from staindiffuser.export.description import ExportedStain
from staindiffuser.export.manifest import MANIFEST_JSON, Manifest
from staindiffuser.export.repository import build, build_repository
from tests.synthetic_graphs import write_graphs

ENGINES = ("he_encoder", "stain_cd3", "cells_cd3", "stain_ck818", "cells_ck818")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("build")
    write_graphs(folder / "graphs", tile=32)
    return build_repository(folder / "graphs", folder / "repository", flavour="python", max_batch=1)


@pytest.fixture
def repository(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "repository"))


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    program = "import sys; sys.modules['torch'] = None; from staindiffuser.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )


def refusal(repository: Path, *options: object, code: int = 5) -> str:
    result = command("serve", repository, "--grpc-port", 0, "--metrics-port", 0, *options)
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def edit(repository: Path, *path: str, value: Any) -> None:
    """Change a field and seal the manifest again, as someone who knows how would."""
    file = repository / MANIFEST_JSON
    data = json.loads(file.read_text())
    del data["content_sha256"]
    target = data
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    text = json.dumps(data, sort_keys=True, ensure_ascii=False)
    file.write_text(json.dumps({**data, "content_sha256": hashlib.sha256(text.encode()).hexdigest()}))


@pytest.mark.parametrize("engine", ENGINES)
def test_one_edited_byte_in_an_engine(repository: Path, engine: str) -> None:
    (path,) = repository.glob(f"{engine}/1/*.onnx")
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    assert f"{path} differs from manifest.json (sha256)" in refusal(repository)


def test_a_swapped_engine(repository: Path) -> None:
    (one,), (two,) = repository.glob("cells_cd3/1/*.onnx"), repository.glob("cells_ck818/1/*.onnx")
    shutil.copyfile(two, one)
    assert f"{one} differs from manifest.json" in refusal(repository)


def test_of_several_repositories_the_broken_one_is_named(repository: Path, tmp_path: Path) -> None:
    """Each is checked as if it were alone; nothing is served if one is refused."""
    write_graphs(tmp_path / "graphs", tile=32, seed=1)
    other = build_repository(tmp_path / "graphs", tmp_path / "other", max_batch=1)
    (path,) = other.glob("staindiffuser/*/model.py")
    path.write_bytes(path.read_bytes() + b"\n")
    assert f"{path} differs from manifest.json (sha256)" in refusal(repository, other)
    assert f"{tmp_path / 'nothing'} is not a model repository" in refusal(repository, tmp_path / "nothing")


def test_the_same_model_twice(repository: Path, built: Path) -> None:
    line = refusal(repository, built, code=2)
    assert f"{repository} and {built} hold the same model synthetic" in line
    assert "name one for each of the 2 repositories" in refusal(repository, built, "--checkpoint", built, code=2)


def test_another_checkpoint(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"others")
    assert "checkpoint_sha256 is" in refusal(repository, "--checkpoint", tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("engines", "stain_cd3", "builder"), "onnxruntime 0.1", "engines.stain_cd3.builder is onnxruntime 0.1, but"),
        (
            ("engines", "cells_cd3", "device"),
            {"kind": "cuda", "name": "NVIDIA L4", "compute_capability": "8.9"},
            "engines.cells_cd3.device.kind is cuda, but cpu here",
        ),
        (("engines", "stain_ck818", "precision"), "fp16", "engines.stain_ck818.precision is fp16, but fp32"),
        (("model_version",), "0" * 64, "model_version is 000"),
    ],
)
def test_a_field_that_differs(repository: Path, path: tuple[str, ...], value: Any, words: str) -> None:
    edit(repository, *path, value=value)
    assert words in refusal(repository)


def test_tensorrt_without_tensorrt(built: Path, tmp_path: Path) -> None:
    result = command("export", "build", built.parent / "graphs", "--target", "tensorrt", "--output", tmp_path / "out")
    if result.returncode == 0:
        pytest.skip("TensorRT is installed here")
    assert result.returncode == 6
    assert "targets that work here: onnxruntime" in result.stderr.splitlines()[-1]
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_fifth_stain_builds_its_own_two_engines(tmp_path: Path) -> None:
    stains = [ExportedStain(name=f"s{i}", label=f"S{i}") for i in range(5)]
    write_graphs(tmp_path / "four", tile=32, stains=stains[:4])
    write_graphs(tmp_path / "five", tile=32, stains=stains)
    output = build_repository(tmp_path / "four", tmp_path / "repository", max_batch=1)
    before = {name: engine.sha256 for name, engine in Manifest.load(output).engines.items()}
    result = command("export", "build", tmp_path / "five", "--output", output, "--max-batch", 1, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["built"] == ["stain_s4", "cells_s4"]
    assert {name: report["engines"][name] for name in before} == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, 128 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() != 0 or mount is None:
        pytest.skip("only root may mount a small file system")
    made = subprocess.run([mount, "-t", "tmpfs", "-o", "size=128k", "tmpfs", folder], capture_output=True, check=False)
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_publishes_nothing(built: Path, small_disk: Path) -> None:
    graphs = built.parent / "graphs"
    result = command("export", "build", graphs, "--output", small_disk / "repository", "--max-batch", 1)
    assert result.returncode == 2
    assert "No space left on device: nothing was published" in result.stderr.splitlines()[-1]
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_keeps_what_stood_there(built: Path, small_disk: Path) -> None:
    (small_disk / "repository").mkdir()
    (small_disk / "repository" / MANIFEST_JSON).write_text("{}")
    result = command("export", "build", built.parent / "graphs", "--output", small_disk / "repository")
    assert result.returncode == 2
    assert (small_disk / "repository" / MANIFEST_JSON).read_text() == "{}"
    assert [path.name for path in small_disk.iterdir()] == ["repository"]


def test_unknown_precision_for_a_target(built: Path, tmp_path: Path) -> None:
    import dataclasses

    from staindiffuser.export.description import GraphSet

    graphs = Path(shutil.copytree(built.parent / "graphs", tmp_path / "graphs"))
    dataclasses.replace(GraphSet.load(graphs), precision="bf16").save(graphs)
    result = command("export", "build", graphs, "--output", tmp_path / "out")
    assert result.returncode == 2
    assert "target onnxruntime does not take bf16 graphs: export them as fp32, fp16" in result.stderr
    result = command("export", "build", built.parent / "graphs", "--output", tmp_path / "out", "--batch", "1,x")
    assert result.returncode == 2
    assert "--batch 1,x: must be numbers" in result.stderr


def test_batches_decide_profiles_and_warm_up(built: Path, tmp_path: Path) -> None:
    from staindiffuser.export.builders import BuildOptions

    options = BuildOptions(batches=(4, 1, 2))
    manifest = build(built.parent / "graphs", tmp_path / "repository", options=options).manifest
    assert manifest.batches == (1, 2, 4)
    assert manifest.max_batch == 4
    assert options.profiles == ((1, 1, 1), (2, 2, 2), (3, 4, 4))
