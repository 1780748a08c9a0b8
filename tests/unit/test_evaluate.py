"""Evaluations of a checkpoint: several numbers of steps at once, what they refuse, and their report."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from staindiffuser.errors import UsageError
from staindiffuser.training.checkpoint import Checkpoint
from staindiffuser.training.data.targets import load_tile
from staindiffuser.training.errors import DataError
from staindiffuser.training.evaluation.cell_scores import CELL_METRICS
from staindiffuser.training.evaluation.evaluate import (
    Evaluation,
    evaluate,
    evaluate_steps,
    evaluate_tiles,
    restain,
    summarize,
)
from staindiffuser.training.evaluation.feature_distances import FeatureNetwork, Networks
from staindiffuser.training.evaluation.record import record_cells, with_weak_stains
from staindiffuser.training.evaluation.report import figure, write_report
from staindiffuser.training.evaluation.scoring import ScoredTile, score_tiles
from staindiffuser.training.evaluation.tile_metrics import Reference, measure_cells, measure_image
from staindiffuser.training.infer import stain_tiles, stain_tiles_with
from staindiffuser.training.tiles.paired_tiles import PairedTiles
from staindiffuser.training.tiles.writing import PairedTilesWriter

STAINS = ("cd3", "ck818")


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return Checkpoint.load(tiny_checkpoint)


@pytest.fixture(scope="module")
def tiles(tiles_folder: Path) -> PairedTiles:
    return PairedTiles.load(tiles_folder)


def means(images: np.ndarray) -> torch.Tensor:
    return torch.tensor(images.mean(axis=(1, 2)))


@pytest.fixture(scope="module")
def evaluations(checkpoint: Checkpoint, tiles: PairedTiles) -> Sequence[Evaluation]:
    networks = Networks(
        features=(FeatureNetwork(name="encoder", identity="the means of the channels", features=means),),
        lpips=lambda a, b: [float(np.abs(x.astype(float) - y).mean()) for x, y in zip(a, b, strict=True)],
    )
    return evaluate_steps(checkpoint, tiles, steps=(1, 4, 18), batch=3, networks=networks)


def test_samplers_together_give_what_each_gives_alone(checkpoint: Checkpoint) -> None:
    he = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), dtype=np.uint8)
    seeds, origins = np.array([[3], [4]]), np.array([[0, 0], [16, 32]])
    samplers = [(80.0,), (80.0, 21.4, 4.2, 0.5), None]
    together = stain_tiles_with(checkpoint.network, he, samplers=samplers, seeds=seeds, origins=origins)
    for sigmas, result in zip(samplers, together, strict=True):
        alone = stain_tiles(checkpoint.network, he, sigmas=sigmas, seeds=seeds, origins=origins)
        assert result.keys() == alone.keys()
        for name, array in alone.items():
            np.testing.assert_array_equal(result[name], array)


def test_an_evaluation_at_several_steps_is_several_evaluations(
    evaluations: Sequence[Evaluation], checkpoint: Checkpoint, tiles: PairedTiles
) -> None:
    alone = evaluate(checkpoint, tiles, steps=4)
    assert [e.steps for e in evaluations] == [1, 4, 18]
    for stain in STAINS:
        together, single = evaluations[1].scores[stain].metrics(), alone.scores[stain].metrics()
        assert set(together) - set(single) == {"kid_encoder", "lpips"}
        for name, value in single.items():
            assert together[name] == pytest.approx(value, nan_ok=True), name
        cells = {e.scores[stain].metrics()["cell_dice"] for e in evaluations}
        assert len(cells) == 1  # the cell map does not depend on the steps


def test_scores_are_in_the_tiles_order_whatever_the_batch(checkpoint: Checkpoint, tiles: PairedTiles) -> None:
    rows, sigmas = tiles.split("train"), (80.0,)
    network = checkpoint.network
    seen: list[str] = []
    by_one = evaluate_tiles(network, rows, sigmas=sigmas, batch=1, seen=lambda row, *_: seen.append(row.he.name))
    by_three = evaluate_tiles(network, rows, sigmas=sigmas, batch=3)
    assert seen == [row.he.name for row in rows]
    for stain in STAINS:
        for a, b in zip(by_one[stain].rows, by_three[stain].rows, strict=True):
            assert a.keys() == b.keys()
            # A batch may sum in another order, which may move a value by one grey level.
            assert a["od_x"] == pytest.approx(b["od_x"], rel=1e-3)
            assert a["od_y"] == b["od_y"]


def test_any_method_can_be_scored_with_or_without_cell_maps(tiles: PairedTiles) -> None:
    rows = tiles.split("val")
    scored: list[ScoredTile] = []

    def copy_of_he(he: np.ndarray, seeds: np.ndarray) -> list[dict[str, np.ndarray]]:
        assert seeds.shape == (len(he), 1)
        return [{f"STAIN_{stain.upper()}": he for stain in STAINS}]

    (scores,) = score_tiles(copy_of_he, rows, stains=STAINS, detail=True, seen=scored.append)
    for stain in STAINS:
        assert "positive_cell_f1" in scores[stain].metrics()
        assert "cell_dice" not in scores[stain].metrics()
        data = scored[2].data
        reference = Reference(data[stain], data[f"{stain}_mask"], 0.5, data["he"])
        assert scores[stain].rows[2] == measure_image(data["he"], reference, detail=True)


def test_each_tile_is_measured_as_alone(evaluations: Sequence[Evaluation]) -> None:
    tile = restain(evaluations, 1)
    for evaluation, result in zip(evaluations, tile.results, strict=True):
        for stain in STAINS:
            reference = Reference(tile.data[stain], tile.data[f"{stain}_mask"], 0.5, tile.data["he"])
            row = measure_cells(result[f"CELLS_{stain.upper()}"][..., 0], reference, detail=True)
            row |= measure_image(result[f"STAIN_{stain.upper()}"], reference, detail=True)
            measured = evaluation.scores[stain].rows[1]
            assert measured["real"] == row["real"]
            assert measured["od_x"] == pytest.approx(row["od_x"], rel=1e-3)
            assert measured["map_virtual"] == pytest.approx(row["map_virtual"], abs=3)
            assert measured["lpips_tiles"] == 1


def test_limit_takes_tiles_evenly_spread(checkpoint: Checkpoint, tiles: PairedTiles) -> None:
    rows = evaluate_steps(checkpoint, tiles, steps=[1], split="train", limit=3, detail=False)[0].rows
    assert rows == tuple(tiles.split("train")[i] for i in (0, 2, 5))


def test_progress_counts_every_tile(checkpoint: Checkpoint, tiles: PairedTiles) -> None:
    calls: list[tuple[int, int]] = []
    evaluate_steps(checkpoint, tiles, steps=[1], detail=False, progress=lambda *call: calls.append(call))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


def folder_of(path: Path, sizes: Sequence[int]) -> PairedTiles:
    rng = np.random.default_rng(0)
    with PairedTilesWriter(path, STAINS, masks=False) as writer:
        for i, size in enumerate(sizes):
            images = rng.integers(0, 255, (3, size, size, 3), dtype=np.uint8)
            pair = dict(zip(STAINS, images[1:], strict=True))
            writer.add(f"t{i}", he=images[0], stains=pair, slide=f"s{i}", split="test", mpp=0.5)
    return PairedTiles.load(path)


def test_tiles_of_several_sizes_are_scored(checkpoint: Checkpoint, tmp_path: Path) -> None:
    score = evaluate(checkpoint, folder_of(tmp_path, (32, 48, 48, 32)), steps=1).scores["cd3"]
    assert [row["od_n"] for row in score.rows] == [32**2, 48**2, 48**2, 32**2]


def test_a_size_that_cannot_be_stained_is_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"t1\.png has 40 x 40 pixels: width and height must be multiples of 16"):
        evaluate(checkpoint, folder_of(tmp_path, (32, 40)), steps=1)


def test_refusals(checkpoint: Checkpoint, tiles: PairedTiles, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--steps 3: this checkpoint has samplers of 1, 2, 4, 18 steps"):
        evaluate(checkpoint, tiles, steps=3)
    with pytest.raises(DataError, match="no rows in split 'val'"):
        evaluate(checkpoint, folder_of(tmp_path, (32,)), steps=1, split="val")


def test_summary_is_json_without_nan(evaluations: Sequence[Evaluation]) -> None:
    data = json.loads(json.dumps(summarize(evaluations), allow_nan=False))
    assert data["networks"] == {"encoder": "the means of the channels"}
    assert [result["steps"] for result in data["results"]] == [1, 4, 18]
    assert data["results"][1]["stains"] == evaluations[1].summary()["stains"]
    low, high = data["results"][0]["intervals_95"]["cd3"]["psnr"]
    assert low <= data["results"][0]["stains"]["cd3"]["psnr"] <= high
    assert data["results"][0]["counts"]["cd3"]["real_cells"] > 0


def test_report_has_a_column_per_number_of_steps_and_images(evaluations: Sequence[Evaluation], tmp_path: Path) -> None:
    text = write_report(evaluations, tmp_path).read_text()
    assert text.count("| metric | better | 1 step | 4 steps | 18 steps |") == len(STAINS)
    assert "- **hausdorff95_um**: 95th percentile" in text
    assert "**fid_inception**" not in text
    value = evaluations[2].scores["ck818"].metrics()["psnr"]
    line = next(x for x in text[text.index("## ck818") :].splitlines() if x.startswith("| psnr |"))
    assert line.split("|")[5].strip().startswith(f"{value:.3f} (")
    for name in ("cd3-best", "ck818-worst"):
        with Image.open(tmp_path / f"{name}.png") as image:
            # H&E, real, three virtual stains, cell map
            assert image.size == (6 * 64 + 5 * 8, 64)
        assert f"({name}.png)" in text
    assert "(metrics.png)" in text
    assert (tmp_path / "metrics.png").stat().st_size > 1000


def test_cells_are_scored_beside_baselines_and_reported(evaluations: Sequence[Evaluation], tmp_path: Path) -> None:
    summary = json.loads(json.dumps(summarize(evaluations), allow_nan=False))
    for result in summary["results"]:
        for found in result["cells"].values():
            assert set(found["metrics"]) == set(CELL_METRICS)
            assert found["counts"]["cells"] > 0
            assert sum(count for _, _, count in found["reliability"]) == found["counts"]["cells"]
    text = write_report(evaluations, tmp_path).read_text(encoding="utf-8")
    assert "| hematoxylin_auroc | " in text
    assert "than the hematoxylin of the H&E does" in text


def test_a_margin_is_stained_but_not_scored(checkpoint: Checkpoint, tiles: PairedTiles, tmp_path: Path) -> None:
    rows = tiles.split("test")

    def only_the_middle(he: np.ndarray, seeds: np.ndarray) -> list[dict[str, np.ndarray]]:
        """Right but for a frame of 8 pixels."""
        assert he.shape[1:3] == (64, 64)
        painted = {}
        for stain in STAINS:
            real = np.stack([load_tile(rows[int(seed)], (stain,))[stain] for seed in seeds[:, 0]])
            wrong = 255 - real
            wrong[:, 8:-8, 8:-8] = real[:, 8:-8, 8:-8]
            painted[f"STAIN_{stain.upper()}"] = wrong
        return [painted]

    whole, inside = (score_tiles(only_the_middle, rows, stains=STAINS, margin=m)[0]["ck818"].metrics() for m in (0, 8))
    assert math.isinf(inside["psnr"])
    assert whole["psnr"] < 20
    evaluations = evaluate_steps(checkpoint, tiles, steps=[1], detail=False, margin=16)
    assert evaluations[0].summary()["margin"] == 16
    assert "A border of 16 pixels is stained but not scored" in write_report(evaluations, tmp_path).read_text()
    with pytest.raises(DataError, match="a margin of 32 leaves nothing"):
        evaluate_steps(checkpoint, tiles, steps=[1], margin=32)


def test_report_that_cannot_be_written(evaluations: Sequence[Evaluation], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot be written: .*; choose another --report"):
        write_report(evaluations, tmp_path / "file")


def test_figures() -> None:
    assert figure(0.5, (0.25, float("inf"))) == "0.500 (0.250 to ∞)"
    assert figure(float("nan")) == "–"


def test_recorded_scores_stand_in_the_card_and_weak_stains_in_the_notice(
    evaluations: Sequence[Evaluation], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    checkpoint.save(tmp_path / "c")
    before = (tmp_path / "c" / "model.safetensors").read_bytes()
    labels = {stain.name: stain.label for stain in checkpoint.config.model.stains}
    weak = [labels[stain] for stain, score in evaluations[0].cells.items() if not score.passes()]
    card_file = tmp_path / "c" / "MODEL_CARD.md"
    licensed = card_file.read_text(encoding="utf-8").replace("---\n", "---\nlicense: apache-2.0\n", 1)
    card_file.write_text(licensed, encoding="utf-8")
    assert weak, "an untrained network tells nothing"
    for _ in range(2):  # a second time says it once
        record_cells(evaluations[0], tmp_path / "c", data="blobs")
    recorded = Checkpoint.load(tmp_path / "c")
    sentence = f" Not shown to tell more than hematoxylin: {', '.join(weak)} (measured on blobs)."
    assert recorded.config.notice == checkpoint.config.notice + sentence
    assert (tmp_path / "c" / "model.safetensors").read_bytes() == before
    card = card_file.read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert "## Per cell, measured on blobs" in card
    assert "**Not shown to tell more than the H&E's hematoxylin does" in card
    assert with_weak_stains(recorded.config.notice, [], data="blobs") == checkpoint.config.notice


def test_what_follows_the_weak_stains_stays_in_the_notice() -> None:
    later = " Its CD8 was added later, trained on lungs (two)."
    notice = with_weak_stains("For research.", ["CD3", "CK8/18"], data="colon (10 regions)") + later
    assert with_weak_stains(notice, [], data="lungs") == f"For research.{later}"
    again = with_weak_stains(notice, ["CD8"], data="lungs")
    assert again == f"For research.{later} Not shown to tell more than hematoxylin: CD8 (measured on lungs)."
