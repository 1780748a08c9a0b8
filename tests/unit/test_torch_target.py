"""The torch target: the graph's operations run by torch; on a CPU without the CUDA graph."""

from __future__ import annotations

import contextlib
import importlib.metadata
import shutil
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from staindiffuser.export import builders
from staindiffuser.export.builders import BuildOptions
from staindiffuser.export.errors import BuilderMissingError, ExportUsageError
from staindiffuser.export.folding import FoldedEncoder
from staindiffuser.export.graphs import write_engines
from staindiffuser.export.manifest import verify
from staindiffuser.export.parity import Golden
from staindiffuser.export.repository import build
from staindiffuser.training.model.network import he_to_network
from staindiffuser.triton_models.engine import engine_onnxruntime, engine_torch
from staindiffuser.triton_models.noise.philox import tile_noise
from tests.synthetic_graphs import write_graphs
from tests.unit.test_pretrained import network_with_backbone


def test_repository_passes_parity_and_verifies(tiny_graphs: Path, tmp_path: Path) -> None:
    report = build(tiny_graphs, tmp_path / "repository", target="torch", options=BuildOptions(max_batch=2, threads=1))
    assert len(report.built) == 5
    manifest = verify(report.repository)
    assert manifest.target == "torch"
    assert manifest.engines["stain_cd3"].builder.startswith("torch ")
    assert max(p.max_levels for e in manifest.engines.values() for p in e.parity) <= 1
    assert (report.repository / manifest.engines["stain_cd3"].file).with_name("engine_torch.py").is_file()


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


@pytest.mark.parametrize(
    ("trunk", "largest"), [(torch.float32, 0.01), (torch.float16, 0.02), (torch.bfloat16, 0.1)], ids=str
)
def test_encoder_with_a_backbone_computes_the_same(tmp_path: Path, trunk: torch.dtype, largest: float) -> None:
    """Its convolutions are padded unevenly, and its ReLU6 has bounds of the graph's precision."""
    network = network_with_backbone()
    he = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        expected = FoldedEncoder(network.encoder)(he_to_network(he))
    write_engines(network, tmp_path, sigmas=[80.0], tile=64, trunk=trunk, only="he_encoder")
    outputs = [f"FEATURES_{level}" for level in range(4)]
    found = engine_torch.load(tmp_path / "he_encoder.onnx", threads=1).run({"HE": he.numpy()}, outputs)
    for name, features in zip(outputs, expected, strict=True):
        difference = torch.from_numpy(found[name]).float() - features
        assert difference.abs().max() < largest * features.abs().max(), name
    if trunk == torch.float32:
        same = engine_onnxruntime.load(tmp_path / "he_encoder.onnx", threads=1).run({"HE": he.numpy()}, outputs)
        for name in outputs:
            np.testing.assert_allclose(found[name], same[name], rtol=2e-3, atol=2e-3)


def test_each_side_is_padded_as_the_graph_says(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    weight = numpy_helper.from_array(rng.standard_normal((1, 1, 3, 3)).astype(np.float32), "w")
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[0, 1, 2, 3], strides=[2, 2])
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 1, None, None]) for n in "xy")
    graph = helper.make_graph([node], "g", [x], [y], [weight])
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=opset), tmp_path / "g.onnx")
    inputs = {"x": rng.standard_normal((1, 1, 8, 8)).astype(np.float32)}
    found, expected = (e.load(tmp_path / "g.onnx").run(inputs, ["y"])["y"] for e in (engine_torch, engine_onnxruntime))
    np.testing.assert_allclose(found, expected, atol=1e-5)


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
    with pytest.raises(ValueError, match=r"g\.onnx: operator Erf is not supported"):
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


def test_channels_last_computes_the_same(tiny_graphs: Path) -> None:
    golden = Golden.load(tiny_graphs / "golden.npz")
    outputs = [f"FEATURES_{level}" for level in range(4)]
    features = {}
    for channels_last in (False, True):
        encoder = engine_torch.load(tiny_graphs / "he_encoder.onnx")
        if channels_last:
            encoder = engine_torch.TorchEngine(tiny_graphs / "he_encoder.onnx", channels_last=True)
            weights = [buffer for buffer in encoder._program.buffers() if buffer.ndim == 4 and buffer.shape[2] > 1]
            assert weights
            assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
        features[channels_last] = encoder.run({"HE": golden.inputs["HE"]}, outputs)
    for name in outputs:
        assert features[True][name].flags.c_contiguous  # what the next engine is given has one layout
        np.testing.assert_allclose(features[True][name], features[False][name], atol=2e-2, rtol=2e-2)
    steps, tile = 2, golden.inputs["HE"].shape[1]
    noise, _ = tile_noise(golden.inputs["SEED"], golden.inputs["ORIGIN"], steps=steps, height=tile, width=tile)
    branch = engine_torch.TorchEngine(tiny_graphs / "stain_cd3.onnx", channels_last=True)
    image = branch.run({**features[True], "NOISE": noise}, ["STAIN_CD3"])["STAIN_CD3"]
    assert np.abs(image.astype(int) - golden.outputs["STAIN_CD3"]).max() <= 1


def test_work_happens_on_the_engines_own_gpu(tiny_graphs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams, graphs and memory are made on the current GPU: it must be the engine's, whichever was current before."""
    current: list[torch.device] = []

    @contextlib.contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        current.append(chosen)
        yield
        current.pop()

    class Captured:
        def __init__(self, program: engine_torch.GraphProgram, inputs: list[torch.Tensor]) -> None:
            assert current[-1:] == [engine._device]
            self.program = program

        def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
            assert current[-1:] == [engine._device]
            return list(self.program(*inputs))

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(engine_torch, "_Captured", Captured)
    waited: list[torch.device] = []
    stream = types.SimpleNamespace(synchronize=lambda: waited.extend(current))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    engine = engine_torch.load(tiny_graphs / "he_encoder.onnx")
    engine._cuda, engine._most_captured = True, 1
    for batch in (1, 2):
        he = engine.join([engine.receive(np.zeros((1, 64, 64, 3), np.uint8)) for _ in range(batch)])
        assert engine.run({"HE": he}, ["FEATURES_0"])["FEATURES_0"].shape[0] == batch
    assert list(engine._captured) == [1]  # the second batch size is one too many, and runs without
    assert waited == [engine._device] * 2
