"""The flavour ``single``, the default on a CPU: all engines in one process, and clients see no difference."""

from __future__ import annotations

import json
import queue
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton

from staindiffuser.client import StainClient
from staindiffuser.client.errors import RefusedRequestError
from staindiffuser.errors import UsageError
from staindiffuser.export.builders import BuildOptions
from staindiffuser.export.description import GraphSet
from staindiffuser.export.errors import ExportUsageError
from staindiffuser.export.manifest import verify
from staindiffuser.export.parity import run_pipeline
from staindiffuser.export.quality import add_quality
from staindiffuser.export.repository import build
from staindiffuser.export.triton_config import parse
from staindiffuser.serving.preflight import require_shared_memory
from staindiffuser.serving.server import TritonServer
from staindiffuser.triton_models.engine.engine_onnxruntime import OnnxRuntimeEngine
from tests.reference_tissue import tissue, write_reference
from tests.synthetic_graphs import write_graphs

OPTIONS = BuildOptions(max_batch=4, threads=1)
RNG = np.random.default_rng(0)
TILES = RNG.integers(0, 255, (3, 64, 64, 3), dtype=np.uint8)
ORIGINS = RNG.integers(-64, 64, (3, 2)) * 16


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("single")
    write_graphs(folder / "graphs", tile=64)
    add_quality(folder / "graphs", [write_reference(folder / "reference", size=64, slides=6, tiles_per_slide=6)])
    return folder / "graphs"


@pytest.fixture(scope="module")
def repository(graphs: Path) -> Path:
    return build(graphs, graphs.parent / "single", options=OPTIONS).repository


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[TritonServer]:
    with TritonServer(repository, requests=repository.parent / "requests.jsonl") as server:
        yield server


@pytest.fixture(scope="module")
def ensemble(graphs: Path) -> Iterator[TritonServer]:
    repository = build(graphs, graphs.parent / "ensemble", flavour="python", options=OPTIONS).repository
    with TritonServer(repository) as server:
        yield server


def test_one_model_in_one_process(repository: Path, server: TritonServer) -> None:
    manifest = verify(repository)
    assert manifest.flavour == "single"
    assert {path.parent.name for path in repository.glob("*/config.pbtxt")} == {"staindiffuser"}
    assert all(engine.file.startswith("staindiffuser/") for engine in manifest.engines.values())
    config = parse((repository / "staindiffuser" / "config.pbtxt").read_text(encoding="utf-8"))
    assert [warmup.batch_size for warmup in config.model_warmup] == [1]  # more would delay a restart
    children = psutil.Process(server.pid).children(recursive=True)
    assert len(children) == 1


def test_the_contract_and_the_bytes_are_those_of_the_ensemble(server: TritonServer, ensemble: TritonServer) -> None:
    with StainClient(server.url) as one, StainClient(ensemble.url) as many:
        assert one.contract == many.contract
        for batch in (1, 3):
            expected = many.stain_tiles(TILES[:batch], ORIGINS[:batch], 7, quality=True)
            got = one.stain_tiles(TILES[:batch], ORIGINS[:batch], 7, quality=True)
            images = ["STAIN_CD3", "STAIN_CK818", "CELLS_CD3", "CELLS_CK818"]
            assert list(got) == [*images, "QUALITY", "QUALITY_CD3", "QUALITY_CK818"]
            for name, tensor in got.items():
                np.testing.assert_array_equal(tensor, expected[name])
        whole = one.stain_tiles(TILES, ORIGINS, 7)
        some = {
            **one.stain_tiles(TILES, ORIGINS, 7, stains=["cd3"], cells=False),
            **one.stain_tiles(TILES, ORIGINS, 7, stains=["ck818"], images=False),
        }
        assert list(some) == ["STAIN_CD3", "CELLS_CK818"]
        for name, tensor in some.items():
            np.testing.assert_array_equal(tensor, whole[name])


def test_the_same_tile_has_the_same_bytes_whatever_is_beside_it_and_whoever_answers(repository: Path) -> None:
    """Alone among glass, at each place among other tiles, many requests at once, from two replicas, after a restart."""
    tile, origin = TILES[0], ORIGINS[0]
    others = np.random.default_rng(1).integers(0, 255, TILES.shape, dtype=np.uint8)

    def answers(client: StainClient) -> list[dict[str, np.ndarray]]:
        batches = [(np.full_like(TILES, 243), 0), *((others, place) for place in range(3))]

        def send(batch: tuple[np.ndarray, int]) -> dict[str, np.ndarray]:
            tiles, origins = batch[0].copy(), ORIGINS.copy()
            tiles[batch[1]], origins[batch[1]] = tile, origin
            return {name: found[batch[1]] for name, found in client.stain_tiles(tiles, origins, 7).items()}

        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(send, batches))

    with TritonServer(repository) as one, TritonServer(repository) as two:
        with StainClient(one.url) as first, StainClient(two.url) as second:
            found = [*answers(first), *answers(second)]
            alone = first.stain_tiles(tile[None], origin[None], 7)
        one.restart()
        with StainClient(one.url) as again:
            found += answers(again)
    for answer in found:
        for name, array in answer.items():
            np.testing.assert_array_equal(array, found[0][name])
            assert np.abs(array.astype(int) - alone[name][0]).max() <= 1  # another batch size


def test_a_request_is_a_line_of_the_log(repository: Path, server: TritonServer) -> None:
    log = repository.parent / "requests.jsonl"
    with StainClient(server.url) as client, triton.InferenceServerClient(server.url) as raw:
        client.stain_tiles(TILES, ORIGINS, 7, cells=False)
        off_grid = {"HE": TILES[:1], "ORIGIN": ORIGINS[:1] + 1, "SEED": np.zeros((1, 1), np.int64)}
        inputs = [
            triton.InferInput(name, list(a.shape), "UINT8" if a.dtype == np.uint8 else "INT64").set_data_from_numpy(a)
            for name, a in off_grid.items()
        ]
        with pytest.raises(triton.InferenceServerException, match="multiple of 16"):
            raw.infer("staindiffuser", inputs, outputs=[triton.InferRequestedOutput("CELLS_CD3")], request_id='x"\n')
    answered, refused = map(json.loads, log.read_text(encoding="utf-8").splitlines()[-2:])
    assert re.fullmatch("[0-9a-f]{16}", answered["request"])
    assert (answered["tiles"], sorted(answered["outputs"])) == (3, ["STAIN_CD3", "STAIN_CK818"])
    assert answered["status"] == "OK"
    assert answered["model_version"] == verify(repository).model_version[:12]
    assert 0 < answered["ms"] < 60_000
    assert 0 <= answered["waited_ms"] < 60_000
    assert (refused["request"], refused["status"]) == ('x"\n', "INVALID_ARG")
    with pytest.raises(UsageError, match="--requests: no process of the flavour python sees a whole request"):
        refuses_to_log(repository.parent)


def refuses_to_log(folder: Path) -> None:
    python = build(folder / "graphs", folder / "logged", flavour="python", options=OPTIONS).repository
    with TritonServer(python, requests=folder / "requests.jsonl"):
        pass


def test_requests_are_not_merged(server: TritonServer) -> None:
    """Merged ones would run one by one, and the first answer would wait for the last."""
    with StainClient(server.url, in_flight=8) as client, ThreadPoolExecutor(8) as pool:
        before = client.execution_counts()["staindiffuser"]
        list(pool.map(lambda seed: client.stain_tiles(TILES[:1], ORIGINS[:1], seed, cells=False), range(12)))
        assert client.execution_counts()["staindiffuser"] == before + 12


def test_a_faulty_request_is_named_and_the_next_is_answered(server: TritonServer) -> None:
    with StainClient(server.url) as client:
        with pytest.raises(RefusedRequestError, match=r"ORIGIN \(8, 0\) is not a multiple of 16"):
            client.stain_tiles(TILES[:1], np.array([[8, 0]]), 0)
        with triton.InferenceServerClient(server.url) as raw:
            he = triton.InferInput("HE", [1, 32, 32, 3], "UINT8").set_data_from_numpy(TILES[:1, :32, :32])
            with pytest.raises(triton.InferenceServerException, match="missing required input"):
                raw.infer("staindiffuser", [he])
        assert client.stain_tiles(TILES[:1], ORIGINS[:1], 0)["STAIN_CD3"].shape == (1, 64, 64, 3)


def test_requests_that_are_not_asked_for_run_nothing(
    graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model itself, with Triton's utilities and its engines replaced by recorders."""
    import importlib.util
    import sys
    import types

    ran: list[str] = []

    class Recorder:
        def __init__(self, path: Path) -> None:
            self.name = path.name

        def receive(self, tensor: np.ndarray) -> np.ndarray:
            return tensor

        def run(self, inputs: dict[str, np.ndarray], outputs: list[str]) -> dict[str, np.ndarray]:
            ran.append(f"{self.name}({', '.join(n for n in inputs if n.startswith('NOISE'))})")
            return dict.fromkeys(outputs, np.zeros((1, 64, 64, 3), np.uint8))

        def close(self) -> None:
            pass

    description = GraphSet.load(graphs)
    engines = {
        name: {"file": name, "inputs": [t.name for t in e.inputs], "outputs": [t.name for t in e.outputs]}
        for name, e in description.engines.items()
    }
    arrays = {"HE": TILES[:1], "ORIGIN": ORIGINS[:1], "SEED": np.zeros((1, 1), np.int64)}
    utilities = types.ModuleType("triton_python_backend_utils")
    utilities.__dict__.update(
        get_input_tensor_by_name=lambda request, name: types.SimpleNamespace(as_numpy=lambda: arrays[name]),
        Tensor=lambda name, array: name,
        InferenceResponse=lambda tensors=None, error=None: (tensors, error),
        TritonError=types.SimpleNamespace,
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=1,
    )
    runner = types.ModuleType("recorder")
    runner.__dict__["load"] = lambda path, threads, device: Recorder(path)
    from staindiffuser.triton_models.noise import philox
    from staindiffuser.triton_models.shared import gate, meters, request_log, request_queue

    modules = {"triton_python_backend_utils": utilities, "recorder": runner, "philox": philox, "gate": gate}
    modules |= {"meters": meters, "request_log": request_log, "request_queue": request_queue}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    path = Path(gate.__file__).parents[1] / "pipeline" / "model.py"
    spec = importlib.util.spec_from_file_location("pipeline_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "_DLPACK", False)
    parameters = {"runner": "recorder", "engines": json.dumps(engines), "steps": "2", "tile": "64", "threads": "1"}
    parameters |= {"queue_length": "4", "queue_seconds": "60"}
    model = module.TritonPythonModel()
    config = {"parameters": {name: {"string_value": value} for name, value in parameters.items()}}
    model.initialize(
        {"model_config": json.dumps(config), "model_instance_kind": "CPU", "model_instance_device_id": "0"}
    )
    for output, expected in (
        ("STAIN_CD3", ["he_encoder()", "stain_cd3(NOISE)"]),
        ("CELLS_CK818", ["he_encoder()", "cells_ck818(NOISE_CELLS)"]),
        ("QUALITY", ["he_encoder()", "quality()"]),
        ("QUALITY_CD3", ["he_encoder()", "stain_cd3(NOISE)", "cells_cd3(NOISE_CELLS)", "quality_cd3()"]),
    ):
        ran.clear()
        answers: queue.SimpleQueue[object] = queue.SimpleQueue()
        sender = types.SimpleNamespace(send=lambda response, flags, answers=answers: answers.put((response, flags)))
        asked = types.SimpleNamespace(
            requested_output_names=lambda output=output: [output],
            request_id=lambda: "17",
            parameters=lambda: "{}",
            timeout=lambda: 0,
            get_response_sender=lambda sender=sender: sender,
        )
        assert model.execute([asked]) == [None]
        assert answers.get(timeout=60) == (([output], None), 1)
        assert (ran[0], ran[-1], sorted(ran)) == (expected[0], expected[-1], sorted(expected))  # some side by side
    model.finalize()


def test_quality_is_what_the_engines_say_and_runs_only_what_it_reads(graphs: Path, ensemble: TritonServer) -> None:
    """Through Triton: the values of ONNX Runtime, with any choice of outputs; ``QUALITY`` alone needs no branch."""
    description = GraphSet.load(graphs)
    he = np.stack([tissue(RNG, 64) for _ in range(2)])
    engines = {name: OnnxRuntimeEngine(graphs / e.file, threads=1) for name, e in description.engines.items()}
    inputs = {"HE": he, "ORIGIN": ORIGINS[:2], "SEED": np.full((2, 1), 7)}
    wanted = run_pipeline(engines, description.engines, steps=description.steps, tile=64, inputs=inputs)[1]
    with StainClient(ensemble.url) as client:
        got = client.stain_tiles(he, ORIGINS[:2], 7, quality=True)
        for name in ("QUALITY", "QUALITY_CD3", "QUALITY_CK818"):
            np.testing.assert_allclose(got[name], wanted[name], rtol=1e-5, atol=1e-6)
        assert got["QUALITY"][:, 0].min() > 0.5
        before = client.execution_counts()
        client.stain_tiles(he, ORIGINS[:2], 7, stains=["cd3"], cells=False, quality=True)
        after = client.execution_counts()
    ran = {name for name in after if after[name] > before[name]}
    assert ran - {"staindiffuser"} == {"he_encoder", "noise", "stain_cd3", "quality"}


def test_less_shared_memory_is_needed(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features stay in the process: only tiles and results pass through /dev/shm."""
    import shutil
    import types

    wire = 4 * 64 * 64 * (3 + 2 * 3 + 2 * 1)
    enough = types.SimpleNamespace(free=int(1.25 * wire) + (9 << 20) + 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: enough)
    require_shared_memory([verify(repository)])


def test_what_does_not_fit_is_refused(graphs: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportUsageError, match="choose single, python, native"):
        build(graphs, tmp_path / "x", flavour="double")
