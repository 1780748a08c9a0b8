"""The demonstration model that ships: its graphs come from its weights, and it says what it is."""

import json
from pathlib import Path

import numpy as np
import openslide
import pytest

from staindiffuser.export.description import GraphSet
from staindiffuser.files import file_sha256
from staindiffuser.serving.demo import demo_graphs
from staindiffuser.training.checkpoint import WEIGHTS, Checkpoint, tensors_sha256
from staindiffuser.training.config import PRESETS
from staindiffuser.training.infer import stain_tiles
from staindiffuser.training.simulate.tiles import simulate_tile

FOLDER = demo_graphs().parent


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint.load(FOLDER)


@pytest.fixture(scope="module")
def graphs() -> GraphSet:
    return GraphSet.load(FOLDER / "graphs")


def test_graphs_come_from_these_weights(checkpoint: Checkpoint, graphs: GraphSet) -> None:
    assert graphs.checkpoint_sha256 == file_sha256(FOLDER / WEIGHTS)
    network = checkpoint.network
    modules = {"he_encoder": network.encoder}
    for stain in checkpoint.config.model.stains:
        modules[f"stain_{stain.name}"] = network.branch("images", stain.name)  # type: ignore[assignment]
        modules[f"cells_{stain.name}"] = network.branch("cells", stain.name)  # type: ignore[assignment]
    judges = {"quality", "quality_cd3", "quality_ck818"} if graphs.quality else set()  # made of tiles, not of weights
    assert set(graphs.engines) == set(modules) | judges
    for name, module in modules.items():
        assert graphs.engines[name].weights_sha256 == tensors_sha256(module.state_dict().items()), name


def test_golden_samples_are_what_these_weights_paint(checkpoint: Checkpoint, graphs: GraphSet) -> None:
    golden = np.load(FOLDER / "graphs" / graphs.golden)
    results = stain_tiles(
        checkpoint.network,
        golden["HE"],
        sigmas=graphs.sigmas,
        seeds=golden["SEED"],
        origins=golden["ORIGIN"],
    )
    for name, result in results.items():
        assert np.abs(result.astype(int) - golden[name]).max() <= 1, name


def test_it_says_that_it_means_nothing_medically(checkpoint: Checkpoint, graphs: GraphSet) -> None:
    card = (FOLDER / "MODEL_CARD.md").read_text()
    for text in (checkpoint.config.notice, graphs.notice, card):
        assert "research use only" in text
        assert "no medical meaning" in text
        assert "simulated tissue" in text


def test_architecture_is_the_demo_preset(checkpoint: Checkpoint) -> None:
    model, preset = checkpoint.config.model, PRESETS["demo"].model
    assert (model.encoder, model.image, model.cells) == (preset.encoder, preset.image, preset.cells)
    assert [stain.name for stain in model.stains] == ["cd3", "ck818"]


def test_it_is_a_student_of_the_teacher_that_ships(checkpoint: Checkpoint) -> None:
    teacher = Checkpoint.load(FOLDER.parent / "demo-teacher")
    assert "no medical meaning" in teacher.config.notice
    assert teacher.config.model == checkpoint.config.model
    ours, theirs = checkpoint.network.state_dict(), teacher.network.state_dict()
    for name in ours:
        if not name.startswith("images."):
            assert ours[name].equal(theirs[name]), name


def test_what_ships_is_small() -> None:
    megabytes = {path.name: path.stat().st_size / 1e6 for path in FOLDER.rglob("*") if path.is_file()}
    assert megabytes[WEIGHTS] <= 8
    graphs = sum(path.stat().st_size for path in (FOLDER / "graphs").iterdir()) / 1e6
    assert graphs <= 14
    assert json.loads((FOLDER / "metrics.json").read_text())["stains"].keys() == {"cd3", "ck818"}


def test_a_tile_alone_looks_as_it_does_inside_a_larger_one(
    checkpoint: Checkpoint, graphs: GraphSet, real_data: Path
) -> None:
    """The default margin is context enough: on the real slide and on simulated tissue."""
    margin, tile = graphs.margin, graphs.tile
    around = 192
    size = tile + 2 * around
    with openslide.OpenSlide(real_data / "slides" / "CMU-1-Small-Region.svs") as slide:
        places = [(400, 400), (1000, 1200)]
        real = [np.asarray(slide.read_region(place, 0, (size, size)).convert("RGB")) for place in places]
    he = np.stack([*real, *(simulate_tile(7, 50 * i, size=size, masks=False).he for i in range(1))])
    seeds = np.zeros((len(he), 1), np.int64)
    origins = np.zeros((len(he), 2), np.int64)
    inner = slice(around, around + tile)
    large = stain_tiles(checkpoint.network, he, sigmas=graphs.sigmas, seeds=seeds, origins=origins)
    alone = stain_tiles(
        checkpoint.network, he[:, inner, inner].copy(), sigmas=graphs.sigmas, seeds=seeds, origins=origins + around
    )
    kept = slice(margin, tile - margin)
    for name, result in alone.items():
        difference = np.abs(result.astype(int) - large[name][:, inner, inner])[:, kept, kept]
        assert difference.mean() <= 0.5, name
        # On real tissue, which it was not trained on, more depends on context farther away.
        assert np.quantile(difference[: len(real)], 0.99) <= 4, name
        if not name.startswith("CELLS"):
            # Where the model decides by the context whether a piece is epithelium: the cell maps there are 19 apart.
            assert np.quantile(difference[: len(real)], 0.999) <= 12, name
        assert np.quantile(difference[len(real) :], 0.999) <= 4, name
