"""Fixtures that every test folder shares."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from filelock import FileLock

if TYPE_CHECKING:
    from collections.abc import Callable

    from staindiffuser.training.config import ModelConfig

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure() -> None:
    """No settings from outside; and let commands under test be interrupted.

    A shell's background job, its children included, ignores SIGINT.
    """
    os.environ["STAINDIFFUSER_CONFIG"] = os.devnull  # not the developer's own settings
    os.environ["STAINDIFFUSER_EXACT"] = "1"  # the same engines on every machine, and no time spent on choosing
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real slides and tiles, or a skip that says where it was looked for."""
    folder = Path(os.environ.get("STAINDIFFUSER_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real slides: {folder} does not exist; set STAINDIFFUSER_TEST_DATA to a folder that holds them")
    return folder


@pytest.fixture(scope="session")
def tiny_model() -> ModelConfig:
    """The debug preset with two stains."""
    import dataclasses

    from staindiffuser.training.config import PRESETS, StainConfig

    stains = (
        StainConfig(name="cd3", label="CD3", image_mean=(0.8, 0.8, 0.85), image_std=(0.15, 0.18, 0.15)),
        StainConfig(name="ck818", label="CK8/18", image_mean=(0.75, 0.7, 0.7), image_std=(0.2, 0.2, 0.2)),
    )
    return dataclasses.replace(PRESETS["debug"].model, stains=stains)


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder of the session that the first process to ask makes, and the other workers of pytest-xdist read."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"shared-{name}"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            draft = folder.with_suffix(".draft")
            make(draft)
            draft.rename(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_model: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of the debug preset; random weights whose gains are not zero, so that every layer matters."""
    return made_once(tmp_path_factory, "checkpoint", lambda folder: _save_tiny(tiny_model, folder))


def _save_tiny(tiny_model: ModelConfig, folder: Path) -> None:
    import torch

    from staindiffuser.training.checkpoint import Checkpoint, CheckpointConfig
    from staindiffuser.training.model.network import DualDiffusion

    torch.manual_seed(0)
    network = DualDiffusion(tiny_model)
    for parameter in network.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, std=0.3)
    config = CheckpointConfig(
        name="tiny", model=tiny_model, notice="For trying the software, research use only.", margin=16
    )
    Checkpoint(config=config, network=network).save(folder)


@pytest.fixture(scope="session")
def tiny_graphs(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graphs of :func:`tiny_checkpoint`: tiles of 64 pixels, two steps."""
    from staindiffuser.export.graphs import export_graphs

    return made_once(
        tmp_path_factory, "graphs", lambda folder: export_graphs(tiny_checkpoint, folder, steps=2, tile=64)
    )


@pytest.fixture(scope="session")
def tiles_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Paired tiles of 64 pixels: blobs, brown in the IHC; two slides to train on, one each for val and test."""
    from staindiffuser.training.tiles.paired_tiles import Split
    from staindiffuser.training.tiles.writing import PairedTilesWriter

    folder = tmp_path_factory.mktemp("tiles")
    rng = np.random.default_rng(0)
    yy, xx = np.mgrid[:64, :64]
    splits: list[Split] = ["train", "train", "val", "test"]
    with PairedTilesWriter(folder, ["cd3", "ck818"], masks=False) as writer:
        for i in range(16):
            he = np.full((64, 64, 3), (225, 170, 205), np.uint8)
            images = {stain: np.full((64, 64, 3), (225, 225, 235), np.uint8) for stain in writer.stains}
            for stain, colour in (("cd3", (90, 60, 140)), ("ck818", (160, 90, 170))):
                for x, y in rng.integers(8, 56, (4, 2)):
                    blob = np.hypot(xx - x, yy - y) < 7
                    he[blob], images[stain][blob] = colour, (130, 80, 45)
            writer.add(f"t{i:02d}", he=he, stains=images, slide=f"s{i % 4}", split=splits[i % 4], mpp=0.5)
    return folder


@pytest.fixture(scope="session")
def viewed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a slide, ``slide.ome.tiff``, and its result, ``slide-stained``, for the viewer to show."""
    from tests.viewer_results import stain, write_slide

    folder = tmp_path_factory.mktemp("viewed")
    write_slide(folder / "slide.ome.tiff")
    stain(folder / "slide.ome.tiff", folder / "slide-stained")
    return folder
