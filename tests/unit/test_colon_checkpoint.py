"""The model of colon cancer that ships: it names its data, its graphs are its own, and it knows real tissue.

The tissue is that of ``real_data``: fields of regions that no training saw, with their fluorescence, and fields of
another laboratory. What the tests ask for was measured on these weights, less some room: they keep a change of the
weights or of the network from going unnoticed. docs/explanation/real-tissue.md has what was measured.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import openslide
import pytest

import staindiffuser
from staindiffuser.export.description import GraphSet
from staindiffuser.export.graphs import gate_of
from staindiffuser.files import file_sha256
from staindiffuser.imaging.arrays import UInt8Array
from staindiffuser.imaging.image_files import read_image
from staindiffuser.serving.demo import shipped_models
from staindiffuser.training.checkpoint import WEIGHTS, Checkpoint, tensors_sha256
from staindiffuser.training.config import Task
from staindiffuser.training.evaluation.cell_scores import auroc
from staindiffuser.training.infer import stain_tiles
from staindiffuser.training.model.widening import widened

FOLDER = Path(next(iter(staindiffuser.__path__))).resolve() / "checkpoints" / "colon"
STAINS = ("cd3", "ck818", "cd20")
CHANNELS = ("dapi", "cd3", "cd20", "panck")


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint.load(FOLDER)


@pytest.fixture(scope="module")
def graphs() -> GraphSet:
    return GraphSet.load(FOLDER / "graphs")


def cell_maps(checkpoint: Checkpoint, he: UInt8Array) -> Mapping[str, UInt8Array]:
    """Per stain the cell map of one field, [H, W]."""
    sigmas = checkpoint.config.sigmas[str(checkpoint.config.steps)]
    seeds, origins = np.zeros((1, 1), np.int64), np.zeros((1, 2), np.int64)
    found = stain_tiles(checkpoint.network, he[None], sigmas=sigmas, seeds=seeds, origins=origins)
    return {stain: found[f"CELLS_{stain.upper()}"][0, ..., 0] for stain in STAINS}


def test_it_names_its_data_and_means_nothing_medically(checkpoint: Checkpoint) -> None:
    card = (FOLDER / "MODEL_CARD.md").read_text(encoding="utf-8")
    for text in (checkpoint.config.notice, card):
        assert "Bian et al., arXiv 2403.18501" in text
        assert "no medical meaning" in text
        assert "knows colon of one laboratory" in text
    assert "license: apache-2.0" in card
    assert checkpoint.config.model.stain_names == STAINS


def test_graphs_come_from_these_weights(checkpoint: Checkpoint, graphs: GraphSet) -> None:
    assert graphs.checkpoint_sha256 == file_sha256(FOLDER / WEIGHTS)
    assert graphs.engines["he_encoder"].weights_sha256 == tensors_sha256(
        checkpoint.network.encoder.state_dict().items()
    )
    for stain in STAINS:
        tasks: dict[str, Task] = {"stain": "images", "cells": "cells"}
        for engine, task in tasks.items():
            expected = tensors_sha256(checkpoint.network.branch(task, stain).state_dict().items())
            assert graphs.engines[f"{engine}_{stain}"].weights_sha256 == expected, (engine, stain)
    assert set(graphs.engines) >= {"quality", *(f"quality_{stain}" for stain in STAINS)}
    assert graphs.gate == gate_of(checkpoint.metrics, checkpoint.config.steps)
    assert graphs.thresholds == checkpoint.config.thresholds
    assert graphs.notice.startswith(checkpoint.config.notice)


def test_a_golden_sample_is_what_these_weights_paint(checkpoint: Checkpoint, graphs: GraphSet) -> None:
    golden = np.load(FOLDER / "graphs" / graphs.golden)
    first = {name: golden[name][:1] for name in ("HE", "SEED", "ORIGIN")}
    results = stain_tiles(
        checkpoint.network, first["HE"], sigmas=graphs.sigmas, seeds=first["SEED"], origins=first["ORIGIN"]
    )
    for name, result in results.items():
        assert np.abs(result.astype(int) - golden[name][:1]).max() <= 1, name


def test_it_is_served_by_its_name_and_is_small() -> None:
    assert shipped_models()["colon"] == FOLDER / "graphs"
    megabytes = {path.name: path.stat().st_size / 1e6 for path in FOLDER.rglob("*") if path.is_file()}
    assert megabytes[WEIGHTS] <= 8
    assert max(megabytes.values()) <= 10
    assert sum(path.stat().st_size for path in (FOLDER / "graphs").iterdir()) / 1e6 <= 18


def test_no_region_of_validation_or_test_was_trained_on(checkpoint: Checkpoint) -> None:
    assert checkpoint.seen is not None
    splits = Path(__file__).parents[2] / "docs" / "reference" / "hemit-splits.csv"
    with splits.open(encoding="utf-8") as file:
        regions = {row["region"]: row["split"] for row in csv.DictReader(file)}
    trained = {regions[slide] for slide in checkpoint.seen.slides if slide in regions}
    assert trained == {"train"}


def test_training_can_begin_with_it(checkpoint: Checkpoint) -> None:
    assert widened(checkpoint.network, checkpoint.config.model)[1] == ()


@pytest.mark.parametrize(
    ("field", "stain", "channel", "least"),
    [
        ("17177_49472_14", "ck818", "panck", 0.74),
        ("14098_52657_16", "ck818", "panck", 0.85),
        ("17780_53623_21", "cd20", "cd20", 0.62),
        ("15407_49420_13", "cd3", "cd3", 0.65),
    ],
)
def test_fields_that_no_training_saw(
    checkpoint: Checkpoint, real_data: Path, field: str, stain: str, channel: str, least: float
) -> None:
    """The cell map is bright where the fluorescence is, its stretch undone."""
    folder = real_data / "hemit-regions"
    with (folder / "tiles.csv").open(encoding="utf-8") as file:
        row = next(row for row in csv.DictReader(file) if row["name"] == field)
    he = cv2.resize(read_image(folder / "he" / f"{field}.jpg"), (256, 256), interpolation=cv2.INTER_AREA)
    levels = imagecodecs.png_decode((folder / "mif" / f"{field}.png").read_bytes())[..., CHANNELS.index(channel)]
    bright = cv2.GaussianBlur(levels / float(row[f"gain_{channel}"]), (0, 0), 3)
    truth = (bright >= np.quantile(bright, 0.7)).ravel().astype(float)
    found = cell_maps(checkpoint, np.asarray(he, np.uint8))[stain]
    assert auroc(truth, found.ravel() / 255) >= least


def test_glass_and_muscle_of_other_laboratories_are_left_alone(checkpoint: Checkpoint, real_data: Path) -> None:
    with openslide.OpenSlide(real_data / "slides" / "CMU-1-Small-Region.svs") as slide:
        glass = np.asarray(slide.read_region((100, 2000), 0, (256, 256)).convert("RGB"))
    tiles = sorted((real_data / "orion-crc-he-tiles").glob("topic*/*"))
    muscle = [cv2.resize(read_image(tiles[number]), (144, 144), interpolation=cv2.INTER_AREA) for number in (34, 35)]
    for he in (glass, *muscle):
        for stain, found in cell_maps(checkpoint, np.asarray(he, np.uint8)).items():
            assert (found >= 128).mean() <= 0.01, stain
