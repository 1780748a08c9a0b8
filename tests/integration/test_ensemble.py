"""What an ensemble of Python models computes, asked through a real Triton server."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tritonclient.grpc as triton
from onnx import TensorProto, helper, numpy_helper

from staindiffuser.export.description import GraphSet
from staindiffuser.export.manifest import Manifest
from staindiffuser.export.parity import run_pipeline
from staindiffuser.export.repository import build_repository
from staindiffuser.files import file_sha256
from staindiffuser.serving.server import TritonServer
from staindiffuser.triton_models.engine.engine_onnxruntime import OnnxRuntimeEngine
from tests.synthetic_graphs import write_graphs

Arrays = dict[str, np.ndarray[Any, Any]]
ALL = ("STAIN_CD3", "CELLS_CD3", "STAIN_CK818", "CELLS_CK818")
POISON = 255
"""The test's encoder fails on a tile whose first value is this: an index out of range at run time."""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ensemble")
    write_graphs(folder / "graphs", tile=64)
    return build_repository(folder / "graphs", folder / "repository", flavour="python", threads=1)


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[TritonServer]:
    with TritonServer(repository) as server:
        yield server


@pytest.fixture
def client(server: TritonServer) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(server.url) as client:
        yield client


@pytest.fixture(scope="module")
def engines(repository: Path) -> dict[str, OnnxRuntimeEngine]:
    manifest = Manifest.load(repository)
    return {name: OnnxRuntimeEngine(repository / e.file, threads=1) for name, e in manifest.engines.items()}


def tiles(batch: int, seed: int = 0, size: int = 64) -> Arrays:
    generator = np.random.default_rng(seed)
    return {
        "HE": generator.integers(0, 255, (batch, size, size, 3), dtype=np.uint8),
        "ORIGIN": generator.integers(-64, 64, (batch, 2)) * 16,
        "SEED": generator.integers(0, 2**40, (batch, 1)),
    }


def ask(client: triton.InferenceServerClient, arrays: Arrays, outputs: Sequence[str] = ALL) -> Arrays:
    inputs = []
    for name, dtype in (("HE", "UINT8"), ("ORIGIN", "INT64"), ("SEED", "INT64")):
        inputs.append(triton.InferInput(name, arrays[name].shape, dtype).set_data_from_numpy(arrays[name]))
    requested = [triton.InferRequestedOutput(name) for name in outputs]
    result = client.infer("staindiffuser", inputs, outputs=requested, client_timeout=30)
    return {name: result.as_numpy(name) for name in outputs}


def counts(client: triton.InferenceServerClient) -> dict[str, int]:
    return {model.name: model.execution_count for model in client.get_inference_statistics().model_stats}


def test_bytes_are_those_of_the_engines_called_directly(
    client: triton.InferenceServerClient, repository: Path, engines: dict[str, OnnxRuntimeEngine]
) -> None:
    manifest = Manifest.load(repository)
    for batch in (1, 3, 8):
        arrays = tiles(batch, seed=batch)
        served = ask(client, arrays)
        called = run_pipeline(engines, manifest.engines, steps=manifest.steps, tile=manifest.tile, inputs=arrays)[1]
        for name in ALL:
            np.testing.assert_array_equal(served[name], called[name])


def test_a_request_for_one_stain_runs_only_what_it_needs(client: triton.InferenceServerClient) -> None:
    for output, engine in (("STAIN_CD3", "stain_cd3"), ("CELLS_CK818", "cells_ck818")):
        before = counts(client)
        ask(client, tiles(2), [output])
        for _ in range(50):  # an engine is counted a moment after its answer is on the way
            after = counts(client)
            if after[engine] != before[engine]:
                break
            time.sleep(0.1)
        ran = {name for name in after if after[name] != before[name]}
        assert ran - {"staindiffuser"} == {"he_encoder", "noise", engine}


def test_one_output_has_the_same_bytes_as_among_all(client: triton.InferenceServerClient) -> None:
    arrays = tiles(2, seed=5)
    together = ask(client, arrays)
    for name in ALL:
        np.testing.assert_array_equal(ask(client, arrays, [name])[name], together[name])


def test_same_seed_same_pixels_other_seed_others(client: triton.InferenceServerClient) -> None:
    arrays = tiles(2, seed=6)
    first, again = ask(client, arrays), ask(client, arrays)
    for name in ALL:
        np.testing.assert_array_equal(first[name], again[name])
    other = ask(client, {**arrays, "SEED": arrays["SEED"] + 1})
    assert (other["STAIN_CD3"] != first["STAIN_CD3"]).any()


def test_other_batch_and_order_at_most_one_grey_level(client: triton.InferenceServerClient) -> None:
    arrays = tiles(5, seed=7)
    whole = ask(client, arrays)
    for index in (4, 0, 2):
        alone = ask(client, {name: array[index : index + 1] for name, array in arrays.items()})
        for name in ALL:
            assert np.abs(alone[name][0].astype(int) - whole[name][index]).max() <= 1


@pytest.mark.parametrize("origin", [(8, 0), (0, -17)])
def test_an_origin_off_the_grid_is_refused_and_the_server_goes_on(
    client: triton.InferenceServerClient, origin: tuple[int, int]
) -> None:
    arrays = tiles(2)
    arrays["ORIGIN"][1] = origin
    message = rf"ORIGIN \({origin[0]}, {origin[1]}\) is not a multiple of 16"
    for outputs in (["STAIN_CD3"], ALL):
        with pytest.raises(triton.InferenceServerException, match=message) as error:
            ask(client, arrays, outputs)
        assert error.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert ask(client, tiles(1))["STAIN_CD3"].shape == (1, 64, 64, 3)


def test_a_batch_over_the_limit_is_refused(client: triton.InferenceServerClient) -> None:
    with pytest.raises(triton.InferenceServerException, match="batch"):
        ask(client, tiles(9))
    with pytest.raises(triton.InferenceServerException, match="shape"):
        ask(client, tiles(1, size=32))


def test_requests_at_once_each_get_their_own_answer(client: triton.InferenceServerClient, server: TritonServer) -> None:
    from concurrent.futures import ThreadPoolExecutor

    cases = [tiles(1 + index % 3, seed=20 + index) for index in range(12)]
    alone = [ask(client, case) for case in cases]
    cases[5]["ORIGIN"] = cases[5]["ORIGIN"] + 1

    def one(case: Arrays) -> Arrays | str:
        with triton.InferenceServerClient(server.url) as own:
            try:
                return ask(own, case)
            except triton.InferenceServerException as error:
                return str(error)

    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(one, cases))
    for index, (result, expected) in enumerate(zip(together, alone, strict=True)):
        if index == 5:
            assert "is not a multiple of 16" in str(result)
        else:
            assert isinstance(result, dict)
            for name in ALL:
                np.testing.assert_array_equal(result[name], expected[name])


def break_encoder(folder: Path) -> None:
    """Make the encoder's graph fail at run time on a poisoned tile, and on no other."""
    model = onnx.load(folder / "he_encoder.onnx")
    nodes = [
        helper.make_node("Cast", ["HE"], ["he_int"], to=TensorProto.INT32),
        helper.make_node("ReduceMax", ["he_int"], ["he_max"], keepdims=0),
        helper.make_node("Div", ["he_max", "poison"], ["index"]),  # 1 if the largest value is the poison, else 0
        helper.make_node("Gather", ["one", "index"], ["unit"]),
        helper.make_node("Mul", ["FEATURES_3_raw", "unit"], ["FEATURES_3"]),
    ]
    for node in model.graph.node:
        for index, name in enumerate(node.output):
            if name == "FEATURES_3":
                node.output[index] = "FEATURES_3_raw"
    model.graph.node.extend(nodes)
    model.graph.initializer.append(numpy_helper.from_array(np.array(POISON, np.int32), "poison"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([1], np.float16), "one"))
    onnx.save(model, folder / "he_encoder.onnx")
    graphs = GraphSet.load(folder, verify=False)
    encoder = dataclasses.replace(graphs.engines["he_encoder"], graph_sha256=file_sha256(folder / "he_encoder.onnx"))
    dataclasses.replace(graphs, engines={**graphs.engines, "he_encoder": encoder}).save(folder)


def test_an_engine_that_fails_answers_with_its_error_and_the_server_goes_on(tmp_path: Path) -> None:
    write_graphs(tmp_path / "graphs", tile=32)
    break_encoder(tmp_path / "graphs")
    repository = build_repository(
        tmp_path / "graphs", tmp_path / "repository", flavour="python", max_batch=2, threads=1
    )
    with TritonServer(repository) as server, triton.InferenceServerClient(server.url) as client:
        good = tiles(2, size=32)
        expected = ask(client, good)
        bad = {**good, "HE": good["HE"].copy()}
        bad["HE"][0, 0, 0, 0] = POISON
        for outputs in (ALL, ["STAIN_CD3"], ["CELLS_CD3"]):
            with pytest.raises(triton.InferenceServerException, match=r"he_encoder: .*out of"):
                ask(client, bad, outputs)
        again = ask(client, good)
        for name in ALL:
            np.testing.assert_array_equal(again[name], expected[name])
