"""`bench quality`: what is spoiled is told apart, held-out fields are not, and the curves say what is gained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from staindiffuser.benchmarks.artefacts import ARTEFACTS
from staindiffuser.benchmarks.cli import app
from staindiffuser.benchmarks.quality import EXACT, KEPT, auroc, bench_quality
from staindiffuser.errors import UsageError
from staindiffuser.export.quality import add_quality
from staindiffuser.training.tiles.paired_tiles import Split
from staindiffuser.training.tiles.writing import PairedTilesWriter
from tests.reference_tissue import tissue, write_reference
from tests.synthetic_graphs import write_graphs

TILE = 64


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    write_graphs(folder / "graphs", tile=TILE)
    add_quality(folder / "graphs", [write_reference(folder / "reference", size=TILE)])
    return folder / "graphs"


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("held-out")
    rng = np.random.default_rng(8)
    brown = np.full((TILE, TILE, 3), (130, 80, 45), np.uint8)
    with PairedTilesWriter(folder, ["cd3"], masks=False) as writer:
        for i in range(16):
            split: Split = "test" if i < 12 else "train"
            writer.add(f"t{i}", he=tissue(rng, TILE), stains={"cd3": brown}, slide=f"s{i // 4}", split=split, mpp=0.5)
    return folder


def test_kinds_are_scored_against_held_out_fields(graphs: Path, held_out: Path, tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 200, (2 * TILE, 2 * TILE, 3), dtype=np.uint8)).save(
        tmp_path / "noise.png"
    )
    report = bench_quality(graphs, [held_out], [f"noise={tmp_path / 'noise.png'}@0.5"])
    assert (report.fields, report.slides) == (12, 3)
    assert report.counts == {**dict.fromkeys(ARTEFACTS, 12), "virtual IHC": 12, "noise": 4}
    for kind in ("broken colours", "grey", "noise", "blur"):
        assert report.auroc[kind] > 0.95, kind
    assert report.flagged["noise"] == 1
    assert report.flagged_anyway < 0.3
    assert report.auroc["other scanner"] <= report.auroc["broken colours"]
    assert set(report.dice) == {"cd3"}  # the only stain with true images
    for curve in report.dice["cd3"].values():
        assert list(curve) == [f"{share:g}" for share in KEPT]
        assert all(0 <= value <= 1 for value in curve.values())
    assert any("held-out fields of 3 slides" in line for line in report.lines())


def test_the_command_writes_what_it_measured(graphs: Path, held_out: Path, tmp_path: Path) -> None:
    arguments = ["quality", str(graphs), "--tiles", str(held_out), "--most", "4", "--json", str(tmp_path / "q.json")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "q.json").read_text(encoding="utf-8"))
    assert report["fields"] == 4
    assert "AUROC" in result.output


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_engines_that_are_served_are_scored_as_one_graph(graphs: Path, held_out: Path, precision: str) -> None:
    pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install 'staindiffuser[openvino]'")
    from staindiffuser.triton_models.engine import engine_openvino

    if not engine_openvino.computes(precision):
        pytest.skip(f"this processor does not compute in {precision}")
    exact, served = (
        bench_quality(graphs, [held_out], engine=engine, most=4) for engine in (EXACT, f"openvino {precision}")
    )
    assert (exact.engine, served.engine) == (EXACT, f"openvino {precision}")
    assert served.counts == exact.counts
    for kind, value in exact.unlike_auroc.items():
        assert served.unlike_auroc[kind] == pytest.approx(value, abs=0.15), kind
    assert f"on openvino {precision}" in next(iter(served.lines()))


def test_what_cannot_be_measured_is_refused(graphs: Path, held_out: Path, tmp_path: Path) -> None:
    write_graphs(tmp_path / "plain", tile=TILE)
    with pytest.raises(UsageError, match="has no engines that judge tiles: add them with"):
        bench_quality(tmp_path / "plain", [held_out])
    with pytest.raises(UsageError, match="--engine openvino int8: there is onnxruntime fp32"):
        bench_quality(graphs, [held_out], engine="openvino int8")  # these graphs have no copies in 8 bits
    with pytest.raises(UsageError, match="must be NAME=SLIDE"):
        bench_quality(graphs, [held_out], ["skin"])
    reference = write_reference(tmp_path / "reference", size=TILE, slides=1, tiles_per_slide=4)
    with pytest.raises(UsageError, match="fewer than two fields"):
        bench_quality(graphs, [reference])


def test_auroc_is_the_share_of_pairs_in_order() -> None:
    assert auroc([1, 2], [3, 4]) == 1
    assert auroc([1, 3], [3, 4]) == pytest.approx(3.5 / 4)
    assert np.isnan(auroc([], [1]))


@pytest.mark.parametrize("kind", ARTEFACTS)
def test_an_artefact_changes_a_tile_and_nothing_of_its_form(kind: str) -> None:
    he = tissue(np.random.default_rng(2), TILE)
    before = he.copy()
    spoiled = ARTEFACTS[kind](he, np.random.default_rng(3))
    assert spoiled.shape == he.shape
    assert spoiled.dtype == np.uint8
    assert (he == before).all()
    assert np.abs(spoiled.astype(int) - he).mean() > 1
    assert (ARTEFACTS[kind](he, np.random.default_rng(3)) == spoiled).all()
