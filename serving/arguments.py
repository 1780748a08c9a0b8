"""The command line of tritonserver."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from staindiffuser.export.manifest import Manifest
from staindiffuser.export.wire import ENCODER

__all__ = ["LOOPBACK", "RESTRICTED", "traces_endpoint", "triton_arguments"]

LOOPBACK = "127.0.0.1"
RESTRICTED = ("model-repository", "shared-memory", "trace", "logging")
"""Protocols that nobody may use."""
SERVICE = "staindiffuser-server"
"""Name of the server in traces."""
STUB_SECONDS = 120
"""In which a process of the Python backend must have loaded its model; Triton's 30 are too few for a busy machine."""


def traces_endpoint(environment: Mapping[str, str]) -> str:
    """Where OpenTelemetry's own environment variables want spans to be sent by OTLP over HTTP; empty for nowhere."""
    everything = environment.get("OTEL_EXPORTER_OTLP_ENDPOINT", "").rstrip("/")
    return environment.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or (everything and f"{everything}/v1/traces")


def triton_arguments(
    manifests: Sequence[Manifest],
    models: Path,
    backends: Path,
    *,
    grpc_port: int,
    metrics_port: int,
    shm_prefix: str,
    traces: str = "",
) -> list[str]:
    """Arguments for a server on loopback: no HTTP, no model control, no port reuse, closed administration protocols.

    Args:
        manifests: of the repositories.
        models: the model repository for Triton.
        backends: the backend directory.
        grpc_port: for clients.
        metrics_port: for Prometheus.
        shm_prefix: prefix of the names of shared-memory regions.
        traces: see :func:`traces_endpoint`.
    """
    arguments = {
        "model-repository": str(models),
        "backend-directory": str(backends),
        "model-control-mode": "none",
        "disable-auto-complete-config": "",  # an incomplete configuration is refused
        "strict-readiness": "true",
        "exit-on-error": "true",
        "exit-timeout-secs": "5",
        "allow-http": "false",
        "grpc-address": LOOPBACK,
        "grpc-port": str(grpc_port),
        "reuse-grpc-port": "false",
        "metrics-address": LOOPBACK,
        "metrics-port": str(metrics_port),
        "allow-metrics": "true",
        "log-format": "ISO8601",
        # The key is thrown away: these protocols are closed, not protected by a secret.
        "grpc-restricted-protocol": f"{','.join(RESTRICTED)}:closed={secrets.token_hex(32)}",
    }
    if all(manifest.engines[ENCODER].device.kind == "cpu" for manifest in manifests):
        arguments["pinned-memory-pool-byte-size"] = "0"
        arguments["allow-gpu-metrics"] = "false"
    else:
        # Holds the features between models; Triton silently falls back to host memory when it is full.
        arguments["cuda-memory-pool-byte-size"] = f"0:{sum(manifest.cuda_pool_bytes for manifest in manifests)}"
    backend = {"shm-region-prefix-name": shm_prefix, "stub-timeout-seconds": str(STUB_SECONDS)}
    tracing = ["mode=opentelemetry", f"opentelemetry,url={traces}", "level=TIMESTAMPS", "rate=1"] if traces else []
    if traces:
        tracing.append(f"opentelemetry,resource=service.name={SERVICE}")
    return [
        *(f"--trace-config={setting}" for setting in tracing),
        *(f"--{name}={value}" if value else f"--{name}" for name, value in arguments.items()),
        *(f"--backend-config=python,{name}={value}" for name, value in backend.items()),
    ]
