"""One trace through client, proxy and Triton, at a collector that the test plays; no name of a slide anywhere."""

from __future__ import annotations

import base64
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from staindiffuser.benchmarks.certificates import Authority
from staindiffuser.export.repository import build_repository
from staindiffuser.serving.arguments import traces_endpoint
from staindiffuser.serving.server import TritonServer
from tests.running_proxy import running
from tests.running_serve import eventually
from tests.synthetic_graphs import write_graphs

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="pip install 'staindiffuser[traces]'")


class Collector(http.server.ThreadingHTTPServer):
    """Receives OTLP over HTTP: the client's protobuf, and Triton's JSON."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Receiver)
        self.bodies: list[bytes] = []
        self.spans: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def of(self, service: str) -> list[dict[str, Any]]:
        return [span for span in list(self.spans) if span["service"] == service]


class _Receiver(http.server.BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        from google.protobuf.json_format import MessageToDict
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Content-Type"].startswith("application/json"):
            message = json.loads(body)
        else:
            message = MessageToDict(ExportTraceServiceRequest.FromString(body))
            for span in _spans(message):  # Protobuf's JSON has base64 where OTLP's has hexadecimal digits
                for name in {"traceId", "spanId", "parentSpanId"} & span.keys():
                    span[name] = base64.b64decode(span[name]).hex()
        self.server.bodies.append(body)
        self.server.spans += _spans(message)
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def _spans(message: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for resource in message["resourceSpans"]:
        (service,) = (
            attribute["value"]["stringValue"]
            for attribute in resource["resource"]["attributes"]
            if attribute["key"] == "service.name"
        )
        for scope in resource["scopeSpans"]:
            for span in scope["spans"]:
                span["service"] = service
                found.append(span)
    return found


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_request_is_one_trace_from_client_to_engine(
    tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    write_graphs(tmp_path / "graphs", tile=64)
    repository = build_repository(tmp_path / "graphs", tmp_path / "models", max_batch=1, threads=1)
    slide = tmp_path / "Jane-Doe-17.tif"
    pixels = np.random.default_rng(0).normal((200, 140, 190), 12, (96, 96, 3)).clip(0, 255).astype(np.uint8)
    tifffile.imwrite(slide, pixels, photometric="rgb", resolution=(20000, 20000), resolutionunit="CENTIMETER")
    authority = Authority.create(tmp_path / "pki")
    for name in ("server", "clinic"):
        authority.issue(name)
    with (
        TritonServer(repository, log=tmp_path / "triton.log") as server,
        running(tmp_path / "pki" / "proxy", [server], authority) as proxy,
    ):
        command = [sys.executable, "-c", "from staindiffuser.cli import main; main()", "stain", str(slide)]
        command += ["--output", str(tmp_path / "out"), "--server", proxy.url]
        for option, file in (("--tls-ca", "ca.pem"), ("--tls-cert", "clinic.pem"), ("--tls-key", "clinic.key")):
            command += [option, str(authority.folder / file)]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=dict(os.environ))
        assert result.returncode == 0, result.stderr
        asked = collector.of("staindiffuser-client")
        assert asked
        traces = {span["traceId"]: span["spanId"] for span in asked}

        def goes_on() -> bool:
            """Whether a trace of the client goes on to Triton's engine. On busy cores exporters may drop others."""
            spans = collector.of("staindiffuser-server")
            below = {s["traceId"] for s in spans if s.get("parentSpanId", "") == traces.get(s["traceId"])}
            return bool(below & {span["traceId"] for span in spans if span["name"] == "compute"})

        assert eventually(goes_on, 20), collector.spans
        log = proxy.log.read_text(encoding="utf-8")
        for span in asked:
            attributes = {a["key"]: a["value"] for a in span["attributes"]}
            request = attributes["staindiffuser.request_id"]["stringValue"]
            (line,) = [line for line in log.splitlines() if f"request={request}" in line]
            assert f" trace={span['traceId']} " in line
    everything = [*collector.bodies, log.encode(), (tmp_path / "triton.log").read_bytes()]
    assert not any(b"Jane-Doe" in text for text in everything)


@pytest.mark.parametrize(
    ("environment", "endpoint"),
    [
        ({}, ""),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318/"}, "http://collector:4318/v1/traces"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://traces/x"}, "http://traces/x"),
    ],
)
def test_the_collector_is_named_by_opentelemetrys_own_variables(environment: dict[str, str], endpoint: str) -> None:
    assert traces_endpoint(environment) == endpoint
