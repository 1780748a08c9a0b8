"""Adds to a folder of graphs copies that compute their residual blocks in 8 bits, for the target ``openvino``.

NNCF calibrates activations (asymmetric, one range a tensor) and weights (symmetric, one range a channel) on tiles and
corrects biases; the copies hold its QuantizeLinear and DequantizeLinear. Only the two 3 × 3 convolutions of each
residual block are quantised: they are nine tenths of the work. What reads the H&E or the noise, what writes the image,
attention, and the 1 × 1 and 2 × 2 convolutions between levels stay in float: they cost hardly anything, and quantising
them was slower, for the conversions around them, and worse.

Whether 8 bits are good enough is decided here, on fields that did not calibrate them, and per layer: while a stain's
DAB-Dice against the real stain is more than :data:`MOST_LOST` below the one of float32, the layer that disturbs the
engine most goes back to float.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from staindiffuser.errors import DependencyError
from staindiffuser.export.builders.openvino import mark
from staindiffuser.export.description import QUALITY, EightBits, EngineGraph, GraphSet
from staindiffuser.export.errors import ExportUsageError, ParityError
from staindiffuser.export.publishing import locked, staging_folder
from staindiffuser.export.quality import compose_field, field_plans
from staindiffuser.files import file_sha256
from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.instances import HALF, lowest_grey
from staindiffuser.imaging.optical_density import dab_mask
from staindiffuser.training.tiles.paired_tiles import PairedTiles
from staindiffuser.triton_models.noise.philox import tile_noise

__all__ = ["LEAST_CELLS", "MOST_LOST", "add_int8"]

MOST_LOST = 0.005
"""By which the DAB-Dice of a stain may be below that of float32 (ours)."""
LEAST_CELLS = 0.98
"""Dice of a cell map's positive area with that of float32 (ours)."""
FEWEST = 8
_QUANTISED = re.compile(r"\.blocks\.\d+\.conv[01]\.")
"""Names of the weights of convolutions in residual blocks."""

Arrays = dict[str, np.ndarray[Any, Any]]
Progress = Callable[[str], None]


def add_int8(
    graphs_dir: Path, tiles: Sequence[Path], *, most: int = 24, progress: Progress = lambda message: None
) -> GraphSet:
    """Add the copies to a folder of graphs, or replace them (needs NNCF, and a processor that computes in 8 bits).

    Args:
        graphs_dir: what ``export graphs`` wrote, in float32; replaced as a whole.
        tiles: folders of paired tiles. Of each, fields of the training split calibrate, others of it judge.
        most: fields at most from each folder, evenly spread; every third judges.

    Returns:
        The new description. Its ``model_version`` is the old one: the graphs that were there are not touched.

    Raises:
        GraphsError, ManifestError: the graphs are missing or damaged.
        DataError, ImageError: the tiles are.
        DependencyError: NNCF or OpenVINO is not installed.
        ExportUsageError: there are too few tiles, or the graphs are not in float32.
        ParityError: a stain is not good enough even where all its layers are in float.
    """
    graphs = GraphSet.load(graphs_dir)
    if graphs.precision != "fp32":
        raise ExportUsageError(f"{graphs_dir} is in {graphs.precision}: 8 bits are made of float32 graphs")
    nncf = _nncf()
    found = [field for source in tiles for field in _fields(PairedTiles.load(source), graphs, most)]
    if len(found) < FEWEST:
        raise ExportUsageError(f"{len(found)} fields of {graphs.tile} px, {FEWEST} are needed: give more --tiles")
    judging = found[2::3]
    calibrating = [field.he for number, field in enumerate(found) if number % 3 != 2]
    names = [name for name in graphs.engines if not name.startswith(QUALITY)]
    with (
        locked(graphs_dir.resolve()),
        staging_folder(graphs_dir.resolve()) as folder,
        tempfile.TemporaryDirectory() as t,
    ):
        for path in graphs_dir.iterdir():
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
        floats = {name: _folded(graphs_dir / graphs.engines[name].file) for name in names}
        with _trial(floats, {}, graphs, Path(t)) as run:
            inputs = [run(he) for he in calibrating]
        models = {}
        for name in names:
            progress(f"calibrating {name} on {len(calibrating)} fields")
            models[name] = _quantised(nncf, floats[name], [_of(graphs.engines[name], arrays) for arrays in inputs])
        left = _settle(floats, models, graphs, judging, Path(t), progress)
        copies = {}
        for name in names:
            file = folder / f"{name}.int8.onnx"
            onnx.save(_halved(_left_float(models[name], floats[name], left[name][0])), file)
            dice = left[name][1]
            copies[name] = EightBits(
                file=file.name,
                graph_sha256=file_sha256(file),
                float_layers=tuple(left[name][0]),
                dab_dice=dice and round(dice[0], 4),
                dab_dice_fp32=dice and round(dice[1], 4),
            )
        changed = dataclasses.replace(
            graphs, int8=copies, int8_reference=f"{len(calibrating)} fields calibrated, {len(judging)} judged"
        )
        changed.save(folder)
        return changed


@dataclasses.dataclass(frozen=True)
class _Field:
    """What a model is run on, and what it should find."""

    he: UInt8Array
    positive: Mapping[str, Any]
    """DAB-positive pixels of the real stain, bool [T, T], of those stains that there is an image of."""


def _fields(tiles: PairedTiles, graphs: GraphSet, most: int) -> Iterator[_Field]:
    stains = [stain.name for stain in graphs.stains if stain.name in tiles.stains]
    for _, members in field_plans(tiles.split("train"), graphs.tile, graphs.mpp, most):

        def field(paths: Sequence[Path], mpp: float = members[0].mpp) -> UInt8Array:
            return compose_field(paths, mpp, graphs.tile, graphs.mpp)

        positive = {
            stain: dab_mask(field([tile.image(stain) for tile in members]))
            for stain in stains
            if all(tile.has_images([stain]) for tile in members)
        }
        yield _Field(field([tile.he for tile in members]), positive)


def _settle(
    floats: Mapping[str, onnx.ModelProto],
    models: Mapping[str, onnx.ModelProto],
    graphs: GraphSet,
    judging: Sequence[_Field],
    folder: Path,
    progress: Progress,
) -> dict[str, tuple[list[str], tuple[float, float] | None]]:
    """Layers of each engine that stay in float; of a stain's image also the DAB-Dice in 8 bits and in float32."""
    with _trial(floats, {}, graphs, folder) as run:
        exact = [run(field.he) for field in judging]

    def judge(chosen: Mapping[str, onnx.ModelProto], name: str) -> tuple[float, float, float, bool]:
        """Score in 8 bits, score of float32, mean difference in grey levels, and whether there is anything to score."""
        tensor, (kind, _, stain) = graphs.engines[name].outputs[0].name, name.partition("_")
        level = lowest_grey(graphs.thresholds.get(stain, HALF))
        ours, theirs, apart = np.zeros(2), np.zeros(2), 0.0
        with _trial(floats, chosen, graphs, folder) as run:
            for field, arrays in zip(judging, exact, strict=True):
                found, before = run(field.he)[tensor][0], arrays[tensor][0]
                apart += float(np.abs(found.astype(np.int16) - before).mean()) / len(judging)
                if kind == "cells":
                    ours += _areas(found >= level, before >= level)
                elif stain in field.positive:
                    ours += _areas(dab_mask(found), field.positive[stain])
                    theirs += _areas(dab_mask(before), field.positive[stain])
        return _dice(ours), 1.0 if kind == "cells" else _dice(theirs), apart, bool(ours[1])

    chosen: dict[str, onnx.ModelProto] = {"he_encoder": models["he_encoder"]}
    left: dict[str, tuple[list[str], tuple[float, float] | None]] = {"he_encoder": ([], None)}
    for name in [name for name in models if name != "he_encoder"]:
        cells = name.startswith("cells_")
        layers: list[str] = []
        order: list[str] | None = None
        while True:
            chosen[name] = _left_float(models[name], floats[name], layers)
            score, before, apart, judged = judge(chosen, name)
            progress(
                f"{name}: Dice {score:.4f} (float32: {before:.4f}), {apart:.2f} grey levels in the mean, "
                f"{len(layers)} layers in float" + ("" if judged else "; nothing is positive there: not judged")
            )
            if score >= (LEAST_CELLS if cells else before - MOST_LOST):
                break
            if order is None:
                gains = {
                    layer: judge({**chosen, name: _left_float(models[name], floats[name], [layer])}, name)[2]
                    for layer in _quantised_layers(models[name])
                }
                order = sorted(gains, key=lambda layer: gains[layer], reverse=True)
            if not order:
                raise ParityError(f"{name}: Dice {score:.4f} in 8 bits, {before:.4f} in float32: nothing is written")
            layers.append(order.pop())
        left[name] = (layers, None if cells else (score, before))
    return left


def _areas(ours: Any, real: Any) -> Any:
    """Numerator and denominator of the Dice of two areas."""
    return np.array([2.0 * (ours & real).sum(), ours.sum() + real.sum()])


def _dice(areas: Any) -> float:
    return float(areas[0] / areas[1]) if areas[1] else 1.0


@contextlib.contextmanager
def _trial(
    floats: Mapping[str, onnx.ModelProto], chosen: Mapping[str, onnx.ModelProto], graphs: GraphSet, folder: Path
) -> Iterator[Callable[[UInt8Array], Arrays]]:
    """Some engines in 8 bits and the others in float32, as one OpenVINO graph: from an H&E tile to all tensors."""
    from staindiffuser.triton_models.engine import engine_openvino

    files = []
    for name, model in floats.items():
        files.append(folder / f"trial {name}.onnx")
        copy = onnx.ModelProto()
        copy.CopyFrom(chosen.get(name, model))
        mark(copy, "int8" if chosen else "fp32")
        onnx.save(copy, files[-1])
    engine = engine_openvino.load_joined(files)
    outputs = [tensor.name for name in floats for tensor in graphs.engines[name].outputs]
    read = {tensor.name for name in floats for tensor in graphs.engines[name].inputs}
    noise, cell_noise = tile_noise(
        np.zeros((1, 1), np.int64),
        np.zeros((1, 2), np.int64),
        steps=graphs.steps,
        height=graphs.tile,
        width=graphs.tile,
    )

    def run(he: UInt8Array) -> Arrays:
        inputs = {
            name: z for name, z in {"HE": he[None], "NOISE": noise, "NOISE_CELLS": cell_noise}.items() if name in read
        }
        return {**inputs, **engine.run(inputs, outputs)}

    try:
        yield run
    finally:
        engine.close()


def _quantised(nncf: Any, model: onnx.ModelProto, items: Sequence[Arrays]) -> onnx.ModelProto:
    kept = [node.name for node in model.graph.node if node.op_type != "Conv" or not _QUANTISED.search(node.input[1])]
    quantised: onnx.ModelProto = nncf.quantize(
        model,
        nncf.Dataset(items),
        subset_size=len(items),
        preset=nncf.QuantizationPreset.MIXED,
        ignored_scope=nncf.IgnoredScope(names=[name for name in kept if name], validate=False),
    )
    del quantised.metadata_props[:]
    return quantised


def _quantised_layers(model: onnx.ModelProto) -> list[str]:
    """Names of the convolutions that read 8 bits."""
    giver = {output: node for node in model.graph.node for output in node.output}
    return [
        node.name
        for node in model.graph.node
        if node.op_type == "Conv" and (before := giver.get(node.input[0])) and before.op_type == "DequantizeLinear"
    ]


def _left_float(model: onnx.ModelProto, original: onnx.ModelProto, layers: Sequence[str]) -> onnx.ModelProto:
    """A copy in which these convolutions read what they read before."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    before = {node.name: node for node in original.graph.node}
    weights = {tensor.name: tensor for tensor in original.graph.initializer}
    for node in graph.node:
        if node.name in layers:
            node.input[0], node.input[1] = before[node.name].input[:2]
            if node.input[1] not in {tensor.name for tensor in graph.initializer}:
                graph.initializer.append(weights[node.input[1]])
    given = {output.name for output in graph.output}
    while True:  # what nobody reads any more
        read = given | {name for node in graph.node for name in node.input}
        unread = [node for node in graph.node if not read & set(node.output)]
        for node in unread:
            graph.node.remove(node)
        if not unread:
            break
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in read]:
        graph.initializer.remove(tensor)
    return copy


def _folded(path: Path) -> onnx.ModelProto:
    """A graph whose weights, which are stored in half precision behind a Cast, are float32, as NNCF looks for them."""
    model = onnx.load(path)
    halves = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in [node for node in model.graph.node if node.op_type == "Cast" and node.input[0] in halves]:
        tensor = halves[node.input[0]]
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), node.output[0]))
        model.graph.node.remove(node)
    return model


def _halved(model: onnx.ModelProto) -> onnx.ModelProto:
    """The float weights of convolutions in half precision behind a Cast, as :func:`_folded` found them."""
    graph = model.graph
    read = {node.input[1] for node in graph.node if node.op_type == "Conv"}
    casts = []
    for tensor in graph.initializer:
        if tensor.name in read and tensor.data_type == onnx.TensorProto.FLOAT:
            casts.append(onnx.helper.make_node("Cast", [f"{tensor.name}.half"], [tensor.name], to=tensor.data_type))
            half = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(half, f"{tensor.name}.half"))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def _of(engine: EngineGraph, arrays: Arrays) -> Arrays:
    return {tensor.name: arrays[tensor.name] for tensor in engine.inputs}


def _nncf() -> Any:
    try:
        importlib.metadata.version("openvino")
        import nncf
    except (ImportError, importlib.metadata.PackageNotFoundError) as error:
        raise DependencyError(f"8 bits need NNCF and OpenVINO ({error}): pip install 'staindiffuser[int8]'") from error
    from staindiffuser.triton_models.engine import engine_openvino

    if not engine_openvino.computes("int8"):
        raise DependencyError(
            "this processor does not compute in 8 bits (AVX-512 VNNI and BF16): choose another machine"
        )
    nncf.set_log_level(logging.ERROR)
    return nncf
