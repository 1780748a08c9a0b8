"""``config.pbtxt`` of every Triton model, generated from one description of the ensemble.

The messages are built with the protobuf classes that Triton's client ships, so that an unknown field is an error here.
Each text is parsed back, and tensors are checked across the whole ensemble before anything is written::

    HE ─► he_encoder ─┬─ FEATURES_0..3 ─────────────────┬──► stain_<name> ─► STAIN_<NAME>
                      └─ AFTER ─► noise ─┬─ NOISE ──────┤
    ORIGIN, SEED ─────────────────►      └─ NOISE_CELLS ┴──► cells_<name> ─► CELLS_<NAME>
    HE, FEATURES_0..3                    ─► quality          ─► QUALITY
    HE, JUDGED_STAIN_…, JUDGED_CELLS_…   ─► quality_<name>   ─► QUALITY_<NAME>

The encoder is the ensemble's only first step: ``noise`` takes the coarsest features as an input that it does not read.
With two first steps, a failure of the one scheduled earlier deadlocks the whole server (24.10): the gRPC thread, still
scheduling the other step under the request's lock, waits for the ensemble's lock, which the failing step's thread holds
while it waits for the request's lock to send the error. Later steps are scheduled without the request's lock.

Where no graph reads noise (``export graphs --no-noise``) there is no noise model, and where only cell maps do, it makes
no other. Triton refuses inputs of an ensemble and outputs of its steps that nothing reads, so without a noise model it
is the encoder's that takes ``ORIGIN`` and ``SEED``, and refuses origins off the grid.

A tensor that clients may ask for must not be another step's input: where it is not asked for, Triton (24.10) leaves out
its step even if the other one needs it, and where the other one is not asked for, it leaves out both; the request then
ends with "unexpected deadlock". So a branch hands its output to what judges it under a second name, ``JUDGED_…``.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from staindiffuser.export.builders import Builder, BuildOptions
from staindiffuser.export.description import QUALITY, GraphSet, TensorSpec
from staindiffuser.export.errors import ExportUsageError
from staindiffuser.export.loading import joined_engines
from staindiffuser.export.wire import (
    ENCODER,
    ENSEMBLE,
    check_ensemble,
    contract_parameters,
    noise_read,
    wire_inputs,
    wire_outputs,
)

if TYPE_CHECKING:
    ModelConfig = Any  # protobuf's generated classes carry no types

__all__ = [
    "FLAVOURS",
    "EngineFiles",
    "cuda_pool_bytes",
    "model_configs",
    "parse",
    "to_text",
    "without_stain_measures",
]

NOISE_MODEL = "noise"
JUDGED = "JUDGED_"
"""Prefix of the second name of an output, under which another model reads it."""
AFTER = "AFTER"
"""Input of the noise model whose only purpose is to order it after the encoder."""
_TYPES = {"uint8": pb.TYPE_UINT8, "float16": pb.TYPE_FP16, "float32": pb.TYPE_FP32, "int64": pb.TYPE_INT64}
FLAVOURS = ("single", "python", "native")
"""``single``: Triton's Python backend runs one model that holds all engines in one process. ``python``: it runs an
ensemble, each engine in a process of its own. ``native``: an ensemble for Triton's TensorRT backend, in the vendor's
container. Clients see no difference."""
EngineFiles = Mapping[str, str]
"""Compute capability ("8.9"; "" on a CPU) to file name."""
ONE_GPU = (0,)
"""A server uses only the first GPU it sees; with several GPUs, run one server on each. Otherwise Triton would create
instances on every GPU and the ensemble would pass features between them, with a CUDA pool on the first GPU only."""
IN_FLIGHT = 4
"""Requests whose tensors are on the GPU at once; determines the size of the CUDA pool (ours)."""
BATCH = {"cpu": 1, "cuda": 4}
"""By device, how many tiles clients are told to send in a request. On two cores, eight tiles at once take as long as
one by one, and several times the memory (docs, "Speed")."""
URGENT, ORDINARY = 1, 2
"""Priority levels of requests: all urgent ones that wait run before ordinary ones, which is what a request is that
does not say."""
PRIORITY_LEVELS = "priority_levels"
"""Parameter of a model whose requests wait in queues that know urgent ones."""
QUEUE_LENGTH, QUEUE_SECONDS = 64, 30.0
"""Of a queue, where the build does not say (ours)."""


def cuda_pool_bytes(graphs: GraphSet, max_batch: int) -> int:
    """Bytes of intermediate tensors and results for all requests in flight."""
    engines = graphs.engines.values()
    between = [*noise_read(graphs), *(spec for engine in engines for spec in engine.outputs)]
    each = sum(math.prod(spec.shape) * np.dtype(spec.dtype).itemsize for spec in between)
    return IN_FLIGHT * max_batch * each


def model_configs(
    graphs: GraphSet,
    builder: Builder,
    engine_files: Mapping[str, EngineFiles],
    options: BuildOptions,
    flavour: str = "single",
) -> dict[str, str]:
    """The text of every model's ``config.pbtxt``, by model name.

    Args:
        graphs: the graphs that the engines are built from.
        builder: of the engines.
        engine_files: by engine name; the first file of each is the one built on this machine.
        options: batch sizes and threads.
        flavour: one of :data:`FLAVOURS`.

    Raises:
        GraphsError: the engines' tensors are inconsistent.
        ExportUsageError: the flavour does not exist or cannot run the target's engines.
    """
    check_ensemble(graphs)
    if flavour not in FLAVOURS:
        raise ExportUsageError(f"flavour {flavour!r}: choose {', '.join(FLAVOURS)}")
    if flavour == "native" and builder.target != "tensorrt":
        raise ExportUsageError(
            f"flavour native is for Triton's TensorRT backend, which runs target tensorrt only, not {builder.target}: "
            "take flavour single"
        )
    if flavour == "python" and (options.queue_length, options.queue_seconds) != (None, None):
        raise ExportUsageError(
            "flavour python has no queue: take flavour single, or leave out --queue-length and --queue-seconds"
        )
    if flavour != "python" and options.weight_stripped:
        raise ExportUsageError(f"flavour {flavour} cannot put weights back into stripped plans: take flavour python")
    if flavour == "native" and not noise_read(graphs):
        raise ExportUsageError(
            "flavour native needs graphs that read noise: Triton refuses the ensemble's inputs ORIGIN and SEED where "
            "nothing reads them; take flavour single"
        )
    gpu = builder.device().kind == "cuda"
    if flavour == "single":
        message = _pipeline(graphs, builder, engine_files, options, gpu)
        return {message.name: to_text(message)}
    origin, seed = wire_inputs(graphs.tile)[1:]
    after = dataclasses.replace(graphs.engines[ENCODER].outputs[-1], name=AFTER)
    noise = noise_read(graphs)
    messages = [_python_model(NOISE_MODEL, (origin, seed, after), noise, options, gpu, {})] if noise else []
    for name, engine in graphs.engines.items():
        if flavour == "native":
            messages.append(_native_model(name, engine.inputs, engine.outputs, options, engine_files[name]))
            continue
        file = next(iter(engine_files[name].values()))
        contract = contract_parameters(graphs, graphs.name)
        told = ("model_version", "quality") if name == QUALITY else ("model_version",)
        parameters = {"engine": file, "runner": builder.runner, "threads": str(options.threads)}
        parameters |= {key: contract[key] for key in told}
        inputs = engine.inputs
        if name == ENCODER:
            parameters["gate"] = "true"
            if not noise:
                inputs = wire_inputs(graphs.tile)
                parameters["checks_origins"] = "true"
        copies = _copies(graphs, name)
        if copies:
            parameters["copies"] = json.dumps({spec.name: spec.name.removeprefix(JUDGED) for spec in copies})
        messages.append(_python_model(name, inputs, (*engine.outputs, *copies), options, gpu, parameters))
    ensemble = _ensemble(graphs, options, gpu)
    if flavour == "native":
        ensemble.parameters[PRIORITY_LEVELS].string_value = str(ORDINARY)
    messages.append(ensemble)
    return {message.name: to_text(message) for message in messages}


def without_stain_measures(graphs: GraphSet) -> GraphSet:
    """The graphs for the native flavour, whose branches cannot hand out their outputs under a second name."""
    if graphs.quality is None:
        return graphs
    engines = {name: e for name, e in graphs.engines.items() if not name.startswith(f"{QUALITY}_")}
    return dataclasses.replace(graphs, engines=engines, quality=dataclasses.replace(graphs.quality, stain=()))


def _copies(graphs: GraphSet, name: str) -> list[TensorSpec]:
    """The outputs that an engine gives a second time, for what judges them."""
    read = {spec.name for judge, e in graphs.engines.items() if judge.startswith(f"{QUALITY}_") for spec in e.inputs}
    outputs = graphs.engines[name].outputs
    return [dataclasses.replace(spec, name=f"{JUDGED}{spec.name}") for spec in outputs if spec.name in read]


def _as_read(name: str, spec: TensorSpec) -> TensorSpec:
    """An engine's input under the name that it has in the ensemble."""
    judged = name.startswith(f"{QUALITY}_") and spec.name.startswith(("STAIN_", "CELLS_"))
    return dataclasses.replace(spec, name=f"{JUDGED}{spec.name}") if judged else spec


def to_text(message: ModelConfig) -> str:
    """Protobuf text that is checked to parse back to the same message."""
    text = text_format.MessageToString(message, as_utf8=True)
    if parse(text) != message:
        raise AssertionError(f"config.pbtxt of {message.name} does not parse back to itself")
    return text


def parse(text: str) -> ModelConfig:
    """Read a ``config.pbtxt``.

    Raises:
        ValueError: it is not one.
    """
    try:
        return text_format.Parse(text, pb.ModelConfig())
    except text_format.ParseError as error:
        raise ValueError(str(error)) from error


def _python_model(
    name: str,
    inputs: Iterable[TensorSpec],
    outputs: Iterable[TensorSpec],
    options: BuildOptions,
    gpu: bool,
    parameters: Mapping[str, str],
) -> ModelConfig:
    message = pb.ModelConfig(name=name, backend="python", max_batch_size=options.max_batch)
    _add_tensors(message, inputs, outputs)
    if gpu:
        message.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_GPU, gpus=ONE_GPU)
    else:
        message.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_CPU)
    for key, value in parameters.items():
        message.parameters[key].string_value = value
    if gpu:
        # By default, the Python backend copies every input to the host first.
        message.parameters["FORCE_CPU_ONLY_INPUT_TENSORS"].string_value = "no"
    _finish(message, inputs, options, gpu)
    return message


def _pipeline(
    graphs: GraphSet, builder: Builder, engine_files: Mapping[str, EngineFiles], options: BuildOptions, gpu: bool
) -> ModelConfig:
    """The model that takes the ensemble's place and holds all engines in one process.

    It has no dynamic batcher: its requests are not merged, and it keeps those that wait itself. Triton's queue, as soon
    as it has limits and priorities, leaves a model idle while 16 clients wait (24.10).
    """
    engines = {
        name: {
            "file": next(iter(engine_files[name].values())),
            "inputs": [tensor.name for tensor in engine.inputs],
            "outputs": [tensor.name for tensor in engine.outputs],
        }
        for name, engine in graphs.engines.items()
    }
    parameters = {
        "runner": builder.runner,
        "engines": json.dumps(engines),
        "threads": str(options.threads),
        PRIORITY_LEVELS: str(ORDINARY),
        "queue_length": str(options.queue_length or QUEUE_LENGTH),
        "queue_seconds": str(options.queue_seconds or QUEUE_SECONDS),
        **contract_parameters(graphs, graphs.name),
        **_batch(options, gpu),
    }
    together = joined_engines(builder, graphs.engines, "single")
    if together:
        parameters["joined"] = json.dumps(together)
    return _python_model(ENSEMBLE, wire_inputs(graphs.tile), wire_outputs(graphs), options, gpu, parameters)


def _batch(options: BuildOptions, gpu: bool) -> dict[str, str]:
    """The parameter that tells clients how many tiles to send in a request."""
    return {"batch": str(min(BATCH["cuda" if gpu else "cpu"], options.max_batch))}


def _native_model(
    name: str, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec], options: BuildOptions, plans: EngineFiles
) -> ModelConfig:
    """One engine for Triton's TensorRT backend.

    Waiting requests are merged into the batch sizes that the plan has profiles and CUDA graphs for, without any delay.
    """
    message = pb.ModelConfig(name=name, platform="tensorrt_plan", backend="tensorrt", max_batch_size=options.max_batch)
    _add_tensors(message, inputs, outputs)
    message.default_model_filename = next(iter(plans.values()))
    for capability, file in plans.items():
        message.cc_model_filenames[capability] = file
    # One instance: with dynamic shapes, each instance would hold its own copy of the weights.
    group = message.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_GPU, gpus=ONE_GPU)
    group.profile.extend(str(index) for index in range(len(options.profiles)))
    _queue(message, options)
    message.dynamic_batching.preferred_batch_size.extend(options.preferred)
    cuda = message.optimization.cuda
    cuda.graphs = True
    for batch in options.preferred:
        spec = cuda.graph_spec.add(batch_size=batch)
        for tensor in inputs:
            spec.input[tensor.name].dim.extend(tensor.shape)
    _finish(message, inputs, options, True)
    return message


def _queue(message: ModelConfig, options: BuildOptions) -> None:
    """Urgent requests first; a request that finds the queue full, or that waits too long, is refused as unavailable.

    Without any delay: with one, requests that are merged leak the count of those that wait (server#8870), and the queue
    counts as full for ever. Time-outs fire only when a running inference ends (server#7512), so behind a stuck engine
    it is the length of the queue that refuses, and ``serve`` restarts the server.
    """
    batching = message.dynamic_batching
    batching.max_queue_delay_microseconds = 0
    batching.priority_levels = ORDINARY
    batching.default_priority_level = ORDINARY
    queue = batching.default_queue_policy
    queue.timeout_action = pb.ModelQueuePolicy.REJECT
    queue.default_timeout_microseconds = round((options.queue_seconds or QUEUE_SECONDS) * 1e6)
    queue.allow_timeout_override = True  # a request may ask for less
    queue.max_queue_size = options.queue_length or QUEUE_LENGTH


def _finish(message: ModelConfig, inputs: Iterable[TensorSpec], options: BuildOptions, gpu: bool) -> None:
    """Settings of every model: no response cache, and warm-up.

    On a GPU at each preferred batch size, for which there are plans and CUDA graphs. On a CPU one tile does: a batch of
    eight takes seconds, for which clients of a server that was restarted would wait.
    """
    message.response_cache.enable = False  # its key ignores shapes, dtypes and requested outputs
    for batch in options.preferred if gpu else (1,):
        warmup = message.model_warmup.add(name=f"batch_{batch}", batch_size=batch, count=1)
        for spec in inputs:
            warmup.inputs[spec.name].data_type = _TYPES[spec.dtype]
            warmup.inputs[spec.name].dims.extend(spec.shape)
            warmup.inputs[spec.name].zero_data = True


def _ensemble(graphs: GraphSet, options: BuildOptions, gpu: bool) -> ModelConfig:
    message = pb.ModelConfig(name=ENSEMBLE, platform="ensemble", max_batch_size=options.max_batch)
    _add_tensors(message, wire_inputs(graphs.tile), wire_outputs(graphs))
    noise = noise_read(graphs)
    for name, engine in graphs.engines.items():
        read = engine.inputs if noise or name != ENCODER else wire_inputs(graphs.tile)
        inputs = {t.name: _as_read(name, t).name for t in read}
        _add_step(message, name, inputs, [t.name for t in (*engine.outputs, *_copies(graphs, name))])
    if noise:
        inputs = {"ORIGIN": "ORIGIN", "SEED": "SEED", AFTER: graphs.engines[ENCODER].outputs[-1].name}
        _add_step(message, NOISE_MODEL, inputs, [t.name for t in noise])
    for key, value in (contract_parameters(graphs, graphs.name) | _batch(options, gpu)).items():
        message.parameters[key].string_value = value
    message.response_cache.enable = False
    return message


def _add_tensors(message: ModelConfig, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec]) -> None:
    for spec in inputs:
        message.input.add(name=spec.name, data_type=_TYPES[spec.dtype], dims=spec.shape)
    for spec in outputs:
        message.output.add(name=spec.name, data_type=_TYPES[spec.dtype], dims=spec.shape)


def _add_step(message: ModelConfig, model: str, inputs: Mapping[str, str], outputs: Iterable[str]) -> None:
    step = message.ensemble_scheduling.step.add(model_name=model, model_version=-1)
    for name, tensor in inputs.items():
        step.input_map[name] = tensor
    for name in outputs:
        step.output_map[name] = name
