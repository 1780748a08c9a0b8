"""Adds to a folder of graphs the engines that judge tiles, with the statistics of the tissue that a model knows.

Torch is not needed: the encoder's graph runs in ONNX Runtime over tiles of the training tissue, and what it says of
them becomes constants of the graph ``quality`` (:mod:`staindiffuser.export.quality_graph`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from PIL import Image, ImageFilter

from staindiffuser.export.description import QUALITY, EngineGraph, GraphSet, Quality, TensorSpec
from staindiffuser.export.errors import ExportUsageError
from staindiffuser.export.parity import Golden, run_pipeline
from staindiffuser.export.publishing import locked, staging_folder
from staindiffuser.export.quality_graph import (
    FEW,
    POOLED,
    STAIN_MEASURES,
    TILE_MEASURES,
    pool_graph,
    stain_graph,
    tile_graph,
)
from staindiffuser.files import file_sha256
from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.image_files import read_image
from staindiffuser.imaging.instances import HALF
from staindiffuser.training.tiles.paired_tiles import PairedTile, PairedTiles
from staindiffuser.triton_models.engine.engine_onnxruntime import OnnxRuntimeEngine

__all__ = ["add_quality", "compose_field", "field_plans", "fields", "statistics"]

FEWEST = 32
"""Fields of reference tissue below which no statistics are made."""
SHRINKAGE = 0.1
"""Share of the diagonal in the covariance (ours): a few hundred fields do not determine hundreds of variances."""
DEAD = 0.05
"""Standard deviation that a feature is taken to have at least, in shares of the features' mean one (ours): one that
never fires in the reference must not decide alone."""
QUANTILE = 0.99
"""Of the reference tissue, a field of a region that the statistics did not see is at most as unlike as the limit with
this probability, unless another is asked for. A reference of several kinds of tissue is wide: it wants a lower one."""
SEEN_BLUR = 2.0
"""Gaussian, pixels, that a person sees at once. The limit of blur lies halfway between the reference as it is (its
:data:`QUANTILE`) and the reference blurred like this (the other end): regions differ in sharpness."""
FOLDS = 5
MOST_COLOUR = 0.015
"""Share of a tile that may have a colour which H&E does not give: of the real tissue that we have none does, and the
thinnest stroke of a pen covers more (ours)."""
MOST_CLIPPED = 0.2
"""Share of the tissue that may be clipped. Reference tissue is hardly clipped at all, which gives no limit (ours)."""

Array = npt.NDArray[np.float64]


def add_quality(graphs_dir: Path, tiles: Sequence[Path], *, most: int = 400, quantile: float = QUANTILE) -> GraphSet:
    """Add the engines ``quality`` and ``quality_<stain>`` to a folder of graphs, or replace them.

    Args:
        graphs_dir: what ``export graphs`` wrote; replaced as a whole.
        tiles: folders of paired tiles. Of each the training split is the tissue that the model knows.
        most: fields at most from each folder, evenly spread.
        quantile: of the reference's ``unlike``, as measured on slides left out of the statistics: its limit.

    Returns:
        The new description. Its ``model_version`` is the old one: no pixel changes.

    Raises:
        GraphsError, ManifestError: the graphs are missing or damaged.
        DataError, ImageError: the tiles are.
        ExportUsageError: there are too few of them, or the folder cannot be written.
    """
    graphs = GraphSet.load(graphs_dir)
    groups: list[str] = []
    pooled, measured, blurred = [], [], []
    encoder = graphs.engines["he_encoder"]
    pool = pool_graph(encoder.inputs[0], encoder.outputs)
    size = pool.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    plain = tile_graph(encoder.inputs[0], encoder.outputs, np.zeros(size), np.eye(size))
    try:
        with locked(graphs_dir.resolve()), staging_folder(graphs_dir.resolve()) as folder:
            scratch = folder / "scratch"
            scratch.mkdir()
            onnx.save(pool, scratch / "pool.onnx")
            onnx.save(plain, scratch / "plain.onnx")
            encode = OnnxRuntimeEngine(graphs_dir / encoder.file)
            engines = [OnnxRuntimeEngine(scratch / name) for name in ("pool.onnx", "plain.onnx")]
            for number, source in enumerate(tiles):
                for slide, he in fields(PairedTiles.load(source).split("train"), graphs.tile, graphs.mpp, most):
                    inputs = {"HE": he[None]}
                    inputs |= encode.run(inputs, [spec.name for spec in encoder.outputs])
                    pooled.append(engines[0].run(inputs, [POOLED])[POOLED][0])
                    measured.append(engines[1].run(inputs, ["QUALITY"])["QUALITY"][0])
                    inputs["HE"] = _blurred(he)[None]
                    blurred.append(engines[1].run(inputs, ["QUALITY"])["QUALITY"][0])
                    groups.append(f"{number} {slide}")
            judged = np.array(measured, np.float64).reshape(len(measured), len(TILE_MEASURES))
            enough = judged[:, TILE_MEASURES.index("tissue")] >= 0.2 if len(judged) else np.zeros(0, bool)
            if enough.sum() < FEWEST:
                raise ExportUsageError(
                    f"{int(enough.sum())} fields of {graphs.tile} px hold tissue, {FEWEST} are needed: "
                    "give more --tiles"
                )
            vectors = np.array(pooled, np.float64)[enough]
            names = [name for name, use in zip(groups, enough, strict=True) if use]
            mean, whitening = statistics(vectors)
            share = judged[enough, TILE_MEASURES.index("tissue")]
            sharp, dull = (np.array(of)[enough, TILE_MEASURES.index("blur")] for of in (measured, blurred))
            sharpest, dullest = np.quantile(sharp, QUANTILE), np.quantile(dull, 1 - QUANTILE)
            quality = Quality(
                tile=TILE_MEASURES,
                stain=STAIN_MEASURES,
                limits={
                    "unlike": _rounded(np.quantile(_held_out(vectors, names) * share**FEW, quantile)),
                    "blur": _rounded(max(sharpest, (sharpest + dullest) / 2)),
                    "clipped": MOST_CLIPPED,
                    "colour": MOST_COLOUR,
                },
                reference=f"{len(vectors)} fields from {len(set(names))} slides",
            )
            shutil.rmtree(scratch)
            models = {QUALITY: tile_graph(encoder.inputs[0], encoder.outputs, mean, whitening)}
            for stain in graphs.stains:
                outputs = [graphs.engines[f"{kind}_{stain.name}"].outputs[0] for kind in ("stain", "cells")]
                name = f"{QUALITY}_{stain.name}"
                threshold = graphs.thresholds.get(stain.name, HALF)
                models[name] = stain_graph(encoder.inputs[0], outputs[0], outputs[1], name.upper(), threshold)
            return _write(graphs, graphs_dir, folder, models, quality)
    except OSError as error:
        raise ExportUsageError(f"{graphs_dir} cannot be written: {error.strerror or error}") from error


def statistics(vectors: Array) -> tuple[Array, Array]:
    """Mean [D] of the vectors [N, D], and a whitening [D, D] for their distances.

    The covariance is shrunk towards its diagonal; its smallest variances are raised to a thousandth of the mean one in
    units of the features' own standard deviations, so that no direction that the reference hardly varies in decides.
    """
    mean = vectors.mean(axis=0)
    deviation = vectors.std(axis=0)
    deviation = np.maximum(deviation, DEAD * deviation.mean())
    scaled = (vectors - mean) / deviation
    covariance = scaled.T @ scaled / len(scaled)
    covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * np.eye(len(mean))
    values, directions = np.linalg.eigh(covariance)
    return mean, (directions / np.sqrt(np.maximum(values, 1e-3))) / deviation[:, None]


def _held_out(vectors: Array, groups: Sequence[str]) -> Array:
    """``unlike`` of each vector under statistics of the other slides: what new tissue of the same kind will have."""
    order = {group: number % FOLDS for number, group in enumerate(sorted(set(groups)))}
    folds = np.array([order[group] for group in groups])
    distances = np.empty(len(vectors))
    for fold in set(folds):
        others = vectors[folds != fold] if (folds != fold).sum() >= FEWEST // 2 else vectors
        mean, whitening = statistics(others)
        white = (vectors[folds == fold] - mean) @ whitening
        distances[folds == fold] = np.sqrt(np.mean(white**2, axis=1))
    return distances


def fields(tiles: Iterable[PairedTile], side: int, mpp: float, most: int) -> Iterator[tuple[str, UInt8Array]]:
    """Fields of a model's size from H&E tiles, with the name of their slide: uint8 [side, side, 3].

    Args:
        tiles: of paired tiles.
        side: of a field, pixels.
        mpp: of a field, µm per pixel.
        most: fields at most, evenly spread over the tiles.
    """
    for slide, members in field_plans(tiles, side, mpp, most):
        yield slide, compose_field([tile.he for tile in members], members[0].mpp, side, mpp)


def field_plans(
    tiles: Iterable[PairedTile], side: int, mpp: float, most: int
) -> list[tuple[str, tuple[PairedTile, ...]]]:
    """Which tiles make which field: larger ones make one each, smaller ones of a slide as many as it takes to fill one;
    what is left over is not used. Arguments as for :func:`fields`."""
    by_slide: dict[str, list[PairedTile]] = {}
    for tile in tiles:
        by_slide.setdefault(tile.slide, []).append(tile)
    plans: list[tuple[str, tuple[PairedTile, ...]]] = []
    for slide, members in by_slide.items():
        shortest = min(min(tile.size) for tile in members) * members[0].mpp / mpp
        count = math.ceil(side / shortest - 1e-6) ** 2
        firsts = range(0, len(members) - count + 1, count)
        plans += [(slide, tuple(members[first : first + count])) for first in firsts]
    chosen = min(most, len(plans))
    return [plans[number * len(plans) // chosen] for number in range(chosen)]


def compose_field(paths: Sequence[Path], path_mpp: float, side: int, mpp: float) -> UInt8Array:
    """Images side by side, n² of them, resampled from ``path_mpp`` to ``mpp``: uint8 [side, side, 3].

    Raises:
        ImageError: one of them cannot be read.
    """
    across = math.isqrt(len(paths))
    images = [_resampled(read_image(path), path_mpp / mpp, side, across) for path in paths]
    rows = [np.concatenate(images[row * across : (row + 1) * across], axis=1) for row in range(across)]
    return np.ascontiguousarray(np.concatenate(rows)[:side, :side])


def _resampled(image: UInt8Array, scale: float, side: int, across: int) -> UInt8Array:
    """The middle of an image at another scale: [n, n, 3] with n = side / across, rounded up."""
    wanted = -(-side // across)
    if abs(scale - 1) > 0.01:
        size = (max(wanted, round(image.shape[1] * scale)), max(wanted, round(image.shape[0] * scale)))
        image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    top, left = ((length - wanted) // 2 for length in image.shape[:2])
    return image[top : top + wanted, left : left + wanted]


def _blurred(he: UInt8Array) -> UInt8Array:
    return np.asarray(Image.fromarray(he).filter(ImageFilter.GaussianBlur(SEEN_BLUR)))


def _rounded(value: Any) -> float:
    return float(f"{value:.3g}")


def _write(
    graphs: GraphSet, source: Path, folder: Path, models: Mapping[str, onnx.ModelProto], quality: Quality
) -> GraphSet:
    """Everything of the graphs folder, with the new engines and their golden outputs, into ``folder``."""
    kept = {name: engine for name, engine in graphs.engines.items() if not name.startswith(QUALITY)}
    for file in (*(engine.file for engine in kept.values()), *(copy.file for copy in graphs.int8.values())):
        shutil.copyfile(source / file, folder / file)
    added = {name: _save(folder, name, model) for name, model in models.items()}
    engines = {**kept, **added}
    golden = Golden.load(source / graphs.golden)
    loaded = {name: OnnxRuntimeEngine(folder / engine.file) for name, engine in engines.items()}
    found: dict[str, list[npt.NDArray[Any]]] = {}
    for row in range(golden.samples):
        one = {name: array[row : row + 1] for name, array in golden.inputs.items()}
        outputs = run_pipeline(loaded, engines, steps=graphs.steps, tile=graphs.tile, inputs=one)[1]
        for name, array in outputs.items():
            if name.startswith(QUALITY.upper()):
                found.setdefault(name, []).append(array)
    judged = {name: np.concatenate(parts) for name, parts in found.items()}
    images = {name: array for name, array in golden.outputs.items() if not name.startswith(QUALITY.upper())}
    np.savez_compressed(folder / graphs.golden, **golden.inputs, **images, **judged)
    changed = dataclasses.replace(
        graphs, engines=engines, quality=quality, golden_sha256=file_sha256(folder / graphs.golden)
    )
    changed.save(folder)
    return changed


def _save(folder: Path, name: str, model: onnx.ModelProto) -> EngineGraph:
    path = folder / f"{name}.onnx"
    onnx.save(model, path)
    constants = hashlib.sha256()
    for tensor in model.graph.initializer:
        constants.update(tensor.SerializeToString(deterministic=True))
    return EngineGraph(
        file=path.name,
        graph_sha256=file_sha256(path),
        weights_sha256=constants.hexdigest(),
        inputs=tuple(map(_spec, model.graph.input)),
        outputs=tuple(map(_spec, model.graph.output)),
    )


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return TensorSpec(name=value.name, dtype=dtype, shape=tuple(dim.dim_value for dim in tensor.shape.dim[1:]))
