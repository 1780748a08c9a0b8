"""From a checkpoint to graphs: one ONNX file per engine, with the few-step sampler unrolled, and golden samples.

Needs torch; the next stage (:mod:`staindiffuser.export.repository`) does not.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from staindiffuser.errors import UsageError
from staindiffuser.export.description import EngineGraph, ExportedStain, GraphSet, TensorSpec
from staindiffuser.export.errors import ExportUsageError
from staindiffuser.export.modules import PRECISIONS, BranchEngine, EncoderEngine
from staindiffuser.files import file_sha256
from staindiffuser.imaging.image_files import read_image
from staindiffuser.training.checkpoint import WEIGHTS, Checkpoint, tensors_sha256
from staindiffuser.training.config import LEVELS
from staindiffuser.training.infer import stain_tiles
from staindiffuser.training.model.network import DualDiffusion, Task
from staindiffuser.training.receptive import default_margin
from staindiffuser.training.simulate.tiles import simulate_tile

__all__ = ["PRECISIONS", "export_graphs", "gate_of", "write_engines"]

UNGATED = "It did not pass its gate."
"""Part of the notice of such a model."""
OPSET = 20
OPSET_BF16 = 22  # the first whose convolution takes bfloat16


def export_graphs(
    checkpoint: Path,
    output: Path,
    *,
    steps: int | None = None,
    tile: int | None = None,
    precision: str = "fp32",
    samples: Sequence[Path] = (),
    noise: bool = True,
) -> GraphSet:
    """Write the graphs folder of a checkpoint.

    Args:
        checkpoint: checkpoint folder.
        output: graphs folder; an existing graphs folder is replaced as a whole.
        steps: sampler steps k; the checkpoint's default if None.
        tile: height and width of a tile, pixels, a multiple of 16; the checkpoint's default if None.
        precision: of the trunk: ``fp32``, ``fp16`` or ``bf16``.
        samples: images of real H&E at the model's pixel size; the central tile of each becomes a golden sample.
        noise: False begins the one step of a branch at x = 0, the noise's mean: no graph then reads noise.

    Raises:
        CheckpointError: unreadable checkpoint.
        DataError: a sample cannot be read.
        ExportUsageError: no such sampler, tile or precision, or a sample smaller than the tile.
        UsageError: the output cannot be written.
    """
    loaded = Checkpoint.load(checkpoint)
    config, network = loaded.config, loaded.network
    steps, tile = steps or config.steps, tile or config.tile
    if str(steps) not in config.sigmas:
        raise ExportUsageError(f"--steps {steps}: the checkpoint has samplers of {', '.join(config.sigmas)} steps")
    if tile % 2**LEVELS or tile < 64:
        raise ExportUsageError(f"--tile {tile}: must be a multiple of {2**LEVELS}, at least 64")
    if not noise and steps > 1:
        raise ExportUsageError(f"--no-noise: a sampler of {steps} steps reads noise; choose --steps 1")
    if precision not in PRECISIONS:
        raise ExportUsageError(f"--precision {precision}: choose one of {', '.join(PRECISIONS)}")
    tiles = np.concatenate([golden_tiles(tile), *(_central_tile(path, tile)[None] for path in samples)])
    if output.exists() and not (output / "graphs.json").is_file() and any(output.iterdir()):
        raise UsageError(f"{output} is not empty and holds no graphs: choose another --output")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}-"))
    except OSError as error:
        raise UsageError(f"{output} cannot be written: {error.strerror}; choose another --output") from error
    sigmas = config.sigmas[str(steps)]
    gate = gate_of(loaded.metrics, steps)
    try:
        draft.chmod(0o755)
        engines = write_engines(network, draft, sigmas=sigmas, tile=tile, trunk=PRECISIONS[precision], noise=noise)
        np.savez_compressed(draft / "golden.npz", **_golden(network, tiles, sigmas=sigmas, noise=noise))
        graphs = GraphSet(
            name=config.name,
            notice=f"{config.notice} {UNGATED}" if any(gate.values()) else config.notice,
            gate=gate,
            thresholds=config.thresholds,
            checkpoint_sha256=file_sha256(checkpoint / WEIGHTS),
            tile=tile,
            margin=default_margin(config.effective_radius, tile),
            mpp=config.model.mpp,
            steps=steps,
            sigmas=tuple(sigmas),
            precision=precision,
            stains=tuple(ExportedStain(name=s.name, label=s.label) for s in config.model.stains),
            engines=engines,
            golden_sha256=file_sha256(draft / "golden.npz"),
        )
        graphs.save(draft)
        if output.exists():
            shutil.rmtree(output)
        draft.rename(output)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return graphs


def gate_of(metrics: Mapping[str, Any], steps: int) -> dict[str, tuple[str, ...]]:
    """What each stain that was judged at this number of steps fails on, from the gate's record in ``metrics.json``."""
    gate = metrics.get("gate") or {}
    failures = gate.get("failures", {}).get(str(steps))
    if failures is None:
        return {}
    # A failure begins with the name of its stain.
    return {
        stain: tuple(failure.removeprefix(f"{stain} ") for failure in failures if failure.startswith(f"{stain} "))
        for stain in gate["rows"][0]["stains"]
    }


def write_engines(
    network: DualDiffusion,
    folder: Path,
    *,
    sigmas: Sequence[float],
    tile: int,
    trunk: torch.dtype,
    only: str | None = None,
    noise: bool = True,
) -> dict[str, EngineGraph]:
    """Write the engines' ONNX files into a folder.

    Args:
        network: the network whose encoder and branches are exported.
        folder: an existing folder.
        sigmas: noise level of each step of the image branches.
        tile: height and width, pixels.
        trunk: dtype of the convolutions.
        only: name of a single engine to write; None for all.
        noise: whether branches read it; without it, of one step only.

    Returns:
        What was written, by engine name.
    """
    he = torch.zeros(2, tile, tile, 3, dtype=torch.uint8)
    names = [f"FEATURES_{level}" for level in range(LEVELS)]
    features = [
        torch.zeros(2, channels, tile >> (level + 1), tile >> (level + 1), dtype=torch.float16)
        for level, channels in enumerate(network.config.features)
    ]
    engines = {}
    if only in (None, "he_encoder"):
        weights = tensors_sha256(network.encoder.state_dict().items())
        encoder = EncoderEngine(network, trunk).eval()
        engines["he_encoder"] = _export(encoder, folder / "he_encoder.onnx", {"HE": he}, names, weights)
    image_noise = torch.zeros(2, len(sigmas), 3, tile, tile, dtype=torch.float16)
    cell_noise = torch.zeros(2, 1, tile, tile, dtype=torch.float16)
    for stain in network.config.stains:
        tasks: list[tuple[str, Task, str, Tensor, Sequence[float]]] = [
            ("stain", "images", "NOISE", image_noise, sigmas),
            ("cells", "cells", "NOISE_CELLS", cell_noise, [network.config.sigma_max]),
        ]
        for prefix, task, noise_name, z, levels in tasks:
            name = f"{prefix}_{stain.name}"
            if only not in (None, name):
                continue
            engines[name] = _export(
                BranchEngine(network, task, stain, levels, trunk).eval(),
                folder / f"{name}.onnx",
                {**dict(zip(names, features, strict=True)), **({noise_name: z} if noise else {})},
                [name.upper()],
                tensors_sha256(network.branch(task, stain.name).state_dict().items()),
            )
    return engines


@torch.no_grad()
def _export(
    module: EncoderEngine | BranchEngine, path: Path, inputs: dict[str, Tensor], outputs: list[str], weights: str
) -> EngineGraph:
    """Write one engine's ONNX file: dynamic batch, all other dimensions static."""
    # torch.onnx warns when torchvision is absent, which nothing here needs.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    batch = torch.export.Dim("batch", min=1, max=1024)
    example = tuple(inputs.values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its own internals
        program = torch.onnx.export(
            module,
            example,
            dynamo=True,
            opset_version=OPSET_BF16 if module.trunk == torch.bfloat16 else OPSET,
            input_names=list(inputs),
            output_names=outputs,
            dynamic_shapes=tuple({0: batch} for _ in example),
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    _store_half(model)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return EngineGraph(
        file=path.name,
        graph_sha256=file_sha256(path),
        weights_sha256=weights,
        inputs=tuple(_spec(value) for value in model.graph.input),
        outputs=tuple(_spec(value) for value in model.graph.output),
    )


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return TensorSpec(name=value.name, dtype=dtype, shape=tuple(dim.dim_value for dim in tensor.shape.dim[1:]))


def _store_half(model: onnx.ModelProto) -> None:
    """Store convolution weights in half precision, followed by a Cast that every runtime folds when it loads the graph.

    This halves the bytes to ship. The parity gate includes the rounding (a relative 2⁻¹¹ of each weight).
    """
    graph = model.graph
    casts = []
    weights = {node.input[1] for node in graph.node if node.op_type == "Conv"}
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and tensor.name in weights:
            name = tensor.name
            half = numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), f"{name}.half")
            tensor.CopyFrom(half)
            casts.append(helper.make_node("Cast", [half.name], [name], to=TensorProto.FLOAT))
            for info in list(graph.value_info):
                if info.name == name:
                    graph.value_info.remove(info)
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    del model.metadata_props[:]
    for node in graph.node:
        del node.metadata_props[:]  # stack traces, which contain this machine's paths
        node.doc_string = ""


def _golden(
    network: DualDiffusion, he: NDArray[np.uint8], *, sigmas: Sequence[float], noise: bool
) -> dict[str, NDArray[Any]]:
    """Golden inputs, and their outputs from float32 torch."""
    seeds = np.arange(len(he), dtype=np.int64)[:, None]
    origins = np.array([[16 * i * 37, -16 * i * 11] for i in range(len(he))], dtype=np.int64)
    results = stain_tiles(network, he, sigmas=sigmas, seeds=seeds, origins=origins, noise=noise)
    return {"HE": he, "ORIGIN": origins, "SEED": seeds, **results}


def _central_tile(path: Path, tile: int) -> NDArray[np.uint8]:
    """The central tile of an image: uint8 [tile, tile, 3]."""
    image = read_image(path)
    top, left = ((side - tile) // 2 for side in image.shape[:2])
    if min(top, left) < 0:
        height, width = image.shape[:2]
        raise ExportUsageError(f"--sample {path}: {width} × {height} is smaller than a tile ({tile} × {tile})")
    return image[top : top + tile, left : left + tile]


def golden_tiles(tile: int) -> NDArray[np.uint8]:
    """uint8 [2, tile, tile, 3]: one tile of simulated tissue; one of four quarters: bare glass, a uniform colour,
    saturated squares and random pixels."""
    rng = np.random.default_rng(0)
    tissue = simulate_tile(20, 0, size=tile, masks=False).he
    half = tile // 2
    glass = np.full((half, half, 3), 243, np.uint8)
    colour = np.full((half, half, 3), (181, 98, 160), np.uint8)
    saturated = np.where(np.indices((half, half)).sum(0)[..., None] // 32 % 2 == 0, np.uint8(0), np.uint8(255))
    noise = rng.integers(0, 256, (half, half, 3), dtype=np.uint8)
    above = np.concatenate([glass, colour], axis=1)
    below = np.concatenate([np.repeat(saturated, 3, axis=2), noise], axis=1)
    return np.stack([tissue, np.concatenate([above, below], axis=0)])
