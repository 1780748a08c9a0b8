"""The repository for Triton's own TensorRT backend, from the same description: what its configuration says.

TensorRT cannot be had here, so a builder that copies the graph and runs it by ONNX Runtime stands in for it.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from staindiffuser.errors import DependencyError
from staindiffuser.export import builders, triton_config
from staindiffuser.export.builders import BuildOptions, Device, Engine
from staindiffuser.export.builders.tensorrt import TensorRTBuilder
from staindiffuser.export.description import EngineGraph, GraphSet
from staindiffuser.export.errors import ExportUsageError, ManifestError
from staindiffuser.export.manifest import verify
from staindiffuser.export.repository import build
from staindiffuser.serving.server import TritonServer
from staindiffuser.triton_models.engine import engine_onnxruntime
from tests.synthetic_graphs import write_graphs

L4 = Device(kind="cuda", name="NVIDIA L4", compute_capability="8.9")
A100 = Device(kind="cuda", name="NVIDIA A100", compute_capability="8.0")
OPTIONS = BuildOptions(batches=(1, 2, 4))


class StandIn(TensorRTBuilder):
    """Builds nothing, for a GPU that is not here."""

    gpu = L4

    def version(self) -> str:
        return "tensorrt 10.16.0"

    def device(self) -> Device:
        return self.gpu

    def build(self, graph: Path, description: EngineGraph, output: Path, options: BuildOptions) -> None:
        output.write_bytes(graph.read_bytes())

    def load(self, path: Path, *, threads: int) -> Engine:
        return engine_onnxruntime.load(path, threads=1)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    get = builders.get
    monkeypatch.setattr(builders, "get", lambda target: StandIn() if target == "tensorrt" else get(target))
    monkeypatch.setattr(StandIn, "gpu", L4)
    return StandIn


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    write_graphs(folder, tile=32)
    return folder


def native(graphs: Path, output: Path, **options: object) -> Path:
    return build(graphs, output, target="tensorrt", flavour="native", options=OPTIONS).repository


def test_configuration_of_an_engine(graphs: Path, tmp_path: Path) -> None:
    output = native(graphs, tmp_path / "repository")
    description = GraphSet.load(graphs)
    for name, engine in description.engines.items():
        config = triton_config.parse((output / name / "config.pbtxt").read_text())
        assert (config.platform, config.backend, config.max_batch_size) == ("tensorrt_plan", "tensorrt", 4)
        (plan,) = (output / name / "1").iterdir()
        assert plan.suffix == ".plan"
        assert dict(config.cc_model_filenames) == {"8.9": plan.name}
        assert config.default_model_filename == plan.name
        assert list(config.instance_group[0].profile) == ["0", "1", "2"]
        assert config.instance_group[0].count == 1
        assert list(config.instance_group[0].gpus) == [0]  # no instances on other GPUs, which have no CUDA pool
        # Preferred batches, CUDA graphs, warm-up and profiles are one list.
        assert list(config.dynamic_batching.preferred_batch_size) == [1, 2, 4]
        graph_specs = config.optimization.cuda.graph_spec
        assert [spec.batch_size for spec in graph_specs] == [1, 2, 4]
        assert [warmup.batch_size for warmup in config.model_warmup] == [1, 2, 4]
        for spec in graph_specs:
            assert {key: tuple(value.dim) for key, value in spec.input.items()} == {
                tensor.name: tensor.shape for tensor in engine.inputs
            }
        queue = config.dynamic_batching.default_queue_policy
        assert queue.max_queue_size > 0
        assert queue.default_timeout_microseconds > 0
        assert config.dynamic_batching.max_queue_delay_microseconds == 0  # anything else leaks the queue's count
        assert (config.dynamic_batching.priority_levels, config.dynamic_batching.default_priority_level) == (2, 2)
        assert not config.response_cache.enable
    manifest = verify(output)
    assert manifest.flavour == "native"
    assert manifest.batches == (1, 2, 4)
    assert manifest.engines["stain_cd3"].profiles == ((1, 1, 1), (2, 2, 2), (3, 4, 4))
    assert [entry.batch for entry in manifest.engines["stain_cd3"].parity] == [1, 2, 3, 4]
    features = sum(2 * s.shape[0] * s.shape[1] * s.shape[2] for s in description.engines["he_encoder"].outputs)
    assert manifest.cuda_pool_bytes >= 4 * features


def test_the_ensemble_is_the_same_in_both_flavours(graphs: Path, tmp_path: Path) -> None:
    one = native(graphs, tmp_path / "native")
    two = build(graphs, tmp_path / "python", target="tensorrt", options=OPTIONS).repository
    configs = [triton_config.parse((path / "staindiffuser" / "config.pbtxt").read_text()) for path in (one, two)]
    assert configs[0].parameters.pop("priority_levels").string_value == "2"  # only its models have queues
    assert configs[0] == configs[1]
    assert (one / "noise" / "config.pbtxt").read_text() == (two / "noise" / "config.pbtxt").read_text()
    assert (two / "stain_cd3" / "1" / "engine_tensorrt.py").is_file()
    config = triton_config.parse((two / "stain_cd3" / "config.pbtxt").read_text())
    assert config.backend == "python"
    assert list(config.instance_group[0].gpus) == [0]
    assert config.parameters["FORCE_CPU_ONLY_INPUT_TENSORS"].string_value == "no"


def test_plans_of_several_gpus_live_in_one_repository(
    graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = native(graphs, tmp_path / "repository")
    monkeypatch.setattr(StandIn, "gpu", A100)
    with pytest.raises(ManifestError, match=r"engines\.he_encoder\.device is .*L4.* but .*A100.* here"):
        verify(output)
    native(graphs, output)
    config = triton_config.parse((output / "stain_cd3" / "config.pbtxt").read_text())
    assert set(config.cc_model_filenames) == {"8.0", "8.9"}
    assert len(list((output / "stain_cd3" / "1").iterdir())) == 2
    for gpu in (A100, L4):
        monkeypatch.setattr(StandIn, "gpu", gpu)
        verify(output)
    report = build(graphs, output, target="tensorrt", flavour="native", options=OPTIONS)
    assert report.built == ()  # the first GPU's plans are still good
    plan = output / report.manifest.engines["stain_cd3"].others[0].file
    plan.write_bytes(plan.read_bytes()[:-1])
    with pytest.raises(ManifestError, match="differs"):
        verify(output)


def test_another_gpu_in_the_manifest_is_refused(graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = build(graphs, tmp_path / "repository", target="tensorrt", options=OPTIONS).repository
    monkeypatch.setattr(StandIn, "gpu", dataclasses.replace(L4, name="NVIDIA RTX 4090"))
    with pytest.raises(ManifestError, match=r"he_encoder\.device is .*NVIDIA L4.* but .*RTX 4090.* here"):
        TritonServer(output).__enter__()


def test_the_embedded_server_refuses_what_it_cannot_run(graphs: Path, tmp_path: Path) -> None:
    output = native(graphs, tmp_path / "repository")
    with pytest.raises(DependencyError, match=r"TensorRT backend, which the embedded server lacks"):
        TritonServer(output).__enter__()


@pytest.mark.parametrize(
    ("target", "flavour", "options", "words"),
    [
        ("onnxruntime", "native", BuildOptions(), "runs target tensorrt only, not onnxruntime"),
        ("onnxruntime", "vendor", BuildOptions(), "flavour 'vendor': choose single, python, native"),
        ("tensorrt", "native", BuildOptions(weight_stripped=True), "cannot put weights back"),
        ("tensorrt", "python", BuildOptions(compute_capabilities=("8.9",)), "builds for the GPU of this machine"),
        ("tensorrt", "python", BuildOptions(threads=3), "does not use --threads"),
        ("onnxruntime", "python", BuildOptions(queue_length=9), "has no queue: take flavour single, or leave out"),
        ("tensorrt", "", BuildOptions(queue_seconds=9), "has no queue: take flavour single, or leave out"),
    ],
)
def test_combinations_that_do_not_exist(
    graphs: Path, tmp_path: Path, target: str, flavour: str, options: BuildOptions, words: str
) -> None:
    with pytest.raises(ExportUsageError, match=words):
        build(graphs, tmp_path / "repository", target=target, flavour=flavour, options=options)
    assert not list(tmp_path.iterdir())


def test_graphs_without_noise_are_no_native_ensemble(tmp_path: Path) -> None:
    """Triton refuses the ensemble: nothing would read its inputs ORIGIN and SEED."""
    write_graphs(tmp_path / "graphs", tile=32, steps=1, noisy=())
    with pytest.raises(ExportUsageError, match="flavour native needs graphs that read noise"):
        native(tmp_path / "graphs", tmp_path / "repository")
    build(tmp_path / "graphs", tmp_path / "python", target="tensorrt", options=OPTIONS)
    assert not (tmp_path / "python" / "noise").exists()


def test_stripped_plans_bring_their_weights(graphs: Path, tmp_path: Path) -> None:
    options = BuildOptions(batches=(1, 2), weight_stripped=True)
    output = build(graphs, tmp_path / "repository", target="tensorrt", options=options).repository
    assert (output / "stain_cd3" / "1" / "weights.onnx").read_bytes() == (graphs / "stain_cd3.onnx").read_bytes()
    shutil.rmtree(output)
