"""gRPC connection to a Triton server that serves the ensemble ``staindiffuser``, or several."""

from __future__ import annotations

import contextlib
import random
import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from staindiffuser.client.contract import ENSEMBLE, QUALITY, ModelContract
from staindiffuser.client.credentials import Credentials
from staindiffuser.client.errors import (
    ContractError,
    ModelChangedError,
    RefusedRequestError,
    ServerBusyError,
    ServerUnreachableError,
)
from staindiffuser.client.offered import choose_model, offered_models
from staindiffuser.client.tracing import Tracer
from staindiffuser.errors import ServerError, ServerLostError, StainDiffuserError, UsageError
from staindiffuser.imaging.arrays import UInt8Array

__all__ = ["StainClient"]

INT32_MAX = 2**31 - 1
MODEL_HEADER, VERSION_HEADER = "x-staindiffuser-model", "x-staindiffuser-version"
"""Headers by which a proxy chooses among several models, and versions of one."""
REQUEST_HEADER = "x-staindiffuser-request"
"""Header that tells a proxy the id under which Triton logs a request."""
SERVER_ID = "server_id"
"""The ensemble's parameter that holds the random identity of a server's start."""
PATIENCE = 30.0
"""Seconds to wait for a lost server to return."""
RETRY_SECONDS = 0.5
"""Pause between attempts to reach a lost server."""
BUSY_PATIENCE = 900.0
"""Seconds to send a request again and again to a server that refuses it because it has too much to do."""
BUSY_PAUSE, LONGEST_BUSY_PAUSE = 0.5, 10.0
"""Seconds between those attempts: at first, and at most; half of each is random: clients must not come all at once."""
_BUSY = ("Exceeds maximum queue size", "Request timeout expired", "too many requests")
"""What a server says, as UNAVAILABLE, of a request that finds a queue full or has waited too long; and a proxy, as
RESOURCE_EXHAUSTED, of a client that asks too often."""
URGENT, ORDINARY = 1, 2
"""Priority levels of the server's queues."""
_PRIORITY_LEVELS = "priority_levels"
"""The model's parameter that says that requests wait in queues which know urgent ones."""
_LOST = ("UNAVAILABLE", "CANCELLED", "NOT_FOUND")
"""Statuses of a server that is gone, stopping, overloaded, or replaced by one with another model."""
_SILENT = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")
"""Statuses that say nothing about a model: of a server, or a proxy before it, that has too much to do, or is ending."""
_BROKEN = ("is not healthy", "Stream removed", "Received RST_STREAM")
"""Messages of other statuses that mean the same: Triton's of an engine's process that has died, or that a busy machine
lets starve; and gRPC's, as UNKNOWN or INTERNAL, of an answer that broke off since a server behind a proxy ended."""


@dataclass(frozen=True, kw_only=True)
class _Served:
    """What a server says about itself."""

    contract: ModelContract
    server_version: str
    server_id: str
    """Random for each start; empty for a server that does not say."""
    has_queues: bool
    """Whether requests wait where urgent ones go first."""
    ensemble: str
    """What the model is called in requests."""
    ensemble_version: str
    """The number that Triton gives the ensemble's version; it is derived from the model version."""


class StainClient:
    """Stains tiles on a server; thread-safe.

    Each call is one request. At most ``in_flight`` requests run at a time; further callers wait.

    A request whose server is lost is sent again when the same model is served again. Every request names the version of
    the model that was found when the client connected, so that no other model can answer it.

    Raises:
        ServerUnreachableError: no server answers at ``url``, or it is not ready.
        ContractError: the server has no ensemble that this client understands.
        UsageError: the server lacks the model that is asked for, or has several and none was asked for; urgent requests
            to a server that has no queues.
    """

    def __init__(
        self,
        url: str,
        *,
        in_flight: int = 4,
        deadline: float = 300.0,
        connect_timeout: float = 10.0,
        patience: float = PATIENCE,
        busy_patience: float = BUSY_PATIENCE,
        urgent: bool = False,
        model: str = "",
        use_proxy: bool = False,
        credentials: Credentials | None = None,
    ) -> None:
        """Connect and read the model's contract.

        Args:
            url: ``HOST:PORT`` of the server's gRPC endpoint.
            in_flight: concurrent requests.
            deadline: seconds to wait for the answer to a request before the server counts as lost.
            connect_timeout: seconds to wait for the first answer.
            patience: seconds to wait for a lost server to return with the same model.
            busy_patience: seconds to send a request again that the server refuses because it has too much to do.
            urgent: requests go before all ordinary ones that wait on the server.
            model: name of the model that is wanted, or ``NAME@VERSION`` with the version's first digits, where a server
                or a proxy offers several; by default the only one, or a proxy's current one.
            use_proxy: obey ``http_proxy``, as gRPC does by default. Off here, because a proxy meant for the web
                intercepts even requests to the loopback address.
            credentials: for a server that is offered on a network; None for plain text.
        """
        import tritonclient.grpc as triton  # slow to import

        if in_flight < 1:
            raise ValueError(f"in_flight must be at least 1, not {in_flight}")
        self._url, self._model = url, model
        self._deadline = deadline
        self._patience, self._busy_patience = patience, busy_patience
        # Triton's own queues read the one, and the model of the flavour `single`, which keeps its requests, the other.
        self._priority = URGENT if urgent else ORDINARY
        self._parameters = {"urgent": True} if urgent else None
        self._slots = threading.BoundedSemaphore(in_flight)
        self._cancelled = threading.Event()
        self._triton = triton
        self._tracer = Tracer()
        self._credentials = credentials = credentials or Credentials()
        # In the request for Triton, and as a header (RFC 9218) for a proxy, which does not read requests.
        self._headers = {**credentials.headers(), **({"priority": "u=1"} if urgent else {})}
        if model:
            self._headers[MODEL_HEADER] = model.partition("@")[0]
        # channel_args replaces all of tritonclient's defaults, message sizes included.
        self._client = triton.InferenceServerClient(
            url,
            **credentials.tls(),
            channel_args=[
                ("grpc.max_send_message_length", INT32_MAX),
                ("grpc.max_receive_message_length", INT32_MAX),
                ("grpc.enable_http_proxy", int(use_proxy)),
                ("grpc.max_reconnect_backoff_ms", int(1000 * RETRY_SECONDS)),
            ],
        )
        try:
            self._served = self._introduce(connect_timeout)
            # From here on a proxy sends this client to servers of this version, whatever is promoted meanwhile.
            self._headers[VERSION_HEADER] = self._served.ensemble_version
            if urgent and not self._served.has_queues:
                raise UsageError(
                    f"the server at {url} has no queue in which urgent requests could go first: leave out --urgent, or "
                    "build its repository with --flavour single"
                )
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
        return self._served.server_version

    @property
    def server_id(self) -> str:
        """Random identity of the server's start, as it was when the client connected."""
        return self._served.server_id

    @property
    def contract(self) -> ModelContract:
        """Inputs, outputs and identity of the served model."""
        return self._served.contract

    def stain_tiles(
        self,
        tiles_BTT3: UInt8Array,
        origins_B2: NDArray[np.int64] | None = None,
        seed: int = 0,
        *,
        stains: Sequence[str] | None = None,
        images: bool = True,
        cells: bool = True,
        quality: bool = False,
    ) -> dict[str, NDArray[Any]]:
        """Stain a batch of tiles.

        Args:
            tiles_BTT3: H&E at the model's pixel size; B is at most the contract's ``max_batch``.
            origins_B2: x and y of each tile's top-left pixel, in pixels of the slide at the model's pixel size; 0, 0
                for tiles that belong to no slide.
            seed: determines the noise, together with the origin.
            stains: names of the stains, None for all; the server computes no others.
            images: request ``STAIN_<NAME>``, uint8 [B,T,T,3].
            cells: request ``CELLS_<NAME>``, uint8 [B,T,T,1], probability × 255.
            quality: request ``QUALITY``, float32 [B,M] and, with images and cells, ``QUALITY_<NAME>``, float32 [B,N];
                the contract says what they measure. Nothing is requested of a model that does not judge its tiles.

        Returns:
            The output tensors by name.

        Raises:
            UnknownStainError: the model does not have a requested stain.
            RefusedRequestError: the server rejects the request, for example an origin that is not a multiple of 16.
            ServerLostError: the server went away and did not return, or did not answer within the deadline.
            ServerBusyError: it refused the request for too long because it has too much to do.
            ModelChangedError: the server was replaced by one with another model.
        """
        triton = self._triton
        selected = self.contract.select(stains)
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
        shapes = {name: (*tiles_BTT3.shape[:3], 3 if name.startswith("STAIN_") else 1) for name in names}
        if quality and self.contract.quality is not None:
            shapes[QUALITY] = (len(tiles_BTT3), len(self.contract.quality.tile))
            if images and cells and self.contract.quality.stain:
                of_stain = (len(tiles_BTT3), len(self.contract.quality.stain))
                shapes |= dict.fromkeys((stain.quality_tensor for stain in selected), of_stain)
        outputs = [triton.InferRequestedOutput(name) for name in shapes]
        request_id = secrets.token_hex(8)
        with (
            self._slots,
            self._lost("while staining"),
            self._tracer.request(request_id, len(tiles_BTT3), list(shapes)) as trace_headers,
        ):
            headers = {**self._headers, REQUEST_HEADER: request_id, **trace_headers}
            result = self._infer(inputs, outputs, request_id, headers)
        tensors: dict[str, NDArray[Any]] = {}
        for name, expected in shapes.items():
            tensor = result.as_numpy(name)
            dtype = "float32" if name.startswith(QUALITY) else "uint8"
            if tensor is None or tensor.dtype != dtype or tensor.shape != expected:
                got = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
                raise ContractError(f"{self._url} returned {got} for {name}, not {dtype} {list(expected)}")
            tensors[name] = tensor
        return tensors

    def execution_counts(self) -> dict[str, int]:
        """How many times each of the server's models has run, for tests and benchmarks."""
        with self._lost("while reading its statistics"):
            statistics = self._client.get_inference_statistics(headers=self._headers, client_timeout=self._deadline)
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

    def _infer(self, inputs: Sequence[Any], outputs: Sequence[Any], request_id: str, headers: Mapping[str, str]) -> Any:
        """Send a request; if the server is lost, send it again, with the same id, once the same model is served."""
        give_up: float | None = None
        busy_until, pause = time.monotonic() + self._busy_patience, BUSY_PAUSE
        while True:
            if self._cancelled.is_set():
                raise ServerLostError(f"the requests to {self._url} were cancelled")
            try:
                return self._client.infer(
                    self._served.ensemble,
                    inputs,
                    model_version=self._served.ensemble_version,
                    outputs=outputs,
                    request_id=request_id,
                    priority=self._priority,
                    parameters=self._parameters,
                    headers=headers,
                    client_timeout=self._deadline,
                )
            except self._triton.InferenceServerException as error:
                if _is_busy(error):
                    if time.monotonic() > busy_until:
                        raise
                    self._cancelled.wait(pause * random.uniform(0.5, 1.0))
                    pause = min(2 * pause, LONGEST_BUSY_PAUSE)
                    continue
                first, give_up = give_up is None, give_up or time.monotonic() + self._patience
                lost = any(status in str(error.status()) for status in _LOST)
                lost = lost or any(text in str(error.message()) for text in _BROKEN)
                if not lost or self._cancelled.is_set() or time.monotonic() > give_up:
                    raise
            # At once for the first time: often it is the connection that is gone, and not the server.
            self._await_same_model(give_up, pause=0.0 if first else RETRY_SECONDS)

    def _await_same_model(self, give_up: float, pause: float) -> None:
        """After ``pause`` seconds, wait until a server answers, or until ``give_up``.

        Raises:
            ModelChangedError: it serves another model.
        """
        while not self._cancelled.wait(pause) and time.monotonic() < give_up:
            pause = RETRY_SECONDS
            with contextlib.suppress(ServerUnreachableError):
                try:
                    found = self._introduce(timeout=max(1.0, give_up - time.monotonic()), known=self._served)
                except UsageError as error:
                    raise ModelChangedError(f"replaced while staining: {error}") from error
                if found.contract != self.contract:
                    raise ModelChangedError(_change(self._url, self.contract, found.contract))
                self._served = replace(self._served, ensemble=found.ensemble)  # it may be the second one now
                return

    def _introduce(self, timeout: float, known: _Served | None = None) -> _Served:
        """Ask the server what it is, and for the model that is wanted: the known one, if there is one."""
        try:
            if not self._client.is_server_ready(self._headers, client_timeout=timeout):
                raise ServerUnreachableError(
                    f"the server at {self._url} is not ready: wait until it is, or check its log"
                )
            metadata = self._client.get_server_metadata(self._headers, client_timeout=timeout)
        except self._triton.InferenceServerException as error:
            if "UNAUTHENTICATED" in str(error.status()):
                raise ServerUnreachableError(
                    f"the server at {self._url} does not know this client ({_reason(error)}): give --tls-cert and "
                    "--tls-key, or --token-file"
                ) from error
            if "NOT_FOUND" in str(error.status()):
                raise self._no_model(error) from error
            expired = self._credentials.expired(self._url)
            if expired:
                raise ServerUnreachableError(f"{self._url} cannot be reached: {expired}") from error
            raise ServerUnreachableError(
                f"no server answers at {self._url} ({_reason(error)}): start one with `staindiffuser serve REPO`, "
                "or omit --server to use the demonstration model"
            ) from error
        try:
            config, version, parameters = self._configuration(ENSEMBLE, timeout)
            offered = offered_models(parameters, self._url)
            kept = [model for model in offered if known and model.version == known.contract.model_version]
            ensemble = (kept or [choose_model(offered, self._model, self._url)])[0].ensemble
            if ensemble != ENSEMBLE:
                config, version, parameters = self._configuration(ensemble, timeout)
        except self._triton.InferenceServerException as error:
            if any(status in str(error.status()) for status in _SILENT):
                raise ServerUnreachableError(
                    f"the server at {self._url} does not say which model it has ({_reason(error)}): try again later"
                ) from error
            raise self._no_model(error) from error
        contract = ModelContract.from_config(parameters, max_batch=max(1, config.max_batch_size), server=self._url)
        return _Served(
            contract=contract,
            server_version=f"{metadata.name} {metadata.version}",
            server_id=parameters.get(SERVER_ID, ""),
            has_queues=_PRIORITY_LEVELS in parameters,
            ensemble=ensemble,
            ensemble_version=version,
        )

    def _configuration(self, ensemble: str, timeout: float) -> tuple[Any, str, dict[str, str]]:
        """An ensemble's configuration, its version's number, and its parameters."""
        versions = self._client.get_model_metadata(ensemble, headers=self._headers, client_timeout=timeout).versions
        version = max(versions, key=int, default="")
        # Naming the version makes sure that both answers come from servers with the same model.
        headers = {**self._headers, VERSION_HEADER: version}
        config: Any = self._client.get_model_config(ensemble, version, headers=headers, client_timeout=timeout).config
        return config, version, {key: value.string_value for key, value in config.parameters.items()}

    def _no_model(self, error: Exception) -> ContractError:
        wanted = self._headers.get(MODEL_HEADER, ENSEMBLE)
        return ContractError(f"the server at {self._url} has no model {wanted!r} ({_reason(error)})")

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
        if _is_busy(error):
            return ServerBusyError(
                f"the server at {self._url} has more to do than it can ({_reason(error)}): try later, send less at a "
                "time with --in-flight, or add servers"
            )
        if any(lost in status for lost in _LOST):
            return ServerLostError(
                f"the server at {self._url} was lost {when} ({_reason(error)}) and did not return within "
                f"{self._patience:g} s: restart it"
            )
        return ServerError(f"the server at {self._url} failed {when}: {_reason(error)}")


def _change(url: str, before: ModelContract, after: ModelContract) -> str:
    """The line for a server that was replaced by one that may stain differently."""
    change = (
        f"model {after.model_name} ({after.model_version[:12]}), not {before.model_name} ({before.model_version[:12]})"
    )
    if after.model_version == before.model_version:
        different = [
            field.name for field in fields(before) if getattr(before, field.name) != getattr(after, field.name)
        ]
        change = f"the same model with another {', '.join(different)}"
    return f"the server at {url} was replaced while staining: it now serves {change}; serve the first model again"


def _is_busy(error: Any) -> bool:
    refused = any(status in str(error.status()) for status in ("UNAVAILABLE", "RESOURCE_EXHAUSTED"))
    return refused and any(text in str(error.message()) for text in _BUSY)


def _reason(error: Exception) -> str:
    """The error's message as one line of at most 200 characters."""
    message = getattr(error, "message", lambda: None)() or str(error)
    first = " ".join(str(message).split())
    return first if len(first) <= 200 else first[:197] + "..."
