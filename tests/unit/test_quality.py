"""The engines that judge tiles: what they measure, where the statistics come from, and that every target agrees."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from scipy import ndimage

from staindiffuser.errors import StainDiffuserError
from staindiffuser.export.builders import BuildOptions
from staindiffuser.export.description import EightBits, GraphSet
from staindiffuser.export.errors import ExportUsageError, GraphsError, ParityError
from staindiffuser.export.manifest import verify
from staindiffuser.export.parity import Golden, check_parity
from staindiffuser.export.quality import add_quality, fields, statistics
from staindiffuser.export.quality_graph import STAIN_MEASURES, TILE_MEASURES, stain_graph
from staindiffuser.export.repository import build
from staindiffuser.files import file_sha256
from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.optical_density import dab_mask
from staindiffuser.training.tiles.paired_tiles import PairedTiles
from staindiffuser.triton_models.engine.engine_onnxruntime import OnnxRuntimeEngine
from staindiffuser.triton_models.engine.engine_torch import TorchEngine
from tests.reference_tissue import tissue, write_reference
from tests.synthetic_graphs import write_graphs

TILE = 64


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiles of half the model's size, so that four make a field: 12 slides of 16."""
    return write_reference(tmp_path_factory.mktemp("reference"), size=TILE // 2)


@pytest.fixture(scope="module")
def graphs(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judged") / "graphs"
    write_graphs(folder, tile=TILE)
    add_quality(folder, [reference])
    return folder


def judge(folder: Path, he: UInt8Array, kind: type[OnnxRuntimeEngine] | type[TorchEngine]) -> dict[str, np.ndarray]:
    """``QUALITY`` of tiles [B, T, T, 3], by measure."""
    description = GraphSet.load(folder)
    encoder = OnnxRuntimeEngine(folder / "he_encoder.onnx", threads=1)
    inputs = {"HE": he} | encoder.run({"HE": he}, [spec.name for spec in description.engines["he_encoder"].outputs])
    values = kind(folder / "quality.onnx", threads=1).run(inputs, ["QUALITY"])["QUALITY"]
    assert values.shape == (len(he), len(TILE_MEASURES))
    assert values.dtype == np.float32
    return dict(zip(TILE_MEASURES, values.T, strict=True))


def test_no_pixel_changes_and_the_repository_is_verified(graphs: Path, tmp_path: Path) -> None:
    plain = write_graphs(tmp_path / "plain", tile=TILE)
    judged = GraphSet.load(graphs)
    assert judged.model_version == plain.model_version
    assert set(judged.engines) - set(plain.engines) == {"quality", "quality_cd3", "quality_ck818"}
    golden, before = Golden.load(graphs / "golden.npz"), Golden.load(tmp_path / "plain" / "golden.npz")
    for name, array in before.outputs.items():
        np.testing.assert_array_equal(golden.outputs[name], array)
    report = build(graphs, tmp_path / "repository", options=BuildOptions(max_batch=2, threads=1))
    manifest = verify(report.repository)
    assert manifest.quality == judged.quality
    assert manifest.engines["quality_cd3"].sampler == ""
    assert max(entry.max_quality for entry in manifest.engines["quality"].parity) < 0.01


def test_again_gives_the_same(graphs: Path, reference: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(graphs, copy)
    copy_in_8_bits = EightBits(
        file="stain.int8.onnx", graph_sha256=file_sha256(copy / "stain_cd3.onnx"), float_layers=()
    )
    shutil.copyfile(copy / "stain_cd3.onnx", copy / copy_in_8_bits.file)
    dataclasses.replace(GraphSet.load(copy), int8={"stain_cd3": copy_in_8_bits}).save(copy)
    again, first = add_quality(copy, [reference]), GraphSet.load(graphs)
    assert GraphSet.load(copy).int8 == {"stain_cd3": copy_in_8_bits}, "the copies in 8 bits are kept"
    assert again.engines == first.engines
    assert again.quality == first.quality


@pytest.mark.parametrize("kind", [OnnxRuntimeEngine, TorchEngine])
def test_tiles_are_told_apart(graphs: Path, kind: type[OnnxRuntimeEngine] | type[TorchEngine]) -> None:
    quality = GraphSet.load(graphs).quality
    assert quality is not None
    rng = np.random.default_rng(9)
    new = np.stack([tissue(rng, TILE) for _ in range(16)])
    ordinary = judge(graphs, new, kind)
    assert np.median(ordinary["unlike"]) < quality.limits["unlike"]
    assert (ordinary["tissue"] > 0.9).all()
    assert (ordinary["clipped"] == 0).all()
    blurred = judge(graphs, ndimage.gaussian_filter(new, (0, 2.5, 2.5, 0)), kind)
    assert blurred["blur"].min() > ordinary["blur"].max()
    assert np.median(blurred["blur"]) > quality.limits["blur"]
    swapped = judge(graphs, np.ascontiguousarray(new[..., ::-1]), kind)
    assert swapped["unlike"].min() > quality.limits["unlike"]
    overexposed = judge(graphs, np.clip(new * 1.2, 0, 255).astype(np.uint8), kind)
    assert overexposed["clipped"].min() > quality.limits["clipped"]
    assert (ordinary["colour"] == 0).all()
    foreign = {
        "grey": np.repeat(0.5 * new.mean(axis=-1, keepdims=True), 3, axis=-1),
        "brown": 245 * (new / 245) ** 0.4 * np.array([0.75, 0.5, 0.35]),
        "green pen": np.where(np.arange(TILE)[:, None] < 20, new * np.array([0.12, 0.5, 0.25]), new),
    }
    for name, tiles in foreign.items():
        assert judge(graphs, tiles.astype(np.uint8), kind)["colour"].min() > quality.limits["colour"], name
    glass = judge(graphs, np.full((1, TILE, TILE, 3), 243, np.uint8), kind)
    assert glass["tissue"][0] == 0
    assert glass["unlike"][0] == 0  # there is nothing to judge
    half = new.copy()
    half[:, :, TILE // 2 :] = 243
    np.testing.assert_allclose(judge(graphs, half, kind)["tissue"], ordinary["tissue"] / 2, atol=0.03)


def test_a_stain_is_judged_by_its_mask_and_its_cells(tmp_path: Path) -> None:
    """Against the functions of ``imaging``, on an image with brown discs and cell maps that fit it more or less."""
    description = write_graphs(tmp_path / "graphs", tile=TILE)
    he, image, cells = (
        description.engines[name].inputs[0] if name == "he_encoder" else description.engines[name].outputs[0]
        for name in ("he_encoder", "stain_cd3", "cells_cd3")
    )
    onnx.save(stain_graph(he, image, cells, "QUALITY_CD3"), tmp_path / "stain.onnx")
    painted = np.full((1, TILE, TILE, 3), (225, 225, 235), np.uint8)
    yy, xx = np.mgrid[:TILE, :TILE]
    disc = np.hypot(xx - 20, yy - 30) < 9
    painted[0, disc] = (130, 80, 45)
    mask = dab_mask(painted[0])
    assert 0.05 < mask.mean() < 0.1
    pink = np.full((1, TILE, TILE, 3), (225, 165, 200), np.uint8)

    def measure(cell_map: UInt8Array) -> dict[str, float]:
        tensors = {"HE": pink, image.name: painted, cells.name: cell_map[None, ..., None]}
        results = {
            kind: kind(tmp_path / "stain.onnx", threads=1).run(tensors, ["QUALITY_CD3"])["QUALITY_CD3"][0]
            for kind in (OnnxRuntimeEngine, TorchEngine)
        }
        np.testing.assert_allclose(results[OnnxRuntimeEngine], results[TorchEngine], rtol=1e-4, atol=1e-5)
        return dict(zip(STAIN_MEASURES, results[OnnxRuntimeEngine].tolist(), strict=True))

    fits = measure(np.where(mask, 255, 0).astype(np.uint8))
    assert fits["positive"] == pytest.approx(mask.mean(), abs=1e-3)
    assert fits["disagreement"] == pytest.approx(0, abs=0.02)
    assert fits["uncertainty"] == 0
    shifted = np.roll(mask, 12, axis=1)
    apart = measure(np.where(shifted, 255, 0).astype(np.uint8))
    expected = (mask ^ shifted).sum() / (mask | shifted).sum()
    assert apart["disagreement"] == pytest.approx(expected, abs=0.02)
    unsure = measure(np.full((TILE, TILE), 64, np.uint8))
    assert unsure["uncertainty"] == pytest.approx(4 * (64 / 255) * (1 - 64 / 255), abs=1e-3)
    assert unsure["disagreement"] == pytest.approx(1, abs=1e-3)
    pale = np.where(mask, 102, 0).astype(np.uint8)  # a probability of 0.4
    assert measure(pale)["disagreement"] == pytest.approx(1, abs=1e-3)
    onnx.save(stain_graph(he, image, cells, "QUALITY_CD3", 0.4), tmp_path / "stain.onnx")
    assert measure(pale)["disagreement"] == pytest.approx(0, abs=0.02)
    assert measure(np.where(mask, 101, 0).astype(np.uint8))["disagreement"] == pytest.approx(1, abs=1e-3)


def test_a_judge_that_differs_is_not_published(graphs: Path) -> None:
    description, golden = GraphSet.load(graphs), Golden.load(graphs / "golden.npz")
    engines = {name: OnnxRuntimeEngine(graphs / engine.file, threads=1) for name, engine in description.engines.items()}
    assert check_parity(engines, description, golden, (1,))["quality"][0].max_quality < 0.01
    for wrong in (golden.outputs["QUALITY"] + 0.1 * np.abs(golden.outputs["QUALITY"]) + 0.06, np.nan):
        outputs = {**golden.outputs, "QUALITY": np.broadcast_to(wrong, golden.outputs["QUALITY"].shape)}
        with pytest.raises(ParityError, match="quality differs from its golden samples"):
            check_parity(engines, description, Golden(golden.inputs, outputs), (1,))
    lacking = dataclasses.replace(
        description, engines={name: e for name, e in description.engines.items() if name != "quality"}
    )
    from staindiffuser.export.wire import check_ensemble

    with pytest.raises(GraphsError, match="but the stains need"):
        check_ensemble(lacking)


def test_whitened_vectors_have_a_distance_of_about_one() -> None:
    rng = np.random.default_rng(3)
    mixing = rng.normal(size=(6, 6))
    vectors = np.asarray(rng.normal(size=(4000, 6)) @ mixing + 5, np.float64)
    mean, whitening = statistics(vectors)
    white = (vectors - mean) @ whitening
    assert np.sqrt(np.mean(white**2)) == pytest.approx(1, abs=0.15)
    far = (mean + 8 * mixing[0] - mean) @ whitening
    assert np.sqrt(np.mean(far**2)) > 2


def test_small_tiles_of_a_slide_make_a_field_and_large_ones_are_resampled(reference: Path, tmp_path: Path) -> None:
    tiles = PairedTiles.load(reference).split("train")
    found = list(fields(tiles, TILE, 0.5, 10))
    assert len(found) == 10
    assert {he.shape for _, he in found} == {(TILE, TILE, 3)}
    assert len({slide for slide, _ in found}) == 10  # evenly spread
    coarse = list(fields(tiles[:16], TILE, 0.25, 100))  # at twice the magnification a tile fills a field
    assert len(coarse) == 16
    assert {he.shape for _, he in coarse} == {(TILE, TILE, 3)}


def test_too_few_tiles_are_refused_and_the_graphs_stay(graphs: Path, tiles_folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in graphs.iterdir()}
    with pytest.raises(ExportUsageError, match=r"hold tissue, 32 are needed: give more --tiles"):
        add_quality(graphs, [tiles_folder])
    with pytest.raises(StainDiffuserError, match=r"tiles\.csv is missing"):
        add_quality(graphs, [graphs])
    assert {path.name: path.read_bytes() for path in graphs.iterdir()} == before
