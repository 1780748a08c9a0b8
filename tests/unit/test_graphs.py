"""Exported graphs: what is in them, what is not, and that ONNX Runtime computes what torch computed."""

import collections
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image

from staindiffuser.errors import UsageError
from staindiffuser.export.description import GraphSet
from staindiffuser.export.errors import ExportUsageError, GraphsError, ManifestError
from staindiffuser.export.graphs import PRECISIONS, export_graphs, gate_of, write_engines
from staindiffuser.training.checkpoint import Checkpoint
from staindiffuser.training.gate import GateRow, gate_record, judge
from staindiffuser.triton_models.noise.philox import tile_noise


@pytest.fixture(scope="module")
def graphs(tiny_graphs: Path) -> GraphSet:
    return GraphSet.load(tiny_graphs)


@pytest.fixture(scope="module")
def one_step(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``graphs`` of one step, of a ``checkpoint`` whose CD3 failed its gate; ``sample.png`` is among the samples."""
    folder = tmp_path_factory.mktemp("one-step")
    shutil.copytree(tiny_checkpoint, folder / "checkpoint")
    gate = {"failures": {"1": ["cd3 Dice 0.000, best 0.500"]}, "rows": [{"stains": {"cd3": {}}}]}
    (folder / "checkpoint" / "metrics.json").write_text(json.dumps({"gate": gate}), encoding="utf-8")
    pixels = np.random.default_rng(0).integers(0, 256, (150, 101, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "sample.png")
    export_graphs(folder / "checkpoint", folder / "graphs", steps=1, tile=64, samples=[folder / "sample.png"])
    return folder


def test_onnx_agrees_with_torch_on_the_golden_samples(tiny_graphs: Path, graphs: GraphSet) -> None:
    golden = np.load(tiny_graphs / graphs.golden)

    def run(name: str, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        return onnxruntime.InferenceSession(tiny_graphs / f"{name}.onnx").run(None, inputs)

    features = {f"FEATURES_{i}": f for i, f in enumerate(run("he_encoder", {"HE": golden["HE"]}))}
    noise, cell_noise = tile_noise(
        golden["SEED"], golden["ORIGIN"], steps=graphs.steps, height=graphs.tile, width=graphs.tile
    )
    for name in graphs.engines:
        if name == "he_encoder":
            continue
        inputs = {"NOISE": noise} if name.startswith("stain") else {"NOISE_CELLS": cell_noise}
        difference = np.abs(run(name, features | inputs)[0].astype(int) - golden[name.upper()])
        assert difference.max() <= 2, name
        assert (difference <= 1).mean() >= 0.999, name
        assert golden[name.upper()].std() > 5, name  # the samples show something


def test_a_step_from_the_noises_mean_reads_no_noise(tiny_checkpoint: Path, one_step: Path, tmp_path: Path) -> None:
    graphs = export_graphs(tiny_checkpoint, tmp_path / "graphs", steps=1, tile=64, noise=False)
    read = {spec.name for engine in graphs.engines.values() for spec in engine.inputs}
    assert read == {"HE", "FEATURES_0", "FEATURES_1", "FEATURES_2", "FEATURES_3"}
    golden = np.load(tmp_path / "graphs" / graphs.golden)
    sampled = GraphSet.load(one_step / "graphs")
    for folder in (tmp_path / "graphs", one_step / "graphs"):

        def run(name: str, inputs: dict[str, np.ndarray], folder: Path = folder) -> list[np.ndarray]:
            return onnxruntime.InferenceSession(folder / f"{name}.onnx").run(None, inputs)

        features = {f"FEATURES_{i}": f for i, f in enumerate(run("he_encoder", {"HE": golden["HE"]}))}
        for name in ("stain_cd3", "cells_cd3"):
            inputs = dict(features)
            for spec in (
                GraphSet.load(folder).engines[name].inputs[4:]
            ):  # a graph that reads noise gives the same for zeros
                inputs[spec.name] = np.zeros((len(golden["HE"]), *spec.shape), np.float16)
            difference = np.abs(run(name, inputs)[0].astype(int) - golden[name.upper()])
            assert difference.max() <= 2, name
            assert (difference <= 1).mean() >= 0.999, name
    assert graphs.model_version != sampled.model_version
    with pytest.raises(ExportUsageError, match="--no-noise: a sampler of 2 steps reads noise"):
        export_graphs(tiny_checkpoint, tmp_path / "two", steps=2, tile=64, noise=False)


def test_nothing_of_the_noise_level_is_left_to_compute(tiny_graphs: Path) -> None:
    """Folding leaves convolutions, sums and x·sigmoid(s·x): two operators per SiLU and no embedding."""
    counts = {
        name: collections.Counter(node.op_type for node in onnx.load(tiny_graphs / f"{name}.onnx").graph.node)
        for name in ("he_encoder", "stain_cd3", "cells_cd3")
    }
    for name, count in counts.items():
        assert not set(count) & {"Cos", "Sin", "Log", "Exp", "Sqrt", "MatMul", "Gemm", "ReduceMean", "ReduceL2"}, name
    # A UNet of one block a level: stem, 7 blocks of two, 3 down, 3 up, head; attention once: 4 x (mix, gate, inject).
    unet, attention = 1 + 14 + 3 + 3 + 1, 12
    assert counts["cells_cd3"]["Conv"] == unet + attention
    assert counts["stain_cd3"]["Conv"] == 2 * unet + attention
    assert counts["stain_cd3"]["Resize"] == 2 * 3


def test_unrolling_shares_the_weights(one_step: Path, tiny_graphs: Path) -> None:
    one, two = GraphSet.load(one_step / "graphs"), GraphSet.load(tiny_graphs)
    weights = [
        sum(len(t.raw_data) for t in onnx.load(folder / "stain_cd3.onnx").graph.initializer)
        for folder in (one_step / "graphs", tiny_graphs)
    ]
    assert weights[1] / weights[0] < 1.05
    assert one.engines["stain_cd3"].weights_sha256 == two.engines["stain_cd3"].weights_sha256
    assert one.model_version != two.model_version


def test_graphs_carry_no_path_of_the_machine(tiny_graphs: Path) -> None:
    for path in tiny_graphs.iterdir():
        if path.suffix in (".onnx", ".json"):
            assert b"site-packages" not in path.read_bytes(), path.name
            assert str(tiny_graphs.parent).encode() not in path.read_bytes(), path.name


def test_description_names_every_tensor(graphs: GraphSet) -> None:
    assert list(graphs.engines) == ["he_encoder", "stain_cd3", "cells_cd3", "stain_ck818", "cells_ck818"]
    features = graphs.engines["he_encoder"].outputs
    assert [t.shape[1] for t in features] == [32, 16, 8, 4]
    assert all(t.dtype == "float16" for t in features)
    branch = graphs.engines["stain_cd3"]
    assert branch.inputs[:4] == features
    assert (branch.inputs[4].name, branch.inputs[4].shape) == ("NOISE", (2, 3, 64, 64))
    assert (branch.outputs[0].name, branch.outputs[0].dtype, branch.outputs[0].shape) == (
        "STAIN_CD3",
        "uint8",
        (64, 64, 3),
    )


def test_changed_file_is_refused_by_name(tiny_graphs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "graphs"
    shutil.copytree(tiny_graphs, folder)
    data = bytearray((folder / "cells_cd3.onnx").read_bytes())
    data[-20] ^= 1
    (folder / "cells_cd3.onnx").write_bytes(data)
    with pytest.raises(ManifestError, match=r"cells_cd3\.onnx differs"):
        GraphSet.load(folder)
    (folder / "cells_cd3.onnx").unlink()
    with pytest.raises(ManifestError, match=r"cells_cd3\.onnx is missing"):
        GraphSet.load(folder)


def test_malformed_description_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GraphsError, match="is missing: write it with"):
        GraphSet.load(tmp_path)
    (tmp_path / "graphs.json").write_text(json.dumps({"format": 7}))
    with pytest.raises(GraphsError, match="format: this version reads format 1 only"):
        GraphSet.load(tmp_path)


def test_the_gate_is_asked_about_the_steps_that_are_exported() -> None:
    dice = {"dab_dice": 0.5, "radial_power": 1.0}
    rows = [
        GateRow(role="student", steps=1, sigmas=(80.0,), stains={"cd3": dice, "ck": dice | {"radial_power": 0.34}}),
        GateRow(role="student", steps=2, sigmas=(80.0, 1.0), stains={"cd3": dice, "ck": dice}),
    ]
    metrics = {"gate": gate_record(rows, judge(rows))}
    assert gate_of(metrics, 1) == {"cd3": (), "ck": ("radial power 0.34",)}
    assert gate_of(metrics, 2) == {"cd3": (), "ck": ()}
    assert gate_of(metrics, 4) == gate_of({}, 1) == gate_of({"gate": None}, 1) == {}


def test_graphs_say_that_the_gate_failed(one_step: Path) -> None:
    graphs = GraphSet.load(one_step / "graphs")
    assert graphs.gate == {"cd3": ("Dice 0.000, best 0.500",)}
    assert "did not pass its gate" in graphs.notice, "the notice goes with every output"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 3}, "--steps 3: the checkpoint has samplers of 1, 2, 4 steps"),
        ({"tile": 100}, "--tile 100: must be a multiple of 16"),
        ({"precision": "int4"}, "--precision int4: choose one of"),
    ],
)
def test_impossible_options_are_refused(tiny_checkpoint: Path, tmp_path: Path, options, message: str) -> None:
    with pytest.raises(ExportUsageError, match=message):
        export_graphs(tiny_checkpoint, tmp_path / "graphs", **options)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_is_not_replaced(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("keep")
    with pytest.raises(UsageError, match="is not empty and holds no graphs"):
        export_graphs(tiny_checkpoint, tmp_path)
    assert (tmp_path / "precious.txt").read_text() == "keep"


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_trunk_runs_in_the_asked_precision_and_the_preconditioning_in_float32(
    tiny_checkpoint: Path, tmp_path: Path, precision: str
) -> None:
    network = Checkpoint.load(tiny_checkpoint).network
    write_engines(network, tmp_path, sigmas=(80.0, 1.0), tile=64, trunk=PRECISIONS[precision], only="stain_cd3")
    graph = onnx.load(tmp_path / "stain_cd3.onnx")
    inferred = onnx.shape_inference.infer_shapes(graph, strict_mode=True).graph
    types = {v.name: v.type.tensor_type.elem_type for v in [*inferred.value_info, *inferred.input]}
    types |= {t.name: t.data_type for t in inferred.initializer}
    trunk = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[precision]
    nodes = [node for node in inferred.node if node.op_type == "Conv"]
    assert {types[node.input[0]] for node in nodes} == {trunk}
    clip = next(node for node in inferred.node if node.op_type == "Clip")
    assert types[clip.input[0]] == onnx.TensorProto.FLOAT


def test_samples_of_the_user_are_golden_samples_too(one_step: Path) -> None:
    he = np.load(one_step / "graphs" / GraphSet.load(one_step / "graphs").golden)["HE"]
    whole = np.asarray(Image.open(one_step / "sample.png"))
    top, left = (whole.shape[0] - 64) // 2, (whole.shape[1] - 64) // 2
    np.testing.assert_array_equal(he[-1], whole[top : top + 64, left : left + 64])


def test_sample_smaller_than_the_tile_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    image = tmp_path / "small.png"
    Image.new("RGB", (100, 40)).save(image)
    with pytest.raises(ExportUsageError, match=r"small\.png: 100 × 40 is smaller than a tile \(64 × 64\)"):
        export_graphs(tiny_checkpoint, tmp_path / "graphs", steps=1, tile=64, samples=[image])
    assert not (tmp_path / "graphs").exists()
