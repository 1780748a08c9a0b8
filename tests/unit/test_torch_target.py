"""The torch target: the graph's operations run by torch; on a CPU without the CUDA graph."""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from staindiffuser.export import builders
from staindiffuser.export.builders import BuildOptions
from staindiffuser.export.errors import BuilderMissingError, ExportUsageError
from staindiffuser.export.manifest import verify
from staindiffuser.export.repository import build
from staindiffuser.triton_models.engine import engine_onnxruntime, engine_torch
from tests.synthetic_graphs import write_graphs


def test_repository_passes_parity_and_verifies(tiny_graphs: Path, tmp_path: Path) -> None:
    report = build(tiny_graphs, tmp_path / "repository", target="torch", options=BuildOptions(max_batch=2, threads=1))
    assert len(report.built) == 5
    manifest = verify(report.repository)
    assert manifest.target == "torch"
    assert manifest.engines["stain_cd3"].builder.startswith("torch ")
    assert max(p.max_levels for e in manifest.engines.values() for p in e.parity) <= 1
    assert (report.repository / "stain_cd3" / "1" / "engine_torch.py").is_file()


def test_every_operation_computes_what_onnxruntime_computes(tmp_path: Path) -> None:
    """The synthetic graphs use the operations that the exported ones do not."""
    graphs = write_graphs(tmp_path, tile=32)
    rng = np.random.default_rng(0)
    for name, engine in graphs.engines.items():
        inputs = {
            tensor.name: rng.integers(0, 255, (2, *tensor.shape)).astype(tensor.dtype)
            if tensor.dtype == "uint8"
            else rng.standard_normal((2, *tensor.shape)).astype(tensor.dtype)
            for tensor in engine.inputs
        }
        outputs = [tensor.name for tensor in engine.outputs]
        expected = engine_onnxruntime.load(tmp_path / engine.file, threads=1).run(inputs, outputs)
        found = engine_torch.load(tmp_path / engine.file, threads=1).run(inputs, outputs)
        for output in outputs:
            assert found[output].dtype == expected[output].dtype
            difference = np.abs(found[output].astype(np.float32) - expected[output].astype(np.float32))
            assert difference.max() <= (1 if found[output].dtype == np.uint8 else 5e-3), (name, output)


def test_bfloat16_weights_are_read_by_their_bits(tmp_path: Path) -> None:
    weight = helper.make_tensor("w", TensorProto.BFLOAT16, [1], [1.5])
    nodes = [
        helper.make_node("Cast", ["x"], ["b"], to=TensorProto.BFLOAT16),
        helper.make_node("Mul", ["b", "w"], ["m"]),
        helper.make_node("Cast", ["m"], ["y"], to=TensorProto.FLOAT),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [x], [y], [weight])), tmp_path / "g.onnx")
    result = engine_torch.load(tmp_path / "g.onnx").run({"x": np.array([[2, 4]], np.float32)}, ["y"])["y"]
    assert result.tolist() == [[3, 6]]


def test_unknown_operation_is_named(tmp_path: Path) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch"])
    graph = helper.make_graph([helper.make_node("Erf", ["x"], ["y"])], "g", [x], [y])
    onnx.save(helper.make_model(graph), tmp_path / "g.onnx")
    with pytest.raises(ValueError, match=r"g\.onnx: operation Erf is not known"):
        engine_torch.load(tmp_path / "g.onnx")


def test_missing_torch_says_which_targets_work(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def missing(name: str) -> str:
        if name == "torch":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(BuilderMissingError, match=r"torch is not installed: pip install .* work here: onnxruntime"):
        builders.get("torch").version()


def test_options_of_other_targets_are_refused(tiny_graphs: Path, tmp_path: Path) -> None:
    for options, words in (
        (BuildOptions(weight_stripped=True), "does not use --weight-stripped"),
        (BuildOptions(compute_capabilities=("8.9",)), "does not use --compute-capabilities"),
        (BuildOptions(workspace_mib=1), "does not use --workspace-mib"),
    ):
        for target in ("torch", "onnxruntime"):
            with pytest.raises(ExportUsageError, match=words):
                build(tiny_graphs, tmp_path / "repository", target=target, options=options)
    assert not list(tmp_path.iterdir())


def test_captures_only_on_a_gpu(tiny_graphs: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_graphs / "he_encoder.onnx", tmp_path)
    engine = engine_torch.load(tmp_path / "he_encoder.onnx")
    engine.run({"HE": np.zeros((1, 64, 64, 3), np.uint8)}, ["FEATURES_0"])
    if not engine._cuda:
        assert engine._captured == {}
    engine.close()
