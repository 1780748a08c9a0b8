"""Whether a server is ready: the process that was started has answered a probe tile through every engine."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from staindiffuser.errors import ServerLostError
from staindiffuser.export.wire import wire_outputs
from staindiffuser.serving.errors import ServerStartError
from staindiffuser.serving.metrics import read_metrics
from staindiffuser.serving.model_links import SERVER_ID, ServedModel

__all__ = ["require_answer", "require_identity", "wait_until_ready"]

START_TIMEOUT = 180.0
BUSY = ("Exceeds maximum queue size", "Request timeout expired")
"""What a server says of a request that finds a queue full or has waited too long."""


def wait_until_ready(
    url: str, models: Sequence[ServedModel], *, identity: str, require_alive: Callable[[], None]
) -> None:
    """Wait until every model of the server answers a probe tile.

    Args:
        url: ``HOST:PORT`` of gRPC.
        models: what it serves.
        identity: what it was given as :data:`~staindiffuser.serving.model_links.SERVER_ID`.
        require_alive: raises the error to report once the server's process has ended.

    Raises:
        ServerStartError: it was not ready in time, failed on the probe tile, or another server answers at ``url``.
    """
    import tritonclient.grpc as triton

    deadline = time.monotonic() + START_TIMEOUT
    # By default gRPC obeys http_proxy even for loopback, and hospitals set it.
    with triton.InferenceServerClient(url, channel_args=[("grpc.enable_http_proxy", 0)]) as client:
        while time.monotonic() < deadline:
            require_alive()
            with contextlib.suppress(triton.InferenceServerException):
                if client.is_server_ready(client_timeout=5):
                    for model in models:
                        config = client.get_model_config(model.ensemble, client_timeout=5).config
                        require_identity(config, identity, url)
                    break
            time.sleep(0.05)
        else:
            raise ServerStartError(f"Triton was not ready after {START_TIMEOUT:.0f} s: see its log (--log)")
        for model in models:
            try:
                _probe(client, model, max(10.0, deadline - time.monotonic()))
            except triton.InferenceServerException as error:
                require_alive()
                raise ServerStartError(
                    f"the model {model.manifest.model_name} failed on a probe tile: {' '.join(str(error).split())}"
                ) from error


def require_answer(url: str, metrics_url: str, model: ServedModel, timeout: float) -> None:
    """Check with a probe tile that a model of a running server still works.

    A server that refuses the tile because it is busy or stopping works, and so does one that only takes long, as long
    as its engines finish anything in the meantime.

    Args:
        url: ``HOST:PORT`` of gRPC.
        metrics_url: Triton's metrics.
        model: of the server.
        timeout: seconds.

    Raises:
        ServerLostError: an engine failed on the tile, or nothing was finished before the time was up.
    """
    import tritonclient.grpc as triton

    until = time.monotonic() + timeout
    with triton.InferenceServerClient(url, channel_args=[("grpc.enable_http_proxy", 0)]) as client:
        before = _finished(client, metrics_url, model)
        while True:
            try:
                return _probe(client, model, max(0.1, until - time.monotonic()))
            except triton.InferenceServerException as error:
                status, message = str(error.status()), " ".join(str(error).split())
                if "INTERNAL" in status:
                    name = model.manifest.model_name
                    raise ServerLostError(f"the model {name} failed on a probe tile: {message}") from error
                # Behind a stuck engine, the tile is refused like all others once it has waited for too long.
                waits = "DEADLINE" in status or any(text in message for text in BUSY)
                if not waits or before is None or _finished(client, metrics_url, model) != before:
                    return None
                if time.monotonic() >= until:
                    raise ServerLostError(f"the server has finished nothing for {timeout:g} s") from error
            time.sleep(1)


def _finished(client: Any, metrics_url: str, model: ServedModel) -> float | None:
    """How much of this model has been computed, in whichever unit, or None if the server does not say."""
    import tritonclient.grpc as triton

    try:
        if model.manifest.flavour == "single":  # Triton counts its requests as soon as they come
            label = f'model_version="{model.manifest.model_version[:12]}"'
            return read_metrics(metrics_url, label)["staindiffuser_requests_total"]
        statistics = client.get_inference_statistics(client_timeout=10).model_stats
    except (OSError, triton.InferenceServerException):
        return None
    mine = {f"{name}{model.suffix}" for name in model.manifest.engines}
    return sum(int(each.execution_count) for each in statistics if each.name in mine)


def require_identity(config: Any, identity: str, url: str) -> None:
    """Check that an ensemble's configuration comes from the server that was started.

    Raises:
        ServerStartError: another server answers at ``url``.
    """
    if config.parameters[SERVER_ID].string_value != identity:
        raise ServerStartError(
            f"another server answers at {url}, although the port was free: find out which process listens there, and "
            "stop it"
        )


def _probe(client: Any, model: ServedModel, timeout: float) -> None:
    """One tile of glass through every engine of a model; its outputs must have the shapes and types of the contract."""
    import tritonclient.grpc as triton

    tile = model.manifest.tile
    glass = np.full((1, tile, tile, 3), 243, np.uint8)
    inputs = [
        triton.InferInput("HE", list(glass.shape), "UINT8").set_data_from_numpy(glass),
        triton.InferInput("ORIGIN", [1, 2], "INT64").set_data_from_numpy(np.zeros((1, 2), np.int64)),
        triton.InferInput("SEED", [1, 1], "INT64").set_data_from_numpy(np.zeros((1, 1), np.int64)),
    ]
    expected = wire_outputs(model.manifest)
    outputs = [triton.InferRequestedOutput(spec.name) for spec in expected]
    result = client.infer(model.ensemble, inputs, outputs=outputs, client_timeout=timeout)
    for spec in expected:
        array = result.as_numpy(spec.name)
        if array is None or array.dtype.name != spec.dtype or array.shape != (1, *spec.shape):
            raise ServerStartError(f"{model.ensemble} answered a probe tile without a valid {spec.name}")
