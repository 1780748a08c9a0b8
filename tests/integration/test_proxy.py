"""HAProxy in front of real Triton servers: who is let in, what may be asked, and what is refused."""

from __future__ import annotations

import shutil
import signal
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped]
import numpy as np
import pytest
import tritonclient.grpc as triton
from cryptography import x509
from tritonclient.grpc import service_pb2

from staindiffuser.benchmarks.certificates import Authority
from staindiffuser.client import StainClient
from staindiffuser.client.credentials import Credentials
from staindiffuser.client.errors import ServerBusyError, ServerUnreachableError
from staindiffuser.errors import UsageError
from staindiffuser.export.repository import build_repository
from staindiffuser.serving.proxy import ProxyOptions, ProxyServer
from staindiffuser.serving.server import TritonServer
from tests.running_proxy import MAX_MESSAGE, Proxy, haproxy, running
from tests.running_serve import eventually
from tests.synthetic_graphs import write_graphs

TILE = 64
TILES = np.random.default_rng(0).integers(0, 255, (2, TILE, TILE, 3), dtype=np.uint8)
ORIGINS = np.zeros((2, 2), np.int64)
INFER = "/inference.GRPCInferenceService/ModelInfer"
INNER = (
    "he_encoder",
    "noise",
    "stain_cd3",
    "cells_cd3",
    "stain_ck818",
    "cells_ck818",
    "he_encoder-colon-3fa81b2c",
    "staindiffuser2",
)
"""Models that clients may not ask, also of a server with several, and what is only named like an ensemble."""
REFUSED = "status: 400"
"""What a client sees of a request that the guard has refused."""


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    authority = Authority.create(tmp_path_factory.mktemp("pki"))
    authority.issue("server")
    authority.issue("clinic")
    authority.issue("expired", days=-1)
    return authority


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[TritonServer]]:
    haproxy()
    folder = tmp_path_factory.mktemp("servers")
    write_graphs(folder / "graphs", tile=TILE)
    ensemble, single = (
        build_repository(folder / "graphs", folder / flavour, flavour=flavour, max_batch=2, threads=1)
        for flavour in ("python", "single")
    )
    with TritonServer(ensemble) as one, TritonServer(single) as two:
        yield [one, two]


@pytest.fixture(scope="module")
def proxy(servers: list[TritonServer], authority: Authority) -> Iterator[Proxy]:
    with running(authority.folder / "proxy", servers, authority) as proxy:
        yield proxy


def request(model: str = "staindiffuser", **parameters: Any) -> service_pb2.ModelInferRequest:
    """A valid request for one output."""
    message = service_pb2.ModelInferRequest(model_name=model)
    arrays: dict[str, np.ndarray] = {"HE": TILES, "ORIGIN": ORIGINS, "SEED": np.zeros((2, 1), np.int64)}
    for name, array in arrays.items():
        dtype = "UINT8" if array.dtype == np.uint8 else "INT64"
        message.inputs.add(name=name, datatype=dtype, shape=array.shape)
        message.raw_input_contents.append(array.tobytes())
    output = message.outputs.add(name="STAIN_CD3")
    for name, value in parameters.items():
        output.parameters[name].int64_param = value
    return message


def send(proxy: Proxy, data: bytes, call: str = INFER) -> bytes:
    with proxy.channel() as channel:
        answer: bytes = channel.unary_unary(call)(data, timeout=20)
        return answer


def pixels(answer: bytes) -> list[bytes]:
    return list(service_pb2.ModelInferResponse.FromString(answer).raw_output_contents)


def refusal(proxy: Proxy, data: bytes, call: str = INFER) -> str:
    with pytest.raises(grpc.RpcError) as error:
        send(proxy, data, call)
    return str(error.value.details())


@pytest.mark.parametrize("token", [False, True])
def test_a_known_client_gets_the_bytes_of_the_server_itself(
    proxy: Proxy, servers: list[TritonServer], tmp_path: Path, token: bool
) -> None:
    credentials = proxy.credentials()
    if token:
        (tmp_path / "token").write_text("s3cret\n", encoding="utf-8")
        credentials = proxy.credentials("", token_file=tmp_path / "token")
    with StainClient(servers[0].url) as direct, StainClient(proxy.url, credentials=credentials) as client:
        assert client.contract == direct.contract
        expected = direct.stain_tiles(TILES, ORIGINS, 3)
        for _ in range(4):  # from either server
            for name, tensor in client.stain_tiles(TILES, ORIGINS, 3).items():
                np.testing.assert_array_equal(tensor, expected[name])


def test_unknown_clients_are_refused(proxy: Proxy, authority: Authority, tmp_path: Path) -> None:
    with pytest.raises(ServerUnreachableError, match=r"does not know this client .* --tls-cert"):
        StainClient(proxy.url, credentials=proxy.credentials(""))
    (tmp_path / "token").write_text("guessed", encoding="utf-8")
    with pytest.raises(ServerUnreachableError, match="does not know this client"):
        StainClient(proxy.url, credentials=proxy.credentials("", token_file=tmp_path / "token"))
    with pytest.raises(ServerUnreachableError, match=r"expired\.pem expired on \d{4}-\d\d-\d\d: renew it"):
        StainClient(proxy.url, credentials=proxy.credentials("expired"), connect_timeout=3)
    with pytest.raises(ServerUnreachableError):
        StainClient(proxy.url, connect_timeout=3)  # plain text
    stranger = Authority.create(tmp_path / "stranger")
    files = {"certificate": stranger.issue("clinic"), "key": stranger.folder / "clinic.key"}
    with pytest.raises(ServerUnreachableError):
        StainClient(proxy.url, credentials=proxy.credentials("", **files), connect_timeout=3)
    with pytest.raises(ServerUnreachableError):  # and a server with a stranger's certificate is not trusted
        StainClient(proxy.url, credentials=proxy.credentials(authority=stranger.folder / "ca.pem"), connect_timeout=3)


def test_administration_is_not_offered(proxy: Proxy) -> None:
    with proxy.client() as client:
        calls: list[Callable[[], Any]] = [
            client.get_model_repository_index,
            lambda: client.load_model("noise"),
            lambda: client.unload_model("staindiffuser"),
            client.get_inference_statistics,
            client.get_system_shared_memory_status,
            lambda: client.register_system_shared_memory("x", "/x", 64),
            client.get_trace_settings,
            client.get_log_settings,
        ]
        for call in calls:
            with pytest.raises(triton.InferenceServerException, match="this call is not offered"):
                call()


@pytest.mark.parametrize("model", INNER)
def test_inner_models_do_not_answer(proxy: Proxy, model: str) -> None:
    assert REFUSED in refusal(proxy, request(model).SerializeToString())
    for call, message in (
        ("ModelConfig", service_pb2.ModelConfigRequest(name=model)),
        ("ModelMetadata", service_pb2.ModelMetadataRequest(name=model)),
    ):
        data = message.SerializeToString()
        assert REFUSED in refusal(proxy, data, f"/inference.GRPCInferenceService/{call}")


def test_a_second_model_name_does_not_pass(proxy: Proxy) -> None:
    """Protobuf takes the last one, so that looking at the first would not do."""
    valid = request().SerializeToString()
    assert service_pb2.ModelInferResponse.FromString(send(proxy, valid)).outputs[0].name == "STAIN_CD3"
    name = service_pb2.ModelInferRequest(model_name="he_encoder").SerializeToString()
    assert REFUSED in refusal(proxy, valid + name)
    assert REFUSED in refusal(proxy, name + valid)


def test_what_costs_or_reveals_more_than_tiles_is_refused(proxy: Proxy) -> None:
    assert REFUSED in refusal(proxy, request(classification=100).SerializeToString())
    assert REFUSED in refusal(proxy, request(shared_memory_byte_size=100).SerializeToString())
    shared = request()
    shared.inputs[0].parameters["shared_memory_region"].string_param = "x"
    assert REFUSED in refusal(proxy, shared.SerializeToString())
    assert REFUSED in refusal(proxy, request().SerializeToString() + b"\x9a\x06\x00")  # field 99
    large = request()
    large.raw_input_contents[0] = bytes(MAX_MESSAGE)
    assert REFUSED in refusal(proxy, large.SerializeToString())


def test_damaged_requests_leave_it_ready_and_right(proxy: Proxy) -> None:
    valid = request().SerializeToString()
    expected = pixels(send(proxy, valid))
    rng = np.random.default_rng(0)
    outcomes = []
    with proxy.channel() as channel:
        call = channel.unary_unary(INFER)
        for index in range(300):
            data = bytearray(valid)
            if index % 3 == 0:
                data = data[: rng.integers(0, len(data))]
            for position in rng.integers(0, min(len(data), 200), 3) if len(data) > 0 else []:
                data[position] = rng.integers(0, 256)
            try:
                call(bytes(data), timeout=20)
                outcomes.append(grpc.StatusCode.OK)  # a changed seed or pixel is a valid request
            except grpc.RpcError as error:
                outcomes.append(error.code())
    assert grpc.StatusCode.DEADLINE_EXCEEDED not in outcomes
    assert grpc.StatusCode.INTERNAL in outcomes, "the guard refused none"
    assert pixels(send(proxy, valid)) == expected


def test_random_bytes_and_half_requests_leave_it_ready(proxy: Proxy, authority: Authority) -> None:
    rng = np.random.default_rng(1)
    host, port = proxy.url.split(":")
    context = ssl.create_default_context(cafile=authority.folder / "ca.pem")
    context.load_cert_chain(authority.folder / "clinic.pem")
    context.set_alpn_protocols(["h2"])
    for index in range(60):
        with socket.create_connection((host, int(port)), timeout=5) as plain:
            if index % 2:
                plain.sendall(rng.bytes(500))
                continue
            with context.wrap_socket(plain, server_hostname="localhost") as connection:
                connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + rng.bytes(200) * (index % 4 > 0))
    assert send(proxy, request().SerializeToString())


def test_metrics_are_for_known_clients_and_nothing_else_is_there(proxy: Proxy, authority: Authority) -> None:
    context = ssl.create_default_context(cafile=authority.folder / "ca.pem")

    def status(path: str) -> int:
        try:
            with urllib.request.urlopen(proxy.metrics + path, context=context, timeout=10) as response:
                assert b"nv_inference_count" in response.read()
                return int(response.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    assert status("/metrics") == 401
    context.load_cert_chain(authority.folder / "clinic.pem")
    assert status("/metrics") == 200
    assert status("/") == 404
    assert status("/v2/models") == 404


def test_health_is_told_without_a_certificate_and_nothing_else(proxy: Proxy) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{proxy.health}/healthz", timeout=10) as response:
        assert response.status == 200
    with pytest.raises(urllib.error.HTTPError, match="404"):
        opener.open(f"{proxy.health}/metrics", timeout=10)


def test_the_access_log_says_who_and_what_without_payload(proxy: Proxy) -> None:
    def calls() -> list[str]:
        return [line for line in proxy.log.read_text().splitlines() if f"call={INFER}" in line]

    before = len(calls())
    send(proxy, request().SerializeToString())
    # Lines of refused requests that other tests sent may still come in between.
    assert eventually(lambda: any("http=200" in line for line in calls()[before:]))
    line = next(line for line in calls()[before:] if "http=200" in line)
    assert 'client="clinic"' in line
    assert " id=" in line
    assert "s3cret" not in proxy.log.read_text()


def test_a_client_that_asks_too_often_is_slowed_down(servers: list[TritonServer], authority: Authority) -> None:
    folder = authority.folder / "limited"
    with running(folder, servers, authority, requests_per_10s=20) as proxy, proxy.client() as client:
        deadline = time.monotonic() + 60

        def ask_until_refused() -> None:
            while time.monotonic() < deadline:
                client.is_server_ready()

        with pytest.raises(triton.InferenceServerException, match="too many requests") as error:
            ask_until_refused()
        assert error.value.status() == "StatusCode.RESOURCE_EXHAUSTED"

        def stain_until_refused(client: StainClient) -> None:
            while time.monotonic() < deadline:
                client.stain_tiles(TILES, ORIGINS, 0)

        # A slide waits for its turn, as at a busy server; it does not fail.
        authority.issue("night")
        with (
            StainClient(proxy.url, credentials=proxy.credentials("night"), busy_patience=0) as night,
            pytest.raises(ServerBusyError, match="too many requests"),
        ):
            stain_until_refused(night)


def test_a_server_that_ends_is_left_out(servers: list[TritonServer], authority: Authority) -> None:
    with (
        TritonServer(servers[1].repositories[0]) as third,
        running(authority.folder / "three", [third, servers[1]], authority) as proxy,
        StainClient(proxy.url, credentials=proxy.credentials()) as client,
    ):
        expected = client.stain_tiles(TILES, ORIGINS, 0)
        third.stop()
        for _ in range(6):
            for name, tensor in client.stain_tiles(TILES, ORIGINS, 0).items():
                np.testing.assert_array_equal(tensor, expected[name])


def test_a_certificate_is_replaced_without_losing_a_request(
    servers: list[TritonServer], authority: Authority, tmp_path: Path
) -> None:
    certificate = tmp_path / "proxy.pem"
    shutil.copyfile(authority.folder / "server.pem", certificate)

    def serial(proxy: Proxy) -> int:
        host, port = proxy.url.split(":")
        return x509.load_pem_x509_certificate(ssl.get_server_certificate((host, int(port))).encode()).serial_number

    def replaced(proxy: Proxy) -> bool:
        try:
            return serial(proxy) != before
        except OSError:  # a new connection, while the new process takes over
            return False

    def told_to_reload(proxy: Proxy) -> bool:
        assert proxy.process is not None
        proxy.process.send_signal(signal.SIGUSR2)
        return eventually(lambda: replaced(proxy), 20)

    # Tokens too, so that the check above can look at the certificate without one of its own.
    with (
        running(authority.folder / "reloaded", servers, authority, certificate=certificate) as proxy,
        ExitStack() as stack,
    ):
        before = serial(proxy)
        # With the patience that clients have: HAProxy closes connections that are idle at this moment.
        clients = [stack.enter_context(StainClient(proxy.url, credentials=proxy.credentials())) for _ in range(2)]
        expected = clients[0].stain_tiles(TILES, ORIGINS, 0)
        answered = [0, 0]
        stop = threading.Event()

        def keep_asking(number: int) -> None:
            while not stop.is_set():
                for name, tensor in clients[number].stain_tiles(TILES, ORIGINS, 0).items():
                    np.testing.assert_array_equal(tensor, expected[name])
                answered[number] += 1

        with ThreadPoolExecutor(2) as pool:
            asking = [pool.submit(keep_asking, number) for number in range(2)]
            try:
                shutil.copyfile(authority.issue("renewed"), certificate)
                # Seen once, on busy cores: the signal had no effect, and the old process went on. So it is sent again.
                assert any(told_to_reload(proxy) for _ in range(3)), proxy.log.read_text()[-4000:]
                then = list(answered)
                assert eventually(lambda: all(now > old + 1 for now, old in zip(answered, then, strict=True)))
            finally:
                stop.set()
            for future in asking:
                future.result(timeout=60)


def test_a_server_whose_certificate_has_expired_is_named(authority: Authority) -> None:
    old = authority.folder / "expired.pem"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        probe.listen()
        url = f"localhost:{probe.getsockname()[1]}"
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(old)
        context.set_alpn_protocols(["h2"])

        def answer() -> None:
            while True:
                try:
                    connection, _ = probe.accept()
                    with connection, context.wrap_socket(connection, server_side=True) as secure:
                        secure.recv(1)
                except ssl.SSLError:
                    continue  # the client has refused the certificate
                except OSError:
                    return

        threading.Thread(target=answer, daemon=True).start()
        credentials = Credentials(authority=authority.folder / "ca.pem")
        with pytest.raises(ServerUnreachableError, match=rf"the certificate of {url} expired on .*: renew it"):
            StainClient(url, credentials=credentials, connect_timeout=3)
        probe.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"client_ca": None}, "--client-ca, --tokens or both"),
        ({"listen": "8443"}, "--listen 8443: must be ADDRESS:PORT"),
        ({"servers": ()}, "--server: name at least one"),
        ({"certificate": Path("missing.pem")}, "missing.pem is not a file"),
        ({"in_flight": 0}, "--in-flight 0: must be at least 1"),
    ],
)
def test_impossible_options_are_refused(authority: Authority, changes: dict[str, Any], words: str) -> None:
    options = {
        "listen": "127.0.0.1:8443",
        "servers": (ProxyServer.parse("127.0.0.1:8001:8002"),),
        "certificate": authority.folder / "server.pem",
        "client_ca": authority.folder / "ca.pem",
    }
    with pytest.raises(UsageError, match=words):
        ProxyOptions(**{**options, **changes})
