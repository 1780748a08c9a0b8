"""Every fault in a model repository is refused with one line that names the file or the field."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from staindiffuser.errors import VerificationError
from staindiffuser.export.errors import ManifestError
from staindiffuser.export.manifest import MANIFEST_JSON, Manifest, content_sha256, verify
from staindiffuser.export.repository import build_repository
from tests.synthetic_graphs import write_graphs


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("build")
    write_graphs(folder / "graphs", tile=32)
    return build_repository(folder / "graphs", folder / "repository", flavour="python", max_batch=2)


@pytest.fixture
def repository(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "repository"))


def edit(repository: Path, *path: str, value: Any, reseal: bool = True) -> None:
    file = repository / MANIFEST_JSON
    data = json.loads(file.read_text())
    target = data
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    if reseal:
        data["content_sha256"] = content_sha256({k: v for k, v in data.items() if k != "content_sha256"})
    file.write_text(json.dumps(data))


def refusal(repository: Path, **options: Any) -> str:
    with pytest.raises(ManifestError) as error:
        verify(repository, **options)
    assert isinstance(error.value, VerificationError)
    assert error.value.exit_code == 5
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_was_built_verifies_and_says_what_it_is(built: Path) -> None:
    manifest = verify(built)
    assert manifest == Manifest.load(built)
    assert set(manifest.files) == {p.relative_to(built).as_posix() for p in built.rglob("*") if p.is_file()} - {
        MANIFEST_JSON
    }
    engine = manifest.engines["stain_cd3"]
    assert engine.steps == 2
    assert engine.sigmas == manifest.sigmas
    assert engine.profiles == ((1, 2, 2),)
    assert engine.device.kind == "cpu"
    assert engine.device.name
    assert engine.builder.startswith("onnxruntime ")
    assert engine.bytes == (built / engine.file).stat().st_size
    assert [entry.batch for entry in engine.parity] == [1, 2]
    assert manifest.engines["cells_cd3"].steps == 1
    assert manifest.engines["he_encoder"].sampler == ""


@pytest.mark.parametrize(
    "pattern", ["he_encoder/1/*.onnx", "stain_ck818/1/*.onnx", "noise/1/model.py", "cells_cd3/config.pbtxt"]
)
def test_one_edited_byte_in_any_file_is_named(repository: Path, pattern: str) -> None:
    (path,) = repository.glob(pattern)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert f"{path} differs from manifest.json (sha256)" in refusal(repository)


def test_swapped_engines_are_named(repository: Path) -> None:
    (one,), (two,) = repository.glob("stain_cd3/1/*.onnx"), repository.glob("stain_ck818/1/*.onnx")
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    assert "stain_c" in refusal(repository)


def test_missing_and_foreign_files_are_named(repository: Path) -> None:
    extra = repository / "noise" / "1" / "__pycache__" / "philox.cpython-311.pyc"
    extra.parent.mkdir()
    extra.write_bytes(b"planted")
    assert f"{extra} is not in manifest.json" in refusal(repository)
    shutil.rmtree(extra.parent)
    gone = repository / "noise" / "1" / "normal_quantiles.npy"
    gone.unlink()
    assert f"{gone} is missing" in refusal(repository)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("engines", "stain_cd3", "builder"), "onnxruntime 0.1", "engines.stain_cd3.builder is onnxruntime 0.1, but"),
        (("engines", "he_encoder", "device", "kind"), "cuda", "engines.he_encoder.device.kind is cuda, but cpu here"),
        (("engines", "cells_cd3", "sha256"), "0" * 64, "engines.cells_cd3.sha256 is 000"),
        (("engines", "cells_cd3", "bytes"), 7, "engines.cells_cd3.bytes is 7"),
        (("engines", "cells_cd3", "file"), "elsewhere.onnx", "engines.cells_cd3.file is elsewhere.onnx"),
        (("engines", "stain_cd3", "steps"), 4, "engines.stain_cd3.steps is 4"),
        (("engines", "stain_cd3", "precision"), "fp16", "engines.stain_cd3.precision is fp16"),
        (("model_version",), "f" * 64, "model_version is fff"),
        (("mpp",), 0.25, "mpp is 0.25, but 0.5 in staindiffuser/config.pbtxt"),
        (("margin",), 99, "margin is 99"),
        (("target",), "cuda9", "target is cuda9, but this version knows only onnxruntime"),
    ],
)
def test_a_field_that_differs_is_named(repository: Path, path: tuple[str, ...], value: Any, words: str) -> None:
    edit(repository, *path, value=value)
    assert words in refusal(repository)


def test_manifest_edited_in_a_field_that_nothing_else_holds(repository: Path) -> None:
    edit(repository, "engines", "stain_cd3", "weights_sha256", value="0" * 64, reseal=False)
    assert "was edited (content_sha256 differs)" in refusal(repository)


def test_another_checkpoint_is_refused(repository: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    assert "model.safetensors is missing" in refusal(repository, checkpoint=checkpoint)
    (checkpoint / "model.safetensors").write_bytes(b"others")
    assert "checkpoint_sha256 is" in refusal(repository, checkpoint=checkpoint)


def test_missing_and_malformed_manifests(repository: Path, tmp_path: Path) -> None:
    assert "is not a model repository" in refusal(tmp_path / "nowhere")
    file = repository / MANIFEST_JSON
    file.write_text("{", encoding="utf-8")
    assert f"{file}: cannot be read" in refusal(repository)
    file.write_text("{}", encoding="utf-8")
    assert f"{file}: format: this version reads format 2 only" in refusal(repository)
    file.write_text("[]", encoding="utf-8")
    assert f"{file}: holds list where an object is expected" in refusal(repository)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("colour",), "red", "colour: unknown field"),
        (("engines", "stain_cd3", "colour"), "red", "engines.stain_cd3.colour: unknown field"),
        (("tile",), "32", 'tile: input should be a valid integer, not "32"'),
        (("engines", "he_encoder", "inputs", 0, "shape"), [32, 32, 3.5], "engines.he_encoder.inputs.0.shape.2: "),
        (("engines", "he_encoder", "device"), {"kind": "cpu"}, "engines.he_encoder.device.name: missing"),
    ],
)
def test_a_malformed_field_is_named(repository: Path, path: tuple[str, ...], value: Any, words: str) -> None:
    edit(repository, *path, value=value)
    assert f"{repository / MANIFEST_JSON}: {words}" in refusal(repository)
