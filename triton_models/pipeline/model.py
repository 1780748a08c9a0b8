"""Triton's Python model of the flavour ``single``: noise, encoder and branches of a repository in one process.

It has the name, inputs, outputs and parameters of the ensemble, and computes the same bytes. The features stay in this
process, or on its GPU, instead of passing through shared memory between processes. Only what the requested outputs need
is computed: the encoder once, each branch that is requested or whose outputs a requested engine judges, and the noise
that these branches read.

Triton hands requests over as they come. They wait here (``request_queue.py``), urgent ones (parameter ``urgent`` of the
request) first, and are computed one at a time, each alone; their answers are sent from other threads.

``config.pbtxt`` configures it by ``parameters``:

- ``runner``: the file beside this one that loads engines (``engine_onnxruntime``, ``engine_tensorrt``, …);
- ``engines``: JSON, per engine its file in this folder, its inputs and its outputs, the encoder first, and an engine
  after those whose outputs it reads;
- ``joined``: JSON, names of the engines that the runner loads as one graph, from the encoder on; absent for none;
- ``steps``: sampler steps of the image branches;
- ``threads``: threads of a CPU engine, 0 for all available; ``STAINDIFFUSER_THREADS`` overrides it;
- ``queue_length``, ``queue_seconds``: urgent requests that may wait, and others that may, and for how long.
"""

from __future__ import annotations

import importlib
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import triton_python_backend_utils as pb_utils
from gate import Gate
from meters import Meters
from philox import check_origins, tile_noise
from request_log import RequestLog
from request_queue import RequestQueue

_DLPACK = np.lib.NumpyVersion(np.__version__) >= "2.0.0"
"""As in ``engine/model.py``: host tensors cross by DLPack with numpy 2, whose arrays the wheel's backend gets wrong."""
IMAGE_NOISE, CELL_NOISE = "NOISE", "NOISE_CELLS"
_REFUSALS = {
    "stopping": ("the server is stopping: send the request again", "UNAVAILABLE"),
    "full": ("Exceeds maximum queue size", "UNAVAILABLE"),
    "late": ("Request timeout expired", "UNAVAILABLE"),
}
"""Message and status by reason; of a queue in Triton's own words, which clients know."""
_WAKING = 0.0005
"""Seconds below which an engine is run in the thread that needs it (ours)."""
_PATIENT = 0.05
"""Seconds after which a client may have given up: to ask Triton takes a while (ours)."""


class _Request(NamedTuple):
    """What is kept of a request until it is answered."""

    sender: Any
    id: str
    names: list[str]
    """Outputs that it asks for."""
    he: Any
    origins: Any
    seeds: Any


class TritonPythonModel:
    """The interface that Triton's Python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load all engines; an error here keeps the server from becoming ready."""
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        self.gpu = args["model_instance_kind"] == "GPU"
        self.gate = Gate()
        self.queue: RequestQueue[_Request] = RequestQueue(
            length=int(parameters["queue_length"]),
            seconds=float(parameters["queue_seconds"]),
            expired=lambda request: self._refuse(request, "late"),
        )
        self.meters = Meters(
            pb_utils,
            version=parameters.get("model_version", ""),
            quality=parameters.get("quality", ""),
            waiting=self.queue.__len__,
        )
        self.log = RequestLog(parameters.get("model_version", ""))
        self.steps, self.tile = int(parameters["steps"]), int(parameters["tile"])
        runner = importlib.import_module(parameters["runner"])
        threads = int(os.environ.get("STAINDIFFUSER_THREADS") or parameters["threads"])
        device = int(args["model_instance_device_id"])
        self.signatures: dict[str, dict[str, Any]] = json.loads(parameters["engines"])
        self.encoder = next(iter(self.signatures))
        files = {name: Path(__file__).with_name(signature["file"]) for name, signature in self.signatures.items()}
        together: list[str] = json.loads(parameters.get("joined", "[]"))
        self.joined = runner.load_joined([files.pop(name) for name in together], threads=threads) if together else None
        self.given = [output for name in together for output in self.signatures[name]["outputs"]]
        self.engines = {name: runner.load(file, threads=threads, device=device) for name, file in files.items()}
        self.branches = {
            signature["outputs"][0]: name for name, signature in self.signatures.items() if name != self.encoder
        }
        self.took: dict[str, float] = {}
        self.pool = ThreadPoolExecutor(len(self.branches))
        self.make_noise: Any = tile_noise
        if self.gpu:
            from philox_gpu import GpuNoise

            self.make_noise = GpuNoise(device).tile_noise
        self.turn = threading.Lock()
        self.workers = [threading.Thread(target=self._work, daemon=True) for _ in range(1 if self.gpu else 2)]
        for worker in self.workers:
            worker.start()

    def execute(self, requests: list[Any]) -> list[Any]:
        """Put each request into the queue, whose answer comes later; or refuse it: then its response is given here."""
        return [self._accept(request) for request in requests]

    def finalize(self) -> None:
        """Refuse what still waits, finish what is running, and release the engines and the counters."""
        for request in self.queue.close():
            self._refuse(request, "stopping")
        for worker in self.workers:
            worker.join()
        self.pool.shutdown()
        self.meters.close()
        for engine in (self.joined, *self.engines.values()):
            if engine is not None:
                engine.close()

    def _accept(self, request: Any) -> Any:
        """None, or the response of a request that is refused."""
        if self.gate.closed:
            self.meters.refused(1, "stopping")
            return _error(*_REFUSALS["stopping"])
        parameters, timeout = request.parameters(), request.timeout()
        # Copied: what waits must not fill the shared memory through which the next one comes.
        accepted = _Request(
            request.get_response_sender(),
            request.request_id(),
            list(request.requested_output_names()),
            *(np.array(_array(request, name)) for name in ("HE", "ORIGIN", "SEED")),
        )
        self.gate.enter()
        urgent = bool(parameters) and json.loads(parameters).get("urgent") is True
        if self.queue.put(accepted, urgent=urgent, seconds=timeout / 1e6 if timeout else None):
            return None
        self.gate.leave()
        self.meters.refused(1, "full")
        return _error(*_REFUSALS["full"])

    def _work(self) -> None:
        """Answer one request after another, until there are no more to come."""
        while self._answer_next():
            pass  # in a function of its own, which holds no tensors while it waits

    def _answer_next(self) -> bool:
        """While one worker sends its answer, another computes the next."""
        with self.turn:
            waiting = self.queue.take()
            if waiting is None:
                return False
            response = self._respond(waiting.request, time.monotonic() - waiting.since)
        self._send(waiting.request, response)
        return True

    def _refuse(self, request: _Request, reason: str) -> None:
        self.meters.refused(1, reason)
        self._send(request, _error(*_REFUSALS[reason]))

    def _send(self, request: _Request, response: Any) -> None:
        try:
            request.sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        except Exception as error:  # nobody is left who could be told
            pb_utils.Logger.log_warn(f"a response could not be sent: {error}")
        finally:
            self.gate.leave()

    def _respond(self, request: _Request, waited: float) -> Any:
        began = time.monotonic()
        status, response = self._answer(request, waited)
        took = time.monotonic() - began
        self.meters.request(status, waited=waited, took=took)
        self.log.write(
            request.id, tiles=len(request.he), outputs=request.names, waited=waited, took=took, status=status
        )
        return response

    def _answer(self, request: _Request, waited: float) -> tuple[str, Any]:
        """A status and a response."""
        try:
            check_origins(request.origins)
        except ValueError as error:
            return "INVALID_ARG", _error(str(error), "INVALID_ARG")
        try:
            if waited > _PATIENT and request.sender.is_cancelled():
                return "CANCELLED", _error("the client has given up", "CANCELLED")
            outputs = self._run(request.he, request.origins, request.seeds, request.names)
            return "OK", pb_utils.InferenceResponse([self._tensor(name, array) for name, array in outputs.items()])
        except Exception as error:  # reported to the client that sent the request
            return "INTERNAL", _error(f"{type(error).__name__}: {error}", "INTERNAL")

    def _run(self, he: Any, origins: Any, seeds: Any, names: list[str]) -> dict[str, Any]:
        needed = self._needed(names)
        read = {name for output in needed for name in self.signatures[self.branches[output]]["inputs"]}
        tensors = {"HE": he}
        if read & {IMAGE_NOISE, CELL_NOISE}:
            image, cells = self.make_noise(
                seeds,
                origins,
                steps=self.steps if IMAGE_NOISE in read else 1,  # cell maps need one step
                height=self.tile,
                width=self.tile,
                cells=CELL_NOISE in read,
            )
            tensors |= {name: z for name, z in ((IMAGE_NOISE, image), (CELL_NOISE, cells)) if name in read}
        tensors |= self._begin(tensors, needed)
        needed = [name for name in needed if name not in tensors]

        def run_branch(output: str) -> Any:
            branch = self.branches[output]
            engine = self.engines[branch]
            inputs = {name: engine.receive(tensors[name]) for name in self.signatures[branch]["inputs"]}
            began = time.monotonic()
            result = engine.run(inputs, [output])[output]
            self.took[output] = time.monotonic() - began
            return result

        while needed:
            ready = [name for name in needed if set(self.signatures[self.branches[name]]["inputs"]) <= tensors.keys()]
            run_all = self.pool.map if self._pays_side_by_side(ready) else map
            tensors.update(zip(ready, run_all(run_branch, ready), strict=True))
            needed = [name for name in needed if name not in ready]
        for name in self.branches:
            if name in tensors:
                self.meters.tiles(name, tensors[name])
        return {name: tensors[name] for name in names}

    def _pays_side_by_side(self, outputs: list[str]) -> bool:
        """On a CPU, whose cores one engine does not fill, unless they take no longer than to wake the threads does.

        On a GPU the one would only wait for the other.
        """
        longest = max((self.took.get(output, 1.0) for output in outputs), default=0.0)
        return not self.gpu and len(outputs) > 1 and longest > _WAKING

    def _begin(self, tensors: dict[str, Any], needed: list[str]) -> dict[str, Any]:
        """The features; where engines are joined, all that is needed of them."""
        if self.joined is None:
            encoder = self.engines[self.encoder]
            features: dict[str, Any] = encoder.run(
                {"HE": encoder.receive(tensors["HE"])}, self.signatures[self.encoder]["outputs"]
            )
            return features
        others = [self.branches[output] for output in needed if output not in self.given]
        read = {name for engine in others for name in self.signatures[engine]["inputs"]}
        computed: dict[str, Any] = self.joined.run(
            tensors, [name for name in self.given if name in read or name in needed]
        )
        return computed

    def _needed(self, names: list[str]) -> list[str]:
        """The outputs of all engines that must run, apart from the encoder."""
        needed = list(names)
        for output in needed:  # grows
            inputs = self.signatures[self.branches[output]]["inputs"]
            needed += [name for name in inputs if name in self.branches and name not in needed]
        return needed

    def _tensor(self, name: str, array: Any) -> Any:
        return pb_utils.Tensor.from_dlpack(name, array) if self.gpu or _DLPACK else pb_utils.Tensor(name, array)


def _array(request: Any, name: str) -> Any:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return np.from_dlpack(tensor) if _DLPACK else tensor.as_numpy()


def _error(message: str, code: str) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, getattr(pb_utils.TritonError, code)))
