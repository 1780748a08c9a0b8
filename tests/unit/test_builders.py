"""Build options, the registry of targets, and what the ONNX Runtime builder refuses."""

import dataclasses
import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from staindiffuser.errors import DependencyError
from staindiffuser.export import builders
from staindiffuser.export.builders import BuildOptions, engine_key
from staindiffuser.export.builders.checks import check_graph
from staindiffuser.export.description import GraphSet
from staindiffuser.export.errors import BuilderMissingError, ExportUsageError, GraphsError
from staindiffuser.triton_models.shared.cpus import available_cpus
from tests.synthetic_graphs import write_graphs


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GraphSet]:
    folder = tmp_path_factory.mktemp("graphs")
    return folder, write_graphs(folder, tile=32)


@pytest.mark.parametrize(
    ("largest", "corners"), [(1, (1,)), (2, (1, 2)), (3, (1, 3)), (8, (1, 5, 8)), (32, (1, 17, 32)), (6, (1, 3, 6))]
)
def test_corners_are_one_the_largest_and_an_odd_one(largest: int, corners: tuple[int, ...]) -> None:
    options = BuildOptions(max_batch=largest)
    assert options.corners(options.one_profile) == corners


@pytest.mark.parametrize(("field", "value"), [("max_batch", 0), ("max_batch", 5000), ("threads", -1)])
def test_options_name_the_field_that_is_wrong(field: str, value: int) -> None:
    changed: dict[str, Any] = {field: value}
    with pytest.raises(ExportUsageError, match=f"{field.replace('_', ' ')} {value}: must be"):
        dataclasses.replace(BuildOptions(), **changed)


def test_unknown_target_lists_the_known() -> None:
    with pytest.raises(ExportUsageError, match="unknown target 'tensorflow': choose onnxruntime"):
        builders.get("tensorflow")


@pytest.mark.parametrize("target", builders.TARGETS)
def test_every_target_has_a_builder_that_names_itself(target: str) -> None:
    builder = builders.get(target)
    assert builder.target == target
    assert builder.suffix.startswith(".")
    runner = Path(builders.__file__).parents[2] / "triton_models" / "engine" / f"{builder.runner}.py"
    assert runner.is_file()


def test_key_changes_with_what_decides_the_engine(graphs: tuple[Path, GraphSet]) -> None:
    builder, engine = builders.get("onnxruntime"), graphs[1].engines["he_encoder"]
    key = engine_key(builder, engine, "fp32", BuildOptions())
    assert key == engine_key(
        builder, engine, "fp32", BuildOptions(threads=2)
    )  # threads are the session's, not the file's
    assert key != engine_key(builder, engine, "fp16", BuildOptions())
    assert key != engine_key(builder, engine, "fp32", BuildOptions(max_batch=4))
    assert key != engine_key(builder, graphs[1].engines["stain_cd3"], "fp32", BuildOptions())


def test_missing_onnxruntime_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(BuilderMissingError, match="pip install") as error:
        builders.get("onnxruntime").version()
    assert isinstance(error.value, DependencyError)


def test_damaged_graph_is_refused(graphs: tuple[Path, GraphSet], tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a graph")
    with pytest.raises(GraphsError, match="not a valid ONNX model"):
        builders.get("onnxruntime").build(broken, graphs[1].engines["he_encoder"], tmp_path / "out", BuildOptions())
    empty = tmp_path / "empty.onnx"
    onnx.save(onnx.ModelProto(), empty)
    with pytest.raises(GraphsError, match="not a valid ONNX model"):
        builders.get("onnxruntime").build(empty, graphs[1].engines["he_encoder"], tmp_path / "out", BuildOptions())


def test_tensor_unlike_its_description_is_refused(graphs: tuple[Path, GraphSet], tmp_path: Path) -> None:
    folder, description = graphs
    engine = description.engines["he_encoder"]
    wrong = dataclasses.replace(engine, inputs=(dataclasses.replace(engine.inputs[0], shape=(64, 64, 3)),))
    with pytest.raises(GraphsError, match="input HE is"):
        builders.get("onnxruntime").build(folder / engine.file, wrong, tmp_path / "out", BuildOptions())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "most"), [("max 100000", 1024), ("50000 100000", 1), ("100000 100000", 1), ("?", 1024)]
)
def test_threads_respect_a_containers_quota(tmp_path: Path, text: str, most: int) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert 1 <= available_cpus(tmp_path / "cpu.max") <= most
    assert available_cpus(tmp_path / "absent") >= 1


def test_weights_that_are_not_finite_are_refused(graphs: tuple[Path, GraphSet], tmp_path: Path) -> None:
    folder, graph_set = graphs
    description = next(d for name, d in graph_set.engines.items() if name.startswith("stain_"))
    model = onnx.load(folder / description.file)
    check_graph(folder / description.file, description)
    weight = model.graph.initializer[0]
    values = onnx.numpy_helper.to_array(weight).astype(np.float32).copy()
    values.flat[0] = np.nan
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, tmp_path / "bad.onnx")
    with pytest.raises(GraphsError, match=r"bad\.onnx: .* is not finite: export a checkpoint that is"):
        check_graph(tmp_path / "bad.onnx", description)
