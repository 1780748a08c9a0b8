"""Target ``openvino``, the gate of reduced precisions, and target ``auto``, which measures before it chooses."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from staindiffuser.export import builders, choosing
from staindiffuser.export.builders import BuildOptions
from staindiffuser.export.choosing import fastest
from staindiffuser.export.description import GraphSet
from staindiffuser.export.errors import BuilderMissingError, BuildError, ExportUsageError, ParityError
from staindiffuser.export.loading import load_engines
from staindiffuser.export.manifest import Manifest, verify
from staindiffuser.export.parity import LIMITS, Golden, check_parity, run_pipeline
from staindiffuser.export.repository import BuildReport, build
from staindiffuser.triton_models.engine.engine_onnxruntime import OnnxRuntimeEngine
from staindiffuser.triton_models.noise.philox import tile_noise
from tests.synthetic_graphs import write_graphs

openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install 'staindiffuser[openvino]'")
from staindiffuser.triton_models.engine import engine_openvino  # noqa: E402

needs_bfloat16 = pytest.mark.skipif(
    not engine_openvino.computes("bf16"), reason="this processor has no bfloat16 instructions (AVX-512 BF16, AMX)"
)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    write_graphs(folder, tile=64)
    return folder


def stain(repository: Path, batch: int) -> dict[str, np.ndarray[Any, Any]]:
    """The outputs of a repository's engines on fixed tiles, each loaded anew."""
    manifest = Manifest.load(repository)
    builder = builders.get(manifest.target)
    engines = {name: builder.load(repository / e.file, threads=2) for name, e in manifest.engines.items()}
    generator = np.random.default_rng(3)
    inputs: dict[str, np.ndarray[Any, Any]] = {
        "HE": generator.integers(0, 256, (batch, manifest.tile, manifest.tile, 3), dtype=np.uint8),
        "ORIGIN": np.zeros((batch, 2), np.int64),
        "SEED": np.arange(batch, dtype=np.int64)[:, None],
    }
    return run_pipeline(engines, manifest.engines, steps=manifest.steps, tile=manifest.tile, inputs=inputs)[1]


def test_float32_passes_the_gate_of_float32_and_serves_the_same_model(graphs: Path, tmp_path: Path) -> None:
    report = build(graphs, tmp_path / "repository", target="openvino", options=BuildOptions(max_batch=3))
    assert report.manifest.precision == "fp32"
    assert report.manifest.model_version == GraphSet.load(graphs).model_version
    assert all(entry.max_levels <= 2 for e in report.manifest.engines.values() for entry in e.parity)
    assert report.manifest.engines["he_encoder"].builder.startswith("openvino ")
    first, again = stain(report.repository, 3), stain(report.repository, 3)
    assert all(np.array_equal(first[name], again[name]) for name in first)


@needs_bfloat16
def test_bfloat16_is_another_model_and_gives_the_same_bytes_each_time(graphs: Path, tmp_path: Path) -> None:
    options = BuildOptions(max_batch=3, precision="bf16")
    manifest = build(graphs, tmp_path / "repository", target="openvino", options=options).manifest
    assert manifest.precision == "bf16"
    assert manifest.model_version != GraphSet.load(graphs).model_version
    assert manifest.engines["stain_cd3"].settings == {"precision": "bf16"}
    dice = [entry.dab_dice for entry in manifest.engines["stain_cd3"].parity]
    assert all(value is not None and 0.995 <= value <= 1 for value in dice)
    assert manifest.engines["cells_cd3"].parity[0].dab_dice is None
    first, again = stain(tmp_path / "repository", 3), stain(tmp_path / "repository", 3)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    build(graphs, tmp_path / "float32", target="openvino")
    exact = stain(tmp_path / "float32", 3)
    assert any(not np.array_equal(first[name], exact[name]) for name in first), "bfloat16 was not computed in bfloat16"
    again_built = build(graphs, tmp_path / "repository", target="openvino", options=options)
    assert again_built.up_to_date


def test_without_the_instructions_bfloat16_is_refused(
    graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_openvino, "computes", lambda precision: precision == "fp32")
    options = BuildOptions(max_batch=1, precision="bf16")
    with pytest.raises(BuilderMissingError, match=r"no instructions for bf16 .* choose --precision fp32") as error:
        build(graphs, tmp_path / "repository", target="openvino", options=options)
    assert error.value.exit_code == 6
    assert list(tmp_path.iterdir()) == []


@needs_bfloat16
def test_a_repository_that_moved_to_a_lesser_processor_is_refused(
    graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = BuildOptions(max_batch=1, precision="bf16")
    manifest = build(graphs, tmp_path / "repository", target="openvino", options=options).manifest
    monkeypatch.setattr(engine_openvino, "computes", lambda precision: precision == "fp32")
    with pytest.raises(BuilderMissingError, match="no instructions for bf16"):
        verify(tmp_path / "repository")
    with pytest.raises(RuntimeError, match="computes in bf16, which this processor cannot"):
        engine_openvino.load(tmp_path / "repository" / manifest.engines["he_encoder"].file)
    rebuilt = build(graphs, tmp_path / "repository", options=BuildOptions(max_batch=1))
    assert rebuilt.manifest.target == "onnxruntime"


def test_a_graph_that_openvino_lacks_is_one_line(graphs: Path, tmp_path: Path) -> None:
    description = GraphSet.load(graphs).engines["cells_cd3"]
    model = onnx.load(graphs / description.file)
    next(node for node in model.graph.node if node.op_type == "Round").op_type = "Bernoulli"
    onnx.save(model, tmp_path / "graph.onnx")
    with pytest.raises(BuildError, match=r"OpenVINO cannot run .*Bernoulli") as error:
        builders.get("openvino").build(tmp_path / "graph.onnx", description, tmp_path / "engine.onnx", BuildOptions())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("target", "words"), [("openvino", "has fp32, bf16, int8"), ("onnxruntime", "does not use")])
def test_other_precisions_are_refused(graphs: Path, tmp_path: Path, target: str, words: str) -> None:
    with pytest.raises(ExportUsageError, match=words):
        build(graphs, tmp_path / "repository", target=target, options=BuildOptions(precision="int4"))


def test_openvino_tells_nobody_that_it_was_imported(graphs: Path, tmp_path: Path) -> None:
    """Its ``import`` sends an event to its maker unless the package that reports is absent."""
    program = (
        "import socket, sys\n"
        "def refuse(*arguments, **options): raise SystemExit('a socket was opened')\n"
        "socket.socket = socket.create_connection = refuse\n"
        "from staindiffuser.triton_models.engine import engine_openvino\n"
        "assert engine_openvino.computes('fp32')\n"
        "print(sys.modules['openvino_telemetry'], 'http.client' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[0] == "None"


def test_joined_engines_compute_what_a_request_needs_and_the_same_bytes_whatever_it_asks(
    graphs: Path, tmp_path: Path
) -> None:
    """Features are not rounded to half precision on their way, so a grey level may differ from the engines apart."""
    manifest = build(graphs, tmp_path / "repository", target="openvino", flavour="single").manifest
    files = {name: tmp_path / "repository" / e.file for name, e in manifest.engines.items()}
    whole = load_engines(builders.get("openvino"), files, threads=1, flavour="single")
    assert len(set(whole.values())) == 1
    apart = load_engines(builders.get("openvino"), files, threads=1)
    golden = Golden.load(graphs / "golden.npz")
    sizes: dict[str, Any] = {"steps": manifest.steps, "tile": manifest.tile, "inputs": golden.inputs}
    features, outputs = run_pipeline(whole, manifest.engines, **sizes)
    assert list(features) == [f"FEATURES_{level}" for level in range(4)]
    expected = run_pipeline(apart, manifest.engines, **sizes)[1]
    assert sorted(outputs) == sorted(expected)
    for name, array in expected.items():
        difference = np.abs(outputs[name].astype(int) - array)
        assert difference.max() <= 1, name
        assert (difference > 0).mean() < 0.05, name
    image, cells = tile_noise(
        golden.inputs["SEED"], golden.inputs["ORIGIN"], steps=manifest.steps, height=manifest.tile, width=manifest.tile
    )
    he, joined = golden.inputs["HE"], whole["he_encoder"]
    for asked, inputs in (
        (["STAIN_CD3"], {"HE": he, "NOISE": image}),
        (["CELLS_CK818", "CELLS_CD3"], {"HE": he, "NOISE_CELLS": cells}),  # has no image's noise to compute one from
        (["CELLS_CK818", "STAIN_CK818"], {"HE": he, "NOISE": image, "NOISE_CELLS": cells}),
        (["FEATURES_3"], {"HE": he}),
        (["STAIN_CD3", "STAIN_CK818"], {"HE": he, "NOISE": image}),
    ):
        found = joined.run(inputs, asked)
        assert list(found) == asked
        for name in asked:
            np.testing.assert_array_equal(found[name], {**features, **outputs}[name])


def test_engines_of_two_precisions_are_not_joined(
    graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_openvino, "computes", lambda precision: True)
    description = GraphSet.load(graphs).engines["he_encoder"]
    files = []
    for precision in ("fp32", "bf16"):
        files.append(tmp_path / f"{precision}.onnx")
        model = onnx.load(graphs / description.file)
        model.metadata_props.add(key=engine_openvino.PRECISION, value=precision)
        onnx.save(model, files[-1])
    with pytest.raises(RuntimeError, match="engines of bf16 and fp32 cannot be one graph"):
        engine_openvino.load_joined(files)


def test_signals_reach_python_after_an_engine_is_gone(graphs: Path, tmp_path: Path) -> None:
    program = (
        "import gc, signal, sys\n"
        "from pathlib import Path\n"
        "from staindiffuser.export.builders import BuildOptions\n"
        "from staindiffuser.export.repository import build\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('heard'))\n"
        "build(Path(sys.argv[1]), Path(sys.argv[2]), target='openvino', options=BuildOptions(threads=1))\n"
        "gc.collect()\n"
        "signal.raise_signal(signal.SIGTERM)\n"
    )
    command = [sys.executable, "-X", "faulthandler", "-c", program, str(graphs), str(tmp_path / "repository")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stdout.split()[-1:]) == (0, ["heard"]), result.stderr


class Browner:
    """An engine that adds a little brown everywhere."""

    def __init__(self, engine: OnnxRuntimeEngine) -> None:
        self.engine = engine

    def run(self, inputs: dict[str, Any], outputs: list[str]) -> dict[str, Any]:
        images = self.engine.run(inputs, outputs)
        return {name: np.maximum(image, 24) - np.array([0, 12, 24], np.uint8) for name, image in images.items()}

    def close(self) -> None:
        pass


def test_a_stain_that_turns_positive_is_refused(graphs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    description = dataclasses.replace(GraphSet.load(graphs), precision="bf16")
    golden = Golden.load(graphs / description.golden)
    engines: dict[str, Any] = {
        name: OnnxRuntimeEngine(graphs / engine.file, threads=1) for name, engine in description.engines.items()
    }
    passed = check_parity(engines, description, golden, (1,))
    assert passed["stain_cd3"][0].dab_dice == pytest.approx(1, abs=0.001)
    monkeypatch.setitem(LIMITS, "bf16", dataclasses.replace(LIMITS["bf16"], levels=24, over_one=1.0))
    with pytest.raises(ParityError, match=r"stain_cd3: the DAB-positive area has a Dice of 0\.\d+ .*allowed: 0\.995"):
        check_parity({**engines, "stain_cd3": Browner(engines["stain_cd3"])}, description, golden, (1,))


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ({"onnxruntime fp32": 300.0, "openvino fp32": 290.0, "openvino bf16": 280.0}, "openvino bf16"),
        ({"onnxruntime fp32": 300.0, "openvino fp32": 290.0, "openvino bf16": 288.0}, "onnxruntime fp32"),
        ({"onnxruntime fp32": 300.0, "openvino fp32": 200.0, "openvino bf16": 195.0}, "openvino fp32"),
        ({"openvino fp32": 200.0, "openvino bf16": 100.0}, "openvino bf16"),
        ({"onnxruntime fp32": 300.0}, "onnxruntime fp32"),
    ],
)
def test_a_less_conservative_engine_must_be_worth_it(times: Mapping[str, float], chosen: str) -> None:
    order = dict(reversed(list(times.items())))
    assert fastest(order) == chosen


def build_fastest(graphs: Path, output: Path) -> tuple[BuildReport, list[str]]:
    said: list[str] = []
    options = BuildOptions(max_batch=2, threads=1)
    return build(graphs, output, target="auto", options=options, progress=said.append), said


def test_auto_measures_once_and_keeps_its_choice(graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report, said = build_fastest(graphs, tmp_path / "repository")
    choice = report.manifest.choice
    assert choice is not None
    assert "onnxruntime fp32" in choice.ms_per_tile
    assert "openvino fp32" in choice.ms_per_tile
    assert all(milliseconds > 0 for milliseconds in choice.ms_per_tile.values())
    name = fastest(choice.ms_per_tile)
    assert [report.manifest.target, report.manifest.precision] == name.split()
    assert f"chosen for {choice.processor}: {name}" in said
    assert json.loads((tmp_path / "repository/manifest.json").read_text(encoding="utf-8"))["choice"]["batch"] == 2
    assert verify(tmp_path / "repository").choice == choice

    again, said = build_fastest(graphs, tmp_path / "repository")
    assert again.up_to_date
    assert not any("ms a tile" in line for line in said), "it measured again"

    monkeypatch.setattr(choosing, "available_cpus", lambda: 77)  # as if the repository had moved to another machine
    moved, said = build_fastest(graphs, tmp_path / "repository")
    assert moved.manifest.choice is not None
    assert moved.manifest.choice.key != choice.key
    assert any("ms a tile" in line for line in said)


def test_auto_takes_the_next_best_where_the_fastest_does_not_pass(
    graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = choosing.measure(graphs, BuildOptions(max_batch=2, threads=1), "single", lambda line: None)
    times = dict.fromkeys(measured.ms_per_tile, 100.0) | {"openvino fp32": 10.0}
    monkeypatch.setattr(
        "staindiffuser.export.repository.measure",
        lambda *arguments: dataclasses.replace(measured, ms_per_tile=times),
    )
    report, _ = build_fastest(graphs, tmp_path / "one")
    assert report.manifest.target == "openvino"

    def build_off_by_far(self: Any, graph: Path, description: Any, output: Path, options: BuildOptions) -> None:
        model = onnx.load(graph)
        model.metadata_props.add(key=engine_openvino.PRECISION, value="fp32")
        for weight in model.graph.initializer:
            values = onnx.numpy_helper.to_array(weight)
            if values.ndim == 4:
                weight.CopyFrom(onnx.numpy_helper.from_array(values * np.float32(0.5), weight.name))
        onnx.save(model, output)

    monkeypatch.setattr(type(builders.get("openvino")), "build", build_off_by_far)
    report, said = build_fastest(graphs, tmp_path / "two")
    assert report.manifest.target == "onnxruntime"
    assert any("openvino fp32 does not pass: " in line for line in said)


def test_two_first_starts_at_once_measure_once(graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the second one replaces the repository that the first one serves, perhaps by other engines."""
    measured = choosing.measure(graphs, BuildOptions(max_batch=2, threads=1), "single", lambda line: None)
    calls: list[float] = []

    def measure(*arguments: Any) -> choosing.Choice:
        calls.append(time.monotonic())
        time.sleep(0.5)  # long enough for the other to come
        return dataclasses.replace(measured, ms_per_tile=dict.fromkeys(measured.ms_per_tile, 100.0 * len(calls)))

    monkeypatch.setattr("staindiffuser.export.repository.measure", measure)
    with ThreadPoolExecutor(2) as pool:
        reports = [report for report, _ in pool.map(lambda _: build_fastest(graphs, tmp_path / "repository"), range(2))]
    assert len(calls) == 1
    assert sorted(report.up_to_date for report in reports) == [False, True]
    assert reports[0].manifest == reports[1].manifest


def test_auto_says_what_is_absent(graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: Any) -> str:
        raise BuilderMissingError("target openvino: OpenVINO is not installed; targets that work here: onnxruntime")

    monkeypatch.setattr(type(builders.get("openvino")), "version", missing)
    report, said = build_fastest(graphs, tmp_path / "repository")
    assert report.manifest.target == "onnxruntime"
    assert report.manifest.choice is not None
    assert report.manifest.choice.absent == dict.fromkeys(
        ("openvino fp32", "openvino bf16", "openvino int8"), "OpenVINO is not installed"
    )
    assert "openvino bf16: not here: OpenVINO is not installed" in said
    with pytest.raises(ExportUsageError, match="target auto chooses the precision"):
        build(graphs, tmp_path / "repository", target="auto", options=BuildOptions(precision="bf16"))
