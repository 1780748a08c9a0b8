"""A server that is replaced while a slide is stained: never a result of two models, and none lost without need."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile

from staindiffuser.client import StainClient
from staindiffuser.export.manifest import Manifest
from staindiffuser.export.repository import build_repository
from staindiffuser.serving.server import TritonServer
from tests.running_serve import eventually, kill_server, serving
from tests.synthetic_graphs import write_graphs

COMMAND = [sys.executable, "-c", "from staindiffuser.cli import main; main()", "stain"]
TILES_BEFORE = 15
"""Tiles answered by the first server before it is replaced."""


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("replaced")
    built = []
    for seed in (0, 1):
        write_graphs(folder / f"graphs{seed}", tile=64, seed=seed)
        built.append(build_repository(folder / f"graphs{seed}", folder / f"models{seed}", max_batch=1, threads=1))
    return built


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slide") / "slide.tif"
    rng = np.random.default_rng(0)
    pixels = np.clip(rng.normal((200, 140, 190), 12, (480, 480, 3)), 0, 255).astype(np.uint8)
    tifffile.imwrite(path, pixels, photometric="rgb", resolution=(20000, 20000), resolutionunit="CENTIMETER")
    return path


def start(slide: Path, output: Path, url: str) -> subprocess.Popen[str]:
    command = [*COMMAND, str(slide), "--output", str(output), "--server", url, "--batch", "1"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until_under_way(client: StainClient, process: subprocess.Popen[str]) -> None:
    while client.execution_counts()["staindiffuser"] < TILES_BEFORE:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)


def test_another_model_ends_the_slide(repositories: list[Path], slide: Path, tmp_path: Path) -> None:
    with TritonServer(repositories[0]) as server:
        port = int(server.url.rpartition(":")[2])
        process = start(slide, tmp_path / "out", server.url)
        with StainClient(server.url) as client:
            wait_until_under_way(client, process)
    with TritonServer(repositories[1], grpc_port=port):
        _, stderr = process.communicate(timeout=120)
    versions = [Manifest.load(repository).model_version[:12] for repository in repositories]
    assert process.returncode == 3, stderr
    assert f"now serves model synthetic ({versions[1]}), not synthetic ({versions[0]})" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


def test_a_slide_survives_that_its_server_is_killed(repositories: list[Path], slide: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of the slide; ``serve`` starts the server again, and the pixels are as in quiet times."""
    with serving(repositories[0], tmp_path) as server:
        process = start(slide, tmp_path / "killed", server.url)
        with StainClient(server.url) as client:
            wait_until_under_way(client, process)
        kill_server(server)
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
        # The server answers before ``serve`` has written that it is back: a quick slide can end in between.
        assert eventually(lambda: "restarted" in server.names())
        assert server.names() == ["start", "ready", "crashed", "restarted"]
        undisturbed = start(slide, tmp_path / "undisturbed", server.url)
        _, stderr = undisturbed.communicate(timeout=120)
        assert undisturbed.returncode == 0, stderr
    for name in ("cd3.ome.tiff", "cd3.cells.ome.tiff", "ck818.ome.tiff", "ck818.cells.ome.tiff"):
        expected = tifffile.imread(tmp_path / "undisturbed" / name)
        np.testing.assert_array_equal(tifffile.imread(tmp_path / "killed" / name), expected)
