"""The graphs that judge a tile: small ONNX programs, written without torch, that run as engines beside the branches.

``quality`` reads the H&E and the encoder's features and says what kind of tile this is; ``quality_<stain>`` reads the
H&E and the stain's image and cell map and says how far they agree::

    HE, FEATURES_0..3                  ─► quality          ─► QUALITY        FP32 [B, 5]
    HE, STAIN_<NAME>, CELLS_<NAME>     ─► quality_<stain>  ─► QUALITY_<NAME> FP32 [B, 3]

They are kept apart so that a request without a stain's images or cells still learns about its tiles, and pays once for
what does not depend on the stain. Only operators that every target knows are used. All constants are ours unless a
source is named.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from staindiffuser.export.description import TensorSpec
from staindiffuser.imaging.instances import HALF, lowest_grey
from staindiffuser.imaging.optical_density import DAB_THRESHOLD, STAIN_MATRIX

__all__ = ["POOLED", "STAIN_MEASURES", "TILE_MEASURES", "pool_graph", "stain_graph", "tile_graph"]

TILE_MEASURES = ("tissue", "unlike", "blur", "clipped", "colour")
"""Share of the tile that is tissue; distance of its features from those of the training tissue; blur; share of the
tissue with a channel at either end of its range; share of the tile that has a colour which hematoxylin and eosin do not
give, such as pen or another stain."""
STAIN_MEASURES = ("positive", "disagreement", "uncertainty")
"""Share of the tile that is DAB-positive; share of the pixels that are either DAB-positive or in a cell, but not both;
mean uncertainty of the cell map."""
POOLED = "POOLED"
"""Output of :func:`pool_graph`: the vector whose distance ``unlike`` measures."""

TISSUE_LEVEL = 207.0
"""Grey level of its darkest channel up to which a pixel is tissue; scanned glass has 220 and more."""
FEW = 0.4
"""Means over little tissue vary more: at a share s of tissue, features lie about s^-0.4 times as far from their mean.
Measured on 393 fields of the reference with glass laid over 40 to 92 % of them; without this, tiles at the edge of the
tissue would be unlike it."""
LEAST_TISSUE = 0.05
"""Share of tissue below which ``unlike`` fades to 0: there is nothing to judge."""
CLIPPED = (2.0, 253.0)
"""Grey levels at and beyond which a channel counts as clipped."""
BLOCK = 16
"""Side of the squares whose mean colour is judged, pixels: as large as a nucleus, smaller than a stroke of a pen."""
DEEP = 0.2
"""Optical density in some channel from which a square has a colour to judge."""
MOST_RED, MOST_BLUE, SLACK = 0.95, 0.75, 0.02
"""H&E absorbs green the most: its density in red is at most the first share of that in green, in blue at most the
second, apart from a white balance that is a little off. (:mod:`staindiffuser.imaging.artefacts` looks at overviews.)"""
SMALLEST_UNION = 0.001
"""Share of the tile that the union of DAB mask and cells is taken to have at least: a few pixels are no dissent."""
_LOG10 = 1.0 / math.log(10.0)
_SMALL = 1e-6
OPSET, IR_VERSION = 18, 9

Array = npt.NDArray[Any]


@dataclass
class _Graph:
    """A graph that is being written; every method returns the name of the tensor that it adds."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def constant(self, value: npt.ArrayLike, dtype: type = np.float32) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def number(self, tensor: str) -> str:
        """float32 of an image or a feature map."""
        return self.add("Cast", tensor, to=TensorProto.FLOAT)

    def planes(self, image: str) -> str:
        """uint8 [B, H, W, C] to float32 [B, C, H, W]."""
        return self.add("Transpose", self.number(image), perm=[0, 3, 1, 2])

    def plus(self, tensor: str, value: float) -> str:
        return self.add("Add", tensor, self.constant(value))

    def times(self, tensor: str, value: float) -> str:
        return self.add("Mul", tensor, self.constant(value))

    def at_least(self, tensor: str, threshold: float) -> str:
        """1 where the value is at least the threshold, else 0."""
        return self.number(self.add("GreaterOrEqual", tensor, self.constant(threshold)))

    def total(self, tensor: str) -> str:
        """Sum over the pixels: [B, C, H, W] to [B, C, 1, 1]."""
        return self.add("ReduceSum", tensor, self.constant([2, 3], np.int64), keepdims=1)

    def mean(self, tensor: str, weight: str, weight_total: str) -> str:
        """Weighted mean over the pixels: [B, C, 1, 1]."""
        return self.add("Div", self.total(self.add("Mul", tensor, weight)), weight_total)

    def log10(self, tensor: str) -> str:
        return self.times(self.add("Log", tensor), _LOG10)

    def density(self, planes: str) -> str:
        """Optical density ``-log10((I + 1) / 256)``."""
        return self.times(self.log10(self.times(self.plus(planes, 1.0), 1 / 256)), -1.0)

    def mix(self, planes: str, weights: Sequence[float]) -> str:
        """One plane from several: [B, C, H, W] to [B, 1, H, W]."""
        kernel = np.asarray(weights, np.float32).reshape(1, -1, 1, 1)
        return self.add("Conv", planes, self.constant(kernel), kernel_shape=[1, 1])

    def tissue(self, planes: str) -> str:
        """1 where there is tissue: [B, 1, H, W]."""
        darkest = self.add("ReduceMin", planes, self.constant([1], np.int64), keepdims=1)
        return self.at_least(self.times(darkest, -1.0), -TISSUE_LEVEL)

    def row(self, *columns: str) -> str:
        """[B, C, 1, 1] each, to float32 [B, sum of C]."""
        joined = self.add("Concat", *columns, axis=1) if len(columns) > 1 else columns[0]
        return self.add("Reshape", joined, self.constant([0, -1], np.int64))

    def model(self, name: str, result: str, inputs: Sequence[TensorSpec], output: TensorSpec) -> onnx.ModelProto:
        """The whole graph, with ``result`` under the output's name."""
        self.nodes.append(helper.make_node("Identity", [result], [output.name]))

        def info(spec: TensorSpec) -> onnx.ValueInfoProto:
            dtype = helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype))
            return helper.make_tensor_value_info(spec.name, dtype, ["batch", *spec.shape])

        graph = helper.make_graph(self.nodes, name, list(map(info, inputs)), [info(output)], self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        onnx.checker.check_model(model, full_check=True)
        return model


def pool_graph(he: TensorSpec, features: Sequence[TensorSpec]) -> onnx.ModelProto:
    """The vector that stands for a tile: per feature, mean and standard deviation over its tissue, every level.

    Args:
        he: the tile, uint8 [T, T, 3].
        features: the encoder's outputs, finest first.

    Returns:
        A graph whose output :data:`POOLED` is float32 [B, 2 × sum of the features].
    """
    graph = _Graph()
    pooled = _pooled(graph, graph.tissue(graph.planes(he.name)), he, features)
    size = 2 * sum(spec.shape[0] for spec in features)
    return graph.model("pool", pooled, (he, *features), TensorSpec(name=POOLED, dtype="float32", shape=(size,)))


def tile_graph(he: TensorSpec, features: Sequence[TensorSpec], mean: Array, whitening: Array) -> onnx.ModelProto:
    """``quality``: the measures :data:`TILE_MEASURES` of a tile.

    Args:
        he: the tile, uint8 [T, T, 3].
        features: the encoder's outputs, finest first.
        mean: of the pooled vectors of the training tissue, [D].
        whitening: [D, K], makes their covariance the identity. ``unlike`` is the root of the mean square of the K
            whitened values, so about 1 for the training tissue itself: a Mahalanobis distance. Where only a part of
            the tile is tissue, it is made smaller, by :data:`FEW`.
    """
    graph = _Graph()
    planes = graph.planes(he.name)
    tissue = graph.tissue(planes)
    area = graph.total(tissue)
    share = graph.times(area, 1 / (he.shape[0] * he.shape[1]))
    pooled = _pooled(graph, tissue, he, features)
    centred = graph.add("Sub", pooled, graph.constant(mean))
    white = graph.add("MatMul", centred, graph.constant(whitening))
    square = graph.add("ReduceSum", graph.add("Mul", white, white), graph.constant([1], np.int64), keepdims=1)
    distance = graph.add("Sqrt", graph.times(square, 1 / whitening.shape[1]))
    judged = graph.add("Clip", graph.times(share, 1 / LEAST_TISSUE), graph.constant(0.0), graph.constant(1.0))
    whole = graph.add("Pow", graph.plus(share, _SMALL), graph.constant(FEW))
    unlike = graph.add("Mul", distance, graph.row(graph.add("Mul", judged, whole)))
    columns = [graph.row(share), unlike, graph.row(_blur(graph, planes, tissue, area))]
    columns.append(graph.row(_clipped(graph, planes, tissue, area)))
    columns.append(graph.row(_colour(graph, planes, he)))
    result = graph.add("Concat", *columns, axis=1)
    return graph.model("quality", result, (he, *features), _output("QUALITY", TILE_MEASURES))


def stain_graph(
    he: TensorSpec, image: TensorSpec, cells: TensorSpec, name: str, threshold: float = HALF
) -> onnx.ModelProto:
    """``quality_<stain>``: the measures :data:`STAIN_MEASURES` of a tile's image and cell map.

    Args:
        he: the tile, uint8 [T, T, 3].
        image: its virtual stain, uint8 [T, T, 3].
        cells: its cell map, uint8 [T, T, 1].
        name: of the output, ``QUALITY_<NAME>``.
        threshold: the probability from which a cell is positive.
    """
    graph = _Graph()
    tissue = graph.tissue(graph.planes(he.name))
    dab = graph.mix(graph.density(graph.planes(image.name)), np.linalg.inv(STAIN_MATRIX)[:, 1].tolist())
    # As in imaging.optical_density.dab_mask: a Gaussian of 1 px, cut at three, then the threshold. The frame is padded
    # with zeros instead of repeated, which concerns three pixels of the margin.
    taps = np.exp(-0.5 * np.arange(-3, 4) ** 2)
    kernel = np.outer(taps, taps) / taps.sum() ** 2
    smooth = graph.add("Conv", dab, graph.constant(kernel[None, None]), kernel_shape=[7, 7], pads=[3, 3, 3, 3])
    positive = graph.at_least(smooth, DAB_THRESHOLD)
    level = graph.planes(cells.name)
    probability = graph.times(level, 1 / 255)
    stained = graph.at_least(level, lowest_grey(threshold))
    pixels = he.shape[0] * he.shape[1]
    both = graph.times(graph.total(graph.add("Mul", positive, stained)), 1 / pixels)
    either = graph.add("Sub", graph.times(graph.total(graph.add("Add", positive, stained)), 1 / pixels), both)
    least = graph.add("Max", either, graph.constant(SMALLEST_UNION))
    disagreement = graph.add("Div", graph.add("Sub", either, both), least)
    # 4 p (1 − p): 0 where the map is sure, 1 where it says one half.
    doubt = graph.times(graph.add("Mul", probability, graph.plus(graph.times(probability, -1.0), 1.0)), 4.0)
    area = graph.plus(graph.total(tissue), _SMALL)
    columns = (graph.times(graph.total(positive), 1 / pixels), disagreement, graph.mean(doubt, tissue, area))
    return graph.model("quality", graph.row(*columns), (he, image, cells), _output(name, STAIN_MEASURES))


def _output(name: str, measures: Sequence[str]) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=(len(measures),))


def _pooled(graph: _Graph, tissue: str, he: TensorSpec, features: Sequence[TensorSpec]) -> str:
    parts = []
    for spec in features:
        step = he.shape[0] // spec.shape[1]
        weight = graph.add("AveragePool", tissue, kernel_shape=[step, step], strides=[step, step])
        total = graph.plus(graph.total(weight), _SMALL)
        values = graph.number(spec.name)
        mean = graph.mean(values, weight, total)
        apart = graph.add("Sub", values, mean)
        variance = graph.mean(graph.add("Mul", apart, apart), weight, total)
        parts += [mean, graph.add("Sqrt", graph.plus(variance, _SMALL))]
    return graph.row(*parts)


def _blur(graph: _Graph, planes: str, tissue: str, area: str) -> str:
    """How much of the tissue's contrast lies between neighbouring pixels: the variance of the Laplacian in shares of
    the variance (Pech-Pacheco et al. 2000, made independent of the stain's strength), as −log10: larger is blurrier."""
    grey = graph.mix(planes, [1 / 3] * 3)
    laplacian = graph.constant(np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None])
    inner = graph.constant(np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]])[None, None])
    edges = graph.add("Conv", grey, laplacian, kernel_shape=[3, 3])  # no padding, which would look like edges
    weight = graph.add("Conv", tissue, inner, kernel_shape=[3, 3])
    energy = graph.mean(graph.add("Mul", edges, edges), weight, graph.plus(graph.total(weight), _SMALL))
    total = graph.plus(area, _SMALL)
    apart = graph.add("Sub", grey, graph.mean(grey, tissue, total))
    contrast = graph.mean(graph.add("Mul", apart, apart), tissue, total)
    share = graph.add("Div", graph.plus(energy, 0.01), graph.plus(contrast, 1.0))
    return graph.times(graph.log10(share), -1.0)


def _clipped(graph: _Graph, planes: str, tissue: str, area: str) -> str:
    low = graph.add("ReduceMin", planes, graph.constant([1], np.int64), keepdims=1)
    high = graph.add("ReduceMax", planes, graph.constant([1], np.int64), keepdims=1)
    dark = graph.at_least(graph.times(low, -1.0), -CLIPPED[0])
    bright = graph.at_least(high, CLIPPED[1])
    clipped = graph.add("Max", dark, bright)
    return graph.mean(clipped, tissue, graph.plus(area, _SMALL))


def _colour(graph: _Graph, planes: str, he: TensorSpec) -> str:
    blocks = graph.add("AveragePool", planes, kernel_shape=[BLOCK, BLOCK], strides=[BLOCK, BLOCK])
    density = graph.density(blocks)
    deep = graph.at_least(graph.add("ReduceMax", density, graph.constant([1], np.int64), keepdims=1), DEEP)
    red = graph.at_least(graph.mix(density, [1.0, -MOST_RED, 0.0]), SLACK)
    blue = graph.at_least(graph.mix(density, [0.0, -MOST_BLUE, 1.0]), SLACK)
    foreign = graph.add("Mul", deep, graph.add("Max", red, blue))
    return graph.times(graph.total(foreign), 1 / ((he.shape[0] // BLOCK) * (he.shape[1] // BLOCK)))
