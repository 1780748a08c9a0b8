"""Engines of GPUs on a simulated one: order of streams, TensorRT's API, the models that Triton runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from staindiffuser.export import builders, triton_config
from staindiffuser.export.builders import BuildOptions, Device
from staindiffuser.export.builders.tensorrt import TensorRTBuilder
from staindiffuser.export.description import GraphSet
from staindiffuser.export.manifest import verify
from staindiffuser.export.parity import Golden
from staindiffuser.export.repository import build
from tests.simulated_gpu import api
from tests.simulated_gpu import cupy as simulated_cupy
from tests.simulated_gpu import tensorrt as simulated_tensorrt
from tests.simulated_gpu import triton as simulated_triton
from tests.synthetic_graphs import write_graphs

LINES = sorted(api.WHEELS)
GPU = Device(kind="cuda", name="NVIDIA L4", compute_capability="8.9")


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    write_graphs(folder, tile=32)
    return folder


@pytest.fixture(params=LINES)
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A simulated GPU with CuPy and TensorRT; the module."""
    simulated_cupy.install(monkeypatch)
    monkeypatch.setattr(TensorRTBuilder, "device", lambda self: GPU)
    monkeypatch.setenv("STAINDIFFUSER_CACHE", str(tmp_path / "cache"))
    name = "staindiffuser.triton_models.engine.engine_tensorrt"
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield simulated_tensorrt.install(monkeypatch, request.param)
    sys.modules.pop(name, None)  # it holds the simulated CuPy


def plan(graphs: Path, folder: Path, name: str, **options: Any) -> Path:
    description = GraphSet.load(graphs).engines[name]
    path = folder / f"{name}.plan"
    builders.get("tensorrt").build(graphs / description.file, description, path, BuildOptions(**options))
    return path


def load(path: Path, device: int = 0) -> Any:
    from staindiffuser.triton_models.engine import engine_tensorrt

    return engine_tensorrt.load(path, device=device)


def test_bindings_alone_are_enough(gpu: Any, graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container has TensorRT's libraries; the wheel of the bindings alone is then what is missing."""
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_bindings", gpu)
    path = plan(graphs, tmp_path, "he_encoder")
    result = load(path).run({"HE": np.zeros((1, 32, 32, 3), np.uint8)}, ["FEATURES_0"])
    assert result["FEATURES_0"].shape[0] == 1


def test_bindings_have_every_name_that_is_used() -> None:
    facts = json.loads(api.FACTS.read_text(encoding="utf-8"))
    assert sorted(facts) == LINES
    used = {f"{name}.{member}".lstrip(".") for name, members in api.USED.items() for member in members.split()}
    for line, known in facts.items():
        assert known["version"].startswith(line)
        assert set(known["names"]) == used


def test_the_rtx_bindings_have_them_too() -> None:
    bindings = pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is for x86-64 only")
    facts = json.loads(api.FACTS.read_text(encoding="utf-8"))["11.4"]["names"]
    for name, signatures in api.read_bindings(bindings).items():
        assert set(signatures) & set(facts[name]), f"{name}: {signatures}, but TensorRT has {facts[name]}"


@pytest.mark.network
@pytest.mark.parametrize("line", LINES)
def test_the_facts_are_those_of_the_wheels(line: str) -> None:
    known = json.loads(api.FACTS.read_text(encoding="utf-8"))[line]
    assert list(api.read_wheel(api.WHEELS[line])) == [known["version"], known["names"]]


def test_a_repository_is_built_checked_and_published(gpu: Any, graphs: Path, tmp_path: Path) -> None:
    report = build(graphs, tmp_path / "repository", target="tensorrt", options=BuildOptions(batches=(1, 3)))
    manifest = verify(report.repository)
    assert manifest.engines["stain_cd3"].builder == f"tensorrt {gpu.__version__}"
    assert manifest.engines["stain_cd3"].settings["tf32"] is False
    assert {p.batch for p in manifest.engines["stain_cd3"].parity} == {1, 2, 3}
    assert max(p.max_levels for engine in manifest.engines.values() for p in engine.parity) <= 1
    (timings,) = (tmp_path / "cache" / "timings").iterdir()
    assert timings.read_bytes().count(b"timed") == 5  # one engine's timings are the next one's start


def test_a_plan_is_strongly_typed_without_tf32(gpu: Any, graphs: Path, tmp_path: Path) -> None:
    path = plan(graphs, tmp_path, "he_encoder", batches=(1, 8), workspace_mib=64, verbosity="detailed")
    built = simulated_tensorrt.header(path.read_bytes())
    assert built["flags"] == []
    assert built["workspace"] == 64 << 20
    assert built["verbosity"] == "DETAILED"
    assert [profile["HE"] for profile in built["profiles"]] == [
        [[1, 32, 32, 3], [1, 32, 32, 3], [1, 32, 32, 3]],
        [[2, 32, 32, 3], [8, 32, 32, 3], [8, 32, 32, 3]],
    ]
    compatible = plan(graphs, tmp_path, "he_encoder", version_compatible=True)
    assert simulated_tensorrt.header(compatible.read_bytes())["flags"] == ["VERSION_COMPATIBLE"]


def test_stripped_plans_get_their_weights_back(gpu: Any, graphs: Path, tmp_path: Path) -> None:
    path = plan(graphs, tmp_path, "he_encoder", weight_stripped=True)
    assert simulated_tensorrt.header(path.read_bytes())["flags"] == ["REFIT_IDENTICAL", "STRIP_PLAN"]
    he = {"HE": Golden.load(graphs / "golden.npz").inputs["HE"]}
    bare = load(path).run(he, ["FEATURES_0"])["FEATURES_0"].values
    assert np.isnan(bare.astype(np.float32)).any()
    (tmp_path / "weights.onnx").write_bytes((graphs / "he_encoder.onnx").read_bytes())
    whole = load(path).run(he, ["FEATURES_0"])["FEATURES_0"].values
    expected = builders.get("onnxruntime").load(graphs / "he_encoder.onnx", threads=1).run(he, ["FEATURES_0"])
    np.testing.assert_array_equal(whole, expected["FEATURES_0"])
    (tmp_path / "weights.onnx").write_bytes((graphs / "stain_cd3.onnx").read_bytes())
    with pytest.raises(RuntimeError, match=r"the weights in weights\.onnx do not fit the plan"):
        load(path)


def test_inputs_are_waited_for_wherever_they_come_from(gpu: Any, graphs: Path, tmp_path: Path) -> None:
    """Nothing on another stream has run when the engine is called: what it does not wait for is garbage."""
    engine = load(plan(graphs, tmp_path, "he_encoder", max_batch=4))
    he = Golden.load(graphs / "golden.npz").inputs["HE"]
    expected = builders.get("onnxruntime").load(graphs / "he_encoder.onnx", threads=1).run({"HE": he}, ["FEATURES_3"])
    import cupy

    on_host = engine.join([engine.receive(tile[None]) for tile in he])
    other = cupy.cuda.Stream(non_blocking=True)
    with other:
        on_other = cupy.asarray(he)
        found = [engine.run({"HE": array}, ["FEATURES_3"]) for array in (he, on_host, on_other)]
        joined = engine.join([engine.receive(cupy.asarray(tile[None])) for tile in he])
        found.append(engine.run({"HE": joined}, ["FEATURES_3"]))
    for result in found:
        np.testing.assert_array_equal(result["FEATURES_3"].values, expected["FEATURES_3"])  # complete: nobody waited


def test_batches_find_their_profile_and_others_are_refused(gpu: Any, graphs: Path, tmp_path: Path) -> None:
    engine = load(plan(graphs, tmp_path, "he_encoder", batches=(1, 4)), device=1)
    he = np.zeros((5, 32, 32, 3), np.uint8)
    for batch in (1, 2, 4):
        result = engine.run({"HE": he[:batch]}, ["FEATURES_0"])["FEATURES_0"]
        assert result.shape[0] == batch
        assert result.device == 1
    with pytest.raises(RuntimeError, match="a batch of 5 is outside the plan's profiles"):
        engine.run({"HE": he}, ["FEATURES_0"])
    with pytest.raises(RuntimeError, match=r"HE: shape .* is outside the plan's profile"):
        engine.run({"HE": he[:1, :16]}, ["FEATURES_0"])
    engine.close()


def test_a_plan_of_another_version_is_refused(gpu: Any, graphs: Path, tmp_path: Path) -> None:
    path = plan(graphs, tmp_path, "he_encoder")
    gpu.__version__ = "11.9.0"
    with pytest.raises(RuntimeError, match=r"he_encoder\.plan was not built for this GPU and tensorrt 11\.9\.0"):
        load(path)


def serve(repository: Path, inputs: dict[str, Any], device: int, log: list[str]) -> dict[str, Any]:
    """The ensemble, model after model, each fed with what the one before left on the GPU."""
    tensors = dict(inputs)
    for name in ("he_encoder", "noise", "stain_cd3", "cells_cd3"):
        message = triton_config.parse((repository / name / "config.pbtxt").read_text(encoding="utf-8"))
        wanted = {tensor.name: tensors[tensor.name] for tensor in message.input if tensor.name != "AFTER"}
        with simulated_triton.loaded(repository / name, device=device, log=log) as model:
            (response,) = model.execute([simulated_triton.Request(wanted, [tensor.name for tensor in message.output])])
        tensors.update(response.tensors())
        tensors.update({f"{name} seen": array for name, array in simulated_triton.seen(response).items()})
    return tensors


def test_tritons_models_on_a_gpu(gpu: Any, graphs: Path, tmp_path: Path) -> None:
    repository = build(graphs, tmp_path / "repository", target="tensorrt", options=BuildOptions(max_batch=4)).repository
    golden = Golden.load(graphs / "golden.npz")
    log: list[str] = []
    found = serve(repository, dict(golden.inputs), 1, log)
    for name in ("STAIN_CD3", "CELLS_CD3"):
        levels = np.abs(found[f"{name} seen"].astype(int) - golden.outputs[name])
        assert levels.max() <= 1, name
        assert found[name].device == 1
    assert log == []


def test_requests_are_merged_and_answered_apart(gpu: Any, graphs: Path, tmp_path: Path) -> None:
    repository = build(graphs, tmp_path / "repository", target="tensorrt", options=BuildOptions(max_batch=4)).repository
    he = Golden.load(graphs / "golden.npz").inputs["HE"]
    outputs = [f"FEATURES_{level}" for level in range(4)]
    expected = builders.get("onnxruntime").load(graphs / "he_encoder.onnx", threads=1).run({"HE": he}, outputs)
    first, second, bad = (
        simulated_triton.Request({"HE": tiles}, names)
        for tiles, names in ((he[:2], outputs), (he[2:], ["FEATURES_0"]), (he[:1, :16], outputs))
    )
    log: list[str] = []
    with simulated_triton.loaded(repository / "he_encoder", device=0, log=log) as model:
        two, one = (simulated_triton.seen(response) for response in model.execute([first, second]))
        assert {name: len(array) for name, array in two.items()} == dict.fromkeys(outputs, 2)
        np.testing.assert_array_equal(two["FEATURES_3"], expected["FEATURES_3"][:2])
        np.testing.assert_array_equal(one["FEATURES_0"], expected["FEATURES_0"][2:])
        good, refused = model.execute([second, bad])
        np.testing.assert_array_equal(simulated_triton.seen(good)["FEATURES_0"], expected["FEATURES_0"][2:])
        with pytest.raises(simulated_triton.TritonError, match="outside the plan's profile"):
            refused.tensors()
        model.finalize()
    assert len(log) == 1


def test_noise_without_cupy_is_made_on_the_host(graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVIDIA's Triton container has no CuPy: the noise model must load there all the same."""
    options = BuildOptions(max_batch=4)
    repository = build(graphs, tmp_path / "repository", flavour="python", options=options).repository
    monkeypatch.setitem(sys.modules, "cupy", None)
    inputs = {"ORIGIN": np.array([[-16, 32]]), "SEED": np.array([[7]])}
    log: list[str] = []
    with simulated_triton.loaded(repository / "noise", device=0, log=log) as model:
        (response,) = model.execute([simulated_triton.Request(inputs, ["NOISE", "NOISE_CELLS"])])
        (off_grid,) = model.execute([simulated_triton.Request({**inputs, "ORIGIN": np.array([[8, 0]])}, ["NOISE"])])
    assert len(log) == 1
    assert "pip install cupy-cuda13x" in log[0]
    from staindiffuser.triton_models.noise import philox

    expected = philox.tile_noise(inputs["SEED"], inputs["ORIGIN"], steps=2, height=32, width=32)
    found = simulated_triton.seen(response)
    np.testing.assert_array_equal(found["NOISE"], expected[0])
    np.testing.assert_array_equal(found["NOISE_CELLS"], expected[1])
    assert off_grid.error.code == simulated_triton.TritonError.INVALID_ARG
