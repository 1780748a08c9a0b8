"""Substitutes for a server, to test the client and programs that use it without a model or Triton.

``FakeStainer`` works in the same process, ``FakeTriton`` over gRPC like Triton. Both stain with a known function of
tile and origin. By default the image is the H&E itself, so a stained slide must equal the slide.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from staindiffuser.client.contract import ENSEMBLE, QUALITY, ModelContract, ServedStain
from staindiffuser.errors import ServerLostError
from staindiffuser.imaging.arrays import UInt8Array

__all__ = ["FAKE_CONTRACT", "FakeStainer", "FakeTriton", "Paint", "identity"]

FAKE_CONTRACT = ModelContract(
    stains=(ServedStain(name="cd3", label="CD3"), ServedStain(name="ck818", label="CK8/18")),
    tile=256,
    margin=32,
    mpp=0.5,
    steps=2,
    origin_multiple=16,
    max_batch=8,
    model_name="fake",
    model_version="f" * 64,
    notice="A substitute without a model.",
    gate={"cd3": ("radial power 0.34",), "ck818": ()},
)

Paint = Callable[[str, UInt8Array, NDArray[np.int64]], NDArray[Any]]
"""(tensor name, tiles [B,T,T,3], origins [B,2]) → the tensor's value."""


def identity(tensor: str, tiles_BTT3: UInt8Array, origins_B2: NDArray[np.int64]) -> UInt8Array:
    """The image is the H&E; dark pixels belong to cells."""
    if tensor.startswith("STAIN_"):
        return tiles_BTT3
    return np.where(tiles_BTT3.min(axis=-1, keepdims=True) < 100, 255, 0).astype(np.uint8)


class FakeStainer:
    """A :class:`~staindiffuser.client.contract.Stainer` in the same process."""

    url = "fake:0"
    server_version = "fake 0"
    server_id = "fake"

    def __init__(
        self, paint: Paint = identity, contract: ModelContract = FAKE_CONTRACT, *, fail_after: int = -1
    ) -> None:
        """Create a stainer.

        Args:
            paint: stains the tiles.
            contract: its contract.
            fail_after: number of requests after which the server is "lost"; −1 for never.
        """
        self.contract = contract
        self.batches: list[int] = []
        self.cancelled = False
        self._paint = paint
        self._fail_after = fail_after
        self._lock = threading.Lock()

    def stain_tiles(
        self,
        tiles_BTT3: UInt8Array,
        origins_B2: NDArray[np.int64],
        seed: int,
        *,
        stains: Sequence[str] | None = None,
        images: bool = True,
        cells: bool = True,
        quality: bool = False,
    ) -> dict[str, NDArray[Any]]:
        """See :meth:`staindiffuser.client.connection.StainClient.stain_tiles`."""
        with self._lock:
            if len(self.batches) == self._fail_after:
                raise ServerLostError("the fake server was lost, as requested")
            self.batches.append(len(tiles_BTT3))
        _check(tiles_BTT3, origins_B2, self.contract)
        selected = self.contract.select(stains)
        names = [s.image_tensor for s in selected] * images + [s.cells_tensor for s in selected] * cells
        if quality and self.contract.quality is not None:
            names += [QUALITY] + [s.quality_tensor for s in selected] * (images and cells)
        return {name: self._paint(name, tiles_BTT3, origins_B2) for name in names}

    def cancel(self) -> None:
        """Record the call."""
        self.cancelled = True


class FakeTriton:
    """A gRPC server that implements the part of Triton that the client uses; use it as a context manager."""

    def __init__(
        self, paint: Paint = identity, contract: ModelContract = FAKE_CONTRACT, *, delay: float = 0.0, port: int = 0
    ) -> None:
        """Describe the server; entering the context starts it.

        Args:
            paint: stains the tiles.
            contract: published as the ensemble's parameters.
            delay: seconds that a request takes.
            port: on 127.0.0.1; 0 for a free one.
        """
        self.requests = 0
        self.unhealthy = 0
        """Requests to answer next as Triton does when the process of an engine is not healthy."""
        self.busy = 0
        """Requests to refuse next as Triton does when a queue is full."""
        self.hurried = 0
        """Requests to refuse next as a proxy does when a client asks too often."""
        self.priorities: list[int] = []
        self.urgent: list[bool] = []
        """Of the requests so far."""
        self.parameters = _parameters(contract)
        self.model = ENSEMBLE
        self.version = str(int(contract.model_version[:15], 16))
        self._paint, self._contract, self._delay, self._port = paint, contract, delay, port

    @property
    def url(self) -> str:
        """``HOST:PORT``."""
        return f"127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        import grpc  # type: ignore[import-untyped]
        from tritonclient.grpc import service_pb2_grpc

        self._pool = ThreadPoolExecutor(4)
        size = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1), ("grpc.so_reuseport", 0)]
        self._server = grpc.server(self._pool, options=size)
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self._servicer(), self._server)
        self._port = self._server.add_insecure_port(f"127.0.0.1:{self._port}")
        self._server.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.kill()

    def kill(self) -> None:
        """Stop at once; pending requests fail."""
        self._server.stop(None).wait()
        self._pool.shutdown(wait=False)

    def _servicer(self) -> Any:
        import grpc
        from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

        fake = self

        def require_model(name: str, version: str, context: Any) -> None:
            if name != fake.model or version not in ("", fake.version):
                context.abort(grpc.StatusCode.NOT_FOUND, f"unknown model: '{name}' version {version}")

        class Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
            def ServerReady(self, request: Any, context: Any) -> Any:  # noqa: N802
                return service_pb2.ServerReadyResponse(ready=True)

            def ServerMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
                return service_pb2.ServerMetadataResponse(name="fake", version="0")

            def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
                require_model(request.name, "", context)
                return service_pb2.ModelMetadataResponse(name=fake.model, versions=[fake.version])

            def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
                require_model(request.name, request.version, context)
                config = model_config_pb2.ModelConfig(name=fake.model, max_batch_size=fake._contract.max_batch)
                for key, value in fake.parameters.items():
                    config.parameters[key].string_value = value
                return service_pb2.ModelConfigResponse(config=config)

            def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
                fake.requests += 1
                require_model(request.model_name, request.model_version, context)
                fake.priorities.append(request.parameters["priority"].uint64_param)
                fake.urgent.append(request.parameters["urgent"].bool_param)
                if fake.busy:
                    fake.busy -= 1
                    context.abort(grpc.StatusCode.UNAVAILABLE, "[request id: <id_unknown>] Exceeds maximum queue size")
                if fake.hurried:
                    fake.hurried -= 1
                    context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many requests: slow down")
                if fake.unhealthy:
                    fake.unhealthy -= 1
                    context.abort(grpc.StatusCode.INTERNAL, "Stub process 'he_encoder_0_0' is not healthy.")
                time.sleep(fake._delay)
                tensors: dict[str, NDArray[Any]] = {
                    tensor.name: np.frombuffer(raw, dtype=np.uint8 if tensor.datatype == "UINT8" else np.int64).reshape(
                        tuple(tensor.shape)
                    )
                    for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True)
                }
                try:
                    _check(tensors["HE"], tensors["ORIGIN"], fake._contract)
                except ValueError as error:
                    context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
                response = service_pb2.ModelInferResponse(model_name=fake.model)
                for output in request.outputs:
                    value = fake._paint(output.name, tensors["HE"], tensors["ORIGIN"])
                    datatype = "UINT8" if value.dtype == np.uint8 else "FP32"
                    response.outputs.add(name=output.name, datatype=datatype, shape=value.shape)
                    response.raw_output_contents.append(value.tobytes())
                return response

        return Servicer()


def _check(tiles_BTT3: UInt8Array, origins_B2: NDArray[np.int64], contract: ModelContract) -> None:
    if not 1 <= len(tiles_BTT3) <= contract.max_batch or len(origins_B2) != len(tiles_BTT3):
        raise ValueError(f"{len(tiles_BTT3)} tiles with {len(origins_B2)} origins are not an accepted batch")
    if tiles_BTT3.shape[1:] != (contract.tile, contract.tile, 3) or tiles_BTT3.dtype != np.uint8:
        raise ValueError(f"{tiles_BTT3.dtype} {tiles_BTT3.shape[1:]} is not an accepted tile")
    if (origins_B2 % contract.origin_multiple).any():
        raise ValueError(f"ORIGIN must be multiples of {contract.origin_multiple}")


def _parameters(contract: ModelContract) -> dict[str, str]:
    import dataclasses
    import json

    quality = contract.quality
    return {
        **({"gate": json.dumps(contract.gate)} if contract.gate else {}),
        **({"thresholds": json.dumps(contract.thresholds)} if contract.thresholds else {}),
        **({} if quality is None else {"quality": json.dumps(dataclasses.asdict(quality))}),
        "stains": json.dumps([{"name": stain.name, "label": stain.label} for stain in contract.stains]),
        "tile": str(contract.tile),
        "margin": str(contract.margin),
        "mpp": str(contract.mpp),
        "steps": str(contract.steps),
        "origin_multiple": str(contract.origin_multiple),
        "model_name": contract.model_name,
        "model_version": contract.model_version,
        "notice": contract.notice,
        "server_id": secrets.token_hex(16),
        "priority_levels": "2",
    }
