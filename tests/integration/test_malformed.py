"""Whatever arrives on its ports, the server stays the same process, ready and correct.

Requests are wrong in every way that the protocol allows (shapes, types, sizes, names, origins, batches, parameters,
shared memory), in ways that it does not (damaged messages), and no requests at all (random bytes, half an HTTP/2
connection). The real Triton, with synthetic engines.
"""

from __future__ import annotations

import collections
import contextlib
import socket
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped]
import numpy as np
import psutil
import pytest
from tritonclient.grpc import service_pb2

from staindiffuser.client import StainClient
from staindiffuser.export.builders import BuildOptions
from staindiffuser.export.repository import build
from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.serving.server import TritonServer
from tests.synthetic_graphs import write_graphs

TILE = 64
TILES = np.random.default_rng(0).integers(0, 256, (2, TILE, TILE, 3), dtype=np.uint8)
METHOD = "/inference.GRPCInferenceService/"
METHODS = (
    "ServerMetadata", "ModelMetadata", "ModelConfig", "ModelStatistics", "RepositoryIndex", "RepositoryModelLoad",
    "RepositoryModelUnload", "SystemSharedMemoryRegister", "CudaSharedMemoryRegister", "TraceSetting", "LogSettings",
    "NoSuchMethod",
)  # fmt: skip
SHAPES: tuple[list[int], ...] = (
    [], [0], [1], [-1], [1, TILE, TILE], [1, TILE, TILE, 4], [1, TILE + 1, TILE, 3], [TILE, TILE, 3],
    [0, TILE, TILE, 3], [-1, TILE, TILE, 3], [1000, TILE, TILE, 3], [2**31, TILE, TILE, 3],
    [2**62, 4, 4, 4], [2**63 - 1], [1] * 200,
)  # fmt: skip
NAMES = ("", "he", "HE\0", "FEATURES_0", "STAIN_CD3", "NOISE", "AFTER", "../HE", "H" * 5000, "Ä€")
MODELS = ("", "noise", "he_encoder", "stain_cd3", "staindiffuse", "../staindiffuser", "s" * 5000)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    folder = tmp_path_factory.mktemp("malformed")
    write_graphs(folder / "graphs", tile=TILE)
    repository = build(
        folder / "graphs", folder / "repository", options=BuildOptions(max_batch=4, threads=1)
    ).repository
    with TritonServer(repository) as server:
        yield server


def valid() -> Any:
    """One tile, one output."""
    request = service_pb2.ModelInferRequest(model_name="staindiffuser", id="1")
    arrays: dict[str, tuple[np.ndarray, str]] = {
        "HE": (TILES[:1], "UINT8"),
        "ORIGIN": (np.zeros((1, 2), np.int64), "INT64"),
    }
    arrays["SEED"] = (np.zeros((1, 1), np.int64), "INT64")
    for name, (array, datatype) in arrays.items():
        request.inputs.add(name=name, datatype=datatype, shape=array.shape)
        request.raw_input_contents.append(array.tobytes())
    request.outputs.add(name="CELLS_CD3")
    return request


def malformed(rng: np.random.Generator) -> tuple[str, bytes]:
    """A method and the body of a request that is certainly wrong, or was damaged so that it most likely is."""
    request = valid()
    which = int(rng.integers(3))
    tensor = request.inputs[which]
    match int(rng.integers(16)):
        case 0:
            del tensor.shape[:]
            tensor.shape.extend(SHAPES[rng.integers(len(SHAPES))])
        case 1:
            tensor.datatype = ("FP32", "BYTES", "BOOL", "", "UINT9", "INT32")[rng.integers(6)]
        case 2:
            size = len(request.raw_input_contents[which])
            length = int(rng.choice([0, 1, size - 1, size + 1, 3 * size]))
            request.raw_input_contents[which] = b"x" * length
        case 3:
            tensor.name = NAMES[rng.integers(len(NAMES))]
        case 4:
            request.raw_input_contents[1] = np.array([[8, 1 + rng.integers(15)]], np.int64).tobytes()  # off the grid
        case 5:
            request.model_name = MODELS[rng.integers(len(MODELS))]
        case 6:
            request.model_version = ("0", "-1", "99", "x", "1" * 400)[rng.integers(5)]
        case 7:
            del request.inputs[which]
        case 8:
            del request.raw_input_contents[which]
        case 9:
            request.outputs[0].name = ("", "CELLS_HER2", "QUALITY", "X" * 5000)[rng.integers(4)]
        case 10:
            tensor.parameters["shared_memory_region"].string_param = "staindiffuser_0"
            tensor.parameters["shared_memory_byte_size"].int64_param = int(rng.integers(-5, 2**40))
        case 11:
            request.outputs[0].parameters["shared_memory_region"].string_param = "/dev/shm/x"
            request.outputs[0].parameters["shared_memory_byte_size"].int64_param = 100
        case 12:
            request.inputs.add(name="HE", datatype="UINT8", shape=[1, TILE, TILE, 3])  # twice
        case 13:
            name = ("sequence_id", "priority", "timeout", "binary_data_output")[rng.integers(4)]
            request.parameters[name].string_param = "x"
            request.raw_input_contents[0] = b""
        case 14:
            body = bytearray(request.SerializeToString())
            head = min(len(body), 200)
            for place in rng.integers(0, head, 8):
                body[place] = rng.integers(256)
            return "ModelInfer", bytes(body[: int(rng.integers(1, len(body)))])
        case _:
            return METHODS[rng.integers(len(METHODS))], rng.bytes(int(rng.integers(0, 300)))
    return "ModelInfer", request.SerializeToString()


def shout(port: int, rng: np.random.Generator) -> None:
    """Something that is no request, on a port; then hang up."""
    choice = int(rng.integers(5))
    data = [
        rng.bytes(int(rng.integers(1, 4000))),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + rng.bytes(int(rng.integers(0, 200))),
        b"GET /metrics HTTP/1.1\r\nHost: " + b"a" * int(rng.integers(0, 20000)),
        b"POST /metrics HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n",
        b"",
    ][choice]
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.settimeout(0.05)
        connection.sendall(data)
        if choice % 2:
            connection.recv(100)


@pytest.mark.parametrize("count", [600, pytest.param(10_000, marks=pytest.mark.slow)])
def test_what_is_wrong_is_refused_and_changes_nothing(server: TritonServer, count: int) -> None:
    with StainClient(server.url) as client:
        expected = client.stain_tiles(TILES, seed=5)
    triton = psutil.Process(server.pid)
    processes = {triton, *triton.children(recursive=True)}
    statuses: collections.Counter[str] = collections.Counter()
    lock = threading.Lock()
    grpc_port, metrics_port = int(server.url.rpartition(":")[2]), int(server.metrics_url.split(":")[2].split("/")[0])
    threads = 4

    def attack(number: int) -> None:
        rng = np.random.default_rng(number)
        with grpc.insecure_channel(server.url, options=[("grpc.enable_http_proxy", 0)]) as channel:
            for index in range(count // threads):
                if index % 10 == 9:
                    shout(grpc_port if index % 20 == 9 else metrics_port, rng)
                    continue
                method, body = malformed(rng)
                call = channel.unary_unary(METHOD + method)
                try:
                    call(body, timeout=60)
                    status = "OK" if method == "ModelInfer" and len(body) > TILE * TILE * 3 else "harmless"
                except grpc.RpcError as error:
                    status = error.code().name
                with lock:
                    statuses[status] += 1

    with ThreadPoolExecutor(threads) as pool, StainClient(server.url) as client:
        attacks = [pool.submit(attack, number) for number in range(threads)]
        while not all(future.done() for future in attacks):  # meanwhile, others are served
            assert_same(client.stain_tiles(TILES, seed=5), expected)
        for future in attacks:
            future.result()
    print(dict(statuses))
    assert sum(statuses.values()) >= 0.85 * count
    assert not statuses["DEADLINE_EXCEEDED"], statuses  # nothing hangs
    assert statuses["OK"] < 0.05 * count, statuses
    assert {triton, *triton.children(recursive=True)} == processes
    with StainClient(server.url) as client:
        assert_same(client.stain_tiles(TILES, seed=5), expected)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(server.metrics_url, timeout=10) as response:
        assert b"nv_inference_request_success" in response.read()


def assert_same(found: dict[str, UInt8Array], expected: dict[str, UInt8Array]) -> None:
    assert list(found) == list(expected)
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name])


def test_administration_is_refused(server: TritonServer) -> None:
    """By name, with the right message: loading, unloading, shared memory, traces and logs."""
    with grpc.insecure_channel(server.url, options=[("grpc.enable_http_proxy", 0)]) as channel:
        for method, request in (
            ("RepositoryModelLoad", service_pb2.RepositoryModelLoadRequest(model_name="staindiffuser")),
            ("RepositoryModelUnload", service_pb2.RepositoryModelUnloadRequest(model_name="staindiffuser")),
            ("RepositoryIndex", service_pb2.RepositoryIndexRequest()),
            ("SystemSharedMemoryRegister", service_pb2.SystemSharedMemoryRegisterRequest(name="x", key="/x")),
            ("TraceSetting", service_pb2.TraceSettingRequest()),
            ("LogSettings", service_pb2.LogSettingsRequest()),
        ):  # fmt: skip
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(METHOD + method)(request.SerializeToString(), timeout=10)
            assert caught.value.code().name == "UNAVAILABLE", method
            assert "restricted" in caught.value.details(), method


def test_a_client_that_vanishes_leaves_the_server_working(server: TritonServer, tmp_path: Path) -> None:
    """In the middle of sending, and while it waits."""
    with StainClient(server.url) as client:
        expected = client.stain_tiles(TILES, seed=1)
        for number in range(20):
            with grpc.insecure_channel(server.url, options=[("grpc.enable_http_proxy", 0)]) as channel:
                call = channel.unary_unary(METHOD + "ModelInfer").future(valid().SerializeToString())
                if number % 2:
                    call.cancel()
            port = int(server.url.rpartition(":")[2])
            with socket.create_connection(("127.0.0.1", port)) as connection:  # an HTTP/2 frame that never ends
                connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x10\x00\x00\x00\x00\x00\x00\x01half")
        assert_same(client.stain_tiles(TILES, seed=1), expected)
