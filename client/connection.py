"""gRPC connection to a Triton server that serves the ensemble ``staindiffuser``."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from staindiffuser.client.contract import ENSEMBLE, ModelContract
from staindiffuser.client.errors import ContractError, RefusedRequestError, ServerUnreachableError
from staindiffuser.errors import ServerError, ServerLostError, StainDiffuserError
from staindiffuser.imaging.arrays import UInt8Array

__all__ = ["StainClient"]

INT32_MAX = 2**31 - 1


class StainClient:
    """Stains tiles on a server; thread-safe.

    Each call is one request. At most ``in_flight`` requests run at a time; further callers wait.

    Raises:
        ServerUnreachableError: no server answers at ``url``, or it is not ready.
        ContractError: the server has no ensemble that this client understands.
    """

    def __init__(
        self,
        url: str,
        *,
        in_flight: int = 4,
        deadline: float = 300.0,
        connect_timeout: float = 10.0,
        use_proxy: bool = False,
    ) -> None:
        """Connect and read the model's contract.

        Args:
            url: ``HOST:PORT`` of the server's gRPC endpoint.
            in_flight: concurrent requests.
            deadline: seconds to wait for the answer to a request before the server counts as lost.
            connect_timeout: seconds to wait for the first answer.
            use_proxy: obey ``http_proxy``, as gRPC does by default. Off here, because a proxy meant for the web
                intercepts even requests to the loopback address.
        """
        import tritonclient.grpc as triton  # slow to import

        if in_flight < 1:
            raise ValueError(f"in_flight must be at least 1, not {in_flight}")
        self._url = url
        self._deadline = deadline
        self._slots = threading.BoundedSemaphore(in_flight)
        self._cancelled = threading.Event()
        self._triton = triton
        # channel_args replaces all of tritonclient's defaults, message sizes included.
        self._client = triton.InferenceServerClient(
            url,
            channel_args=[
                ("grpc.max_send_message_length", INT32_MAX),
                ("grpc.max_receive_message_length", INT32_MAX),
                ("grpc.enable_http_proxy", int(use_proxy)),
            ],
        )
        try:
            self._contract, self._server_version = self._read_contract(connect_timeout)
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        """``HOST:PORT`` of the server."""
        return self._url

    @property
    def server_version(self) -> str:
        """Name and version of the server, such as ``triton 2.51.0``."""
        return self._server_version

    @property
    def contract(self) -> ModelContract:
        """Inputs, outputs and identity of the served model."""
        return self._contract

    def stain_tiles(
        self,
        tiles_BTT3: UInt8Array,
        origins_B2: NDArray[np.int64] | None = None,
        seed: int = 0,
        *,
        stains: Sequence[str] | None = None,
        images: bool = True,
        cells: bool = True,
    ) -> dict[str, UInt8Array]:
        """Stain a batch of tiles.

        Args:
            tiles_BTT3: H&E at the model's pixel size; B is at most the contract's ``max_batch``.
            origins_B2: x and y of each tile's top-left pixel, in pixels of the slide at the model's pixel size; 0, 0
                for tiles that belong to no slide.
            seed: determines the noise, together with the origin.
            stains: names of the stains, None for all; the server computes no others.
            images: request ``STAIN_<NAME>``, uint8 [B,T,T,3].
            cells: request ``CELLS_<NAME>``, uint8 [B,T,T,1], probability × 255.

        Returns:
            The output tensors by name.

        Raises:
            UnknownStainError: the model does not have a requested stain.
            RefusedRequestError: the server rejects the request, for example an origin that is not a multiple of 16.
            ServerLostError: the server went away or did not answer within the deadline.
        """
        triton = self._triton
        selected = self._contract.select(stains)
        names = [s.image_tensor for s in selected] * images + [s.cells_tensor for s in selected] * cells
        if not names:
            raise ValueError("request images, cells or both")
        if origins_B2 is None:
            origins_B2 = np.zeros((len(tiles_BTT3), 2), dtype=np.int64)
        seeds_B1 = np.full((len(tiles_BTT3), 1), seed, dtype=np.int64)
        inputs = [
            triton.InferInput("HE", list(tiles_BTT3.shape), "UINT8").set_data_from_numpy(tiles_BTT3),
            triton.InferInput("ORIGIN", list(origins_B2.shape), "INT64").set_data_from_numpy(origins_B2),
            triton.InferInput("SEED", list(seeds_B1.shape), "INT64").set_data_from_numpy(seeds_B1),
        ]
        outputs = [triton.InferRequestedOutput(name) for name in names]
        with self._slots, self._lost("while staining"):
            if self._cancelled.is_set():
                raise ServerLostError(f"the requests to {self._url} were cancelled")
            result = self._client.infer(ENSEMBLE, inputs, outputs=outputs, client_timeout=self._deadline)
        tensors: dict[str, UInt8Array] = {}
        for name in names:
            tensor = result.as_numpy(name)
            expected = (*tiles_BTT3.shape[:3], 3 if name.startswith("STAIN_") else 1)
            if tensor is None or tensor.dtype != np.uint8 or tensor.shape != expected:
                got = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
                raise ContractError(f"{self._url} returned {got} for {name}, not uint8 {list(expected)}")
            tensors[name] = tensor
        return tensors

    def execution_counts(self) -> dict[str, int]:
        """How many times each of the server's models has run, for tests and benchmarks."""
        with self._lost("while reading its statistics"):
            statistics = self._client.get_inference_statistics(client_timeout=self._deadline)
        return {model.name: int(model.execution_count) for model in statistics.model_stats}

    def cancel(self) -> None:
        """Abort all requests, from any thread; later calls fail."""
        self._cancelled.set()
        self.close()

    def close(self) -> None:
        """Close the connection; pending requests are cancelled."""
        with contextlib.suppress(ValueError):  # from grpc, if the channel is already closed
            self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _read_contract(self, timeout: float) -> tuple[ModelContract, str]:
        try:
            if not self._client.is_server_ready(client_timeout=timeout):
                raise ServerUnreachableError(
                    f"the server at {self._url} is not ready: wait until it is, or check its log"
                )
            metadata = self._client.get_server_metadata(client_timeout=timeout)
        except self._triton.InferenceServerException as error:
            raise ServerUnreachableError(
                f"no server answers at {self._url} ({_reason(error)}): start one with `staindiffuser serve REPO`, "
                "or omit --server to use the demonstration model"
            ) from error
        try:
            config: Any = self._client.get_model_config(ENSEMBLE, client_timeout=timeout).config
        except self._triton.InferenceServerException as error:
            raise ContractError(f"the server at {self._url} has no model {ENSEMBLE!r} ({_reason(error)})") from error
        parameters: Mapping[str, str] = {key: value.string_value for key, value in config.parameters.items()}
        contract = ModelContract.from_config(parameters, max_batch=max(1, config.max_batch_size), server=self._url)
        return contract, f"{metadata.name} {metadata.version}"

    @contextlib.contextmanager
    def _lost(self, when: str) -> Iterator[None]:
        """Translate the exceptions of tritonclient and grpc."""
        try:
            yield
        except StainDiffuserError:
            raise
        except self._triton.InferenceServerException as error:
            raise self._translated(error, when) from error
        except ValueError as error:  # from grpc, on a channel that cancel() has closed
            raise ServerLostError(f"the connection to {self._url} was closed {when}") from error

    def _translated(self, error: Exception, when: str) -> StainDiffuserError:
        status = str(getattr(error, "status", lambda: "")())
        if "INVALID_ARGUMENT" in status:
            return RefusedRequestError(f"the server at {self._url} rejects the request: {_reason(error)}")
        if "DEADLINE" in status:
            return ServerLostError(
                f"the server at {self._url} did not answer within {self._deadline:g} s: raise --timeout, "
                "or send smaller batches with --batch"
            )
        if "UNAVAILABLE" in status or "CANCELLED" in status:
            return ServerLostError(
                f"the server at {self._url} was lost {when} ({_reason(error)}): nothing was written; restart it"
            )
        return ServerError(f"the server at {self._url} failed {when}: {_reason(error)}")


def _reason(error: Exception) -> str:
    """The error's message as one line of at most 200 characters."""
    message = getattr(error, "message", lambda: None)() or str(error)
    first = " ".join(str(message).split())
    return first if len(first) <= 200 else first[:197] + "..."
