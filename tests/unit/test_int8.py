"""Copies of graphs in 8 bits: what stays in float, what is refused, and that they are built, checked and chosen."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from staindiffuser.export import int8
from staindiffuser.export.builders import BuildOptions
from staindiffuser.export.choosing import available
from staindiffuser.export.description import GraphSet
from staindiffuser.export.errors import GraphsError, ManifestError, ParityError
from staindiffuser.export.int8 import add_int8
from staindiffuser.export.parity import LIMITS, Limits
from staindiffuser.export.repository import build
from staindiffuser.files import file_sha256
from staindiffuser.serving.demo import shipped_models
from staindiffuser.training.simulate.folder import TilesRequest, write_tiles
from tests.synthetic_graphs import write_graphs

openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install 'staindiffuser[openvino]'")
from staindiffuser.triton_models.engine import engine_openvino  # noqa: E402

needs_8_bits = pytest.mark.skipif(
    not engine_openvino.computes("int8"), reason="this processor does not compute in 8 bits (AVX-512 VNNI and BF16)"
)


class Quantiser:
    """In NNCF's place: it quantises every convolution that is not to be ignored, with ranges that are wide enough."""

    class QuantizationPreset:
        MIXED = "mixed"

    def __init__(self, steps: int) -> None:
        self.steps = steps
        """Of a range of weights: 127 for 8 bits, fewer to do badly."""

    def Dataset(self, items: Sequence[Any]) -> Sequence[Any]:  # noqa: N802
        return items

    def IgnoredScope(self, names: Sequence[str], validate: bool) -> set[str]:  # noqa: N802
        return set(names)

    def quantize(
        self, model: onnx.ModelProto, items: Any, subset_size: int, preset: str, ignored_scope: set[str]
    ) -> onnx.ModelProto:
        assert len(items) == subset_size
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        graph = copy.graph
        weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        nodes = []
        for node in graph.node:
            if node.op_type == "Conv" and node.name not in ignored_scope:
                weight = weights[node.input[1]]
                step = np.abs(weight).max() / self.steps
                constants = {
                    "x.step": np.array(0.05, np.float32),
                    "w.step": np.array(step, np.float32),
                    "zero": np.array(0, np.int8),
                    "w.8": np.round(weight / step).astype(np.int8),
                }
                own = {name: f"{node.name}.{name}" for name in (*constants, "x.8", "x", "w")}
                graph.initializer.extend(numpy_helper.from_array(a, own[name]) for name, a in constants.items())
                nodes += [
                    helper.make_node("QuantizeLinear", [node.input[0], own["x.step"], own["zero"]], [own["x.8"]]),
                    helper.make_node("DequantizeLinear", [own["x.8"], own["x.step"], own["zero"]], [own["x"]]),
                    helper.make_node("DequantizeLinear", [own["w.8"], own["w.step"], own["zero"]], [own["w"]]),
                ]
                node.input[0], node.input[1] = own["x"], own["w"]
            nodes.append(node)
        del graph.node[:]
        graph.node.extend(nodes)
        return copy


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8") / "tiles"
    write_tiles(TilesRequest(output=folder, count=9, size=64, seed=5, val_share=0.0, test_share=0.0, jobs=1))
    return folder


@pytest.fixture
def graphs(tmp_path: Path) -> Path:
    """Graphs whose 3 x 3 convolutions are named as those in residual blocks are."""
    folder = tmp_path / "graphs"
    described = write_graphs(folder, tile=64, steps=1)
    engines = {}
    for name, engine in described.engines.items():
        model = onnx.load(folder / engine.file)
        sizes = {tensor.name: tensor.dims[2:] for tensor in model.graph.initializer if len(tensor.dims) == 4}
        for number, node in enumerate(model.graph.node):
            node.name = f"node {number}"
            if node.op_type == "Conv" and list(sizes[node.input[1]]) == [3, 3]:
                (weight,) = [tensor for tensor in model.graph.initializer if tensor.name == node.input[1]]
                weight.name = node.input[1] = f"branch.blocks.0.conv0.{number}"
        onnx.save(model, folder / engine.file)
        engines[name] = dataclasses.replace(engine, graph_sha256=file_sha256(folder / engine.file))
    dataclasses.replace(described, engines=engines).save(folder)
    return folder


@needs_8_bits
def test_copies_are_made_built_checked_and_can_be_chosen(
    graphs: Path, tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = GraphSet.load(graphs)
    with pytest.raises(GraphsError, match="no copies in 8 bits: make them with `export int8`"):
        build(graphs, tmp_path / "repository", target="openvino", options=BuildOptions(precision="int8"))
    assert available(before, BuildOptions())[1]["openvino int8"] == "the graphs have no copies in 8 bits (export int8)"

    monkeypatch.setattr(int8, "_nncf", lambda: Quantiser(127))
    monkeypatch.setattr(int8, "LEAST_CELLS", 0.9)
    after = add_int8(graphs, [tiles])
    assert after.model_version == before.model_version
    assert list(after.int8) == list(before.engines)
    assert after.int8["stain_cd3"].dab_dice is not None
    assert after.int8["cells_cd3"].dab_dice is None
    assert "openvino int8" in available(after, BuildOptions())[0]
    monkeypatch.setitem(LIMITS, "int8", Limits(levels=255, over_one=1.0, quality=0.2, dab_dice=0.5))
    manifest = build(
        graphs, tmp_path / "repository", target="openvino", options=BuildOptions(max_batch=2, precision="int8")
    ).manifest
    assert manifest.precision == "int8"
    assert manifest.model_version not in (before.model_version, before.at("bf16").model_version)
    served = onnx.load(tmp_path / "repository" / manifest.engines["stain_cd3"].file)
    assert "QuantizeLinear" in {node.op_type for node in served.graph.node}

    (graphs / after.int8["stain_cd3"].file).write_bytes(b"damaged")
    with pytest.raises(ManifestError, match=r"stain_cd3\.int8\.onnx differs"):
        GraphSet.load(graphs)


@needs_8_bits
def test_layers_that_suffer_go_back_to_float(graphs: Path, tiles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "_nncf", lambda: Quantiser(1))  # weights of -1, 0 and 1
    said: list[str] = []
    with pytest.raises(ParityError, match=r"stain_cd3: Dice .* in 8 bits, .* in float32: nothing is written"):
        add_int8(graphs, [tiles], progress=said.append)
    counts = [line.rpartition(", ")[2] for line in said if line.startswith("stain_cd3: ")]
    assert counts == [f"{number} layers in float" for number in range(len(counts))]
    assert len(counts) > 1, "no layer went back to float before it gave up on the features"
    assert not GraphSet.load(graphs).int8


@pytest.mark.parametrize(
    ("exact", "ours", "threshold", "ending"),
    [
        (100, 90, 0.3, "Dice 1.0000 (float32: 1.0000), 10.00 grey levels in the mean, 0 layers in float"),
        (100, 70, 0.3, None),
        (150, 130, 0.55, None),
        (60, 50, 0.3, "0 layers in float; nothing is positive there: not judged"),
    ],
)
def test_cells_are_judged_at_the_threshold_that_they_are_served_at(
    graphs: Path, monkeypatch: pytest.MonkeyPatch, exact: int, ours: int, threshold: float, ending: str | None
) -> None:
    """Maps of one grey level; 0.3 is 77 of 255, and 0.55 is 141."""
    described = dataclasses.replace(GraphSet.load(graphs), thresholds={"cd3": threshold})
    tensor = described.engines["cells_cd3"].outputs[0].name
    model = onnx.ModelProto()

    @contextlib.contextmanager
    def trial(
        floats: Any, chosen: Mapping[str, Any], described: GraphSet, folder: Path
    ) -> Iterator[Callable[[Any], dict[str, Any]]]:
        level = ours if chosen else exact
        yield lambda he: {tensor: np.full((1, 8, 8, 1), level, np.uint8)}

    monkeypatch.setattr(int8, "_trial", trial)
    models = {"he_encoder": model, "cells_cd3": model}
    field = int8._Field(he=np.zeros((8, 8, 3), np.uint8), positive={})
    said: list[str] = []
    with pytest.raises(ParityError, match="cells_cd3: Dice 0") if ending is None else contextlib.nullcontext():
        int8._settle(models, models, described, [field], graphs, said.append)
    assert ending is None or said[-1].endswith(ending)


def test_a_layer_back_in_float_reads_what_it_read_before(graphs: Path) -> None:
    original = onnx.load(graphs / "stain_cd3.onnx")
    layers = [node.name for node in original.graph.node if "conv0" in "".join(node.input)]
    quantised = Quantiser(127).quantize(original, [], 0, "mixed", set())
    assert set(layers) <= set(int8._quantised_layers(quantised))
    mended = int8._left_float(quantised, original, int8._quantised_layers(quantised))
    assert [node.op_type for node in mended.graph.node] == [node.op_type for node in original.graph.node]
    assert sorted(t.name for t in mended.graph.initializer) == sorted(t.name for t in original.graph.initializer)


def test_the_shipped_copies_are_as_good_as_float32() -> None:
    shipped = GraphSet.load(shipped_models()["demo"])
    assert set(shipped.int8) == {name for name in shipped.engines if not name.startswith("quality")}
    for name, copy in shipped.int8.items():
        if name.startswith("stain_"):
            assert copy.dab_dice is not None
            assert copy.dab_dice_fp32 is not None
            assert copy.dab_dice >= copy.dab_dice_fp32 - int8.MOST_LOST
