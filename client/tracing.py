"""Traces by OpenTelemetry: one span a request, which the proxy's log names and the server's own spans continue.

Spans say how large a request was and how it ended, never which slide it belongs to. Without the packages (extra
``traces``), and in a program that has not set up OpenTelemetry, nothing is traced.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

__all__ = ["ENDPOINTS", "Tracer", "exporting"]

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
"""OpenTelemetry's environment variables that say where spans go."""
SERVICE = "staindiffuser-client"


class Tracer:
    """Makes the spans of requests."""

    def __init__(self) -> None:
        self._tracer: Any = None
        with contextlib.suppress(ModuleNotFoundError):
            from opentelemetry import propagate, trace

            self._tracer, self._inject, self._kind = trace.get_tracer(SERVICE), propagate.inject, trace.SpanKind.CLIENT

    @contextlib.contextmanager
    def request(self, request_id: str, tiles: int, outputs: Sequence[str]) -> Iterator[dict[str, str]]:
        """A span for a request, its repetitions included; gives the headers that pass it on.

        Args:
            request_id: which Triton and the proxy log too.
            tiles: in the request.
            outputs: the tensors that it asks for.
        """
        if self._tracer is None:
            yield {}
            return
        attributes = {
            "rpc.system": "grpc",
            "staindiffuser.request_id": request_id,
            "staindiffuser.tiles": tiles,
            "staindiffuser.outputs": list(outputs),
        }
        headers: dict[str, str] = {}
        with self._tracer.start_as_current_span("stain tiles", kind=self._kind, attributes=attributes):
            self._inject(headers)
            yield headers


@contextlib.contextmanager
def exporting(say: Callable[[str], None]) -> Iterator[None]:
    """Send the spans of this program to the collector that the environment names, if it names one.

    Args:
        say: is told if the packages are missing.
    """
    named = next((name for name in ENDPOINTS if os.environ.get(name)), None)
    if named is None:
        yield
        return
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError:
        say(f"{named} is set, but nothing is traced: pip install 'staindiffuser[traces]'")
        yield
        return
    provider = TracerProvider(resource=Resource.create({SERVICE_NAME: SERVICE}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    try:
        yield
    finally:
        provider.shutdown()
