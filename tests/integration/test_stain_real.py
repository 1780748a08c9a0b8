"""The client against a real Triton: the demanded properties of pixels, and what happens when either side goes away."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile

from staindiffuser.client import StainClient, StainingOptions, stain_slide
from staindiffuser.client.errors import RefusedRequestError, ServerUnreachableError
from staindiffuser.export.repository import build_repository
from staindiffuser.serving.server import TritonServer
from staindiffuser.triton_models.shared.meters import SECONDS

COMMAND = [sys.executable, "-c", "from staindiffuser.cli import main; main()", "stain"]


@pytest.fixture(scope="module")
def repository(tiny_graphs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_repository(tiny_graphs, tmp_path_factory.mktemp("stain") / "repository")


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[TritonServer]:
    with TritonServer(repository) as running:
        yield running


@pytest.fixture(scope="module")
def tile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tile") / "tile.tif"
    rng = np.random.default_rng(0)
    pixels = np.clip(rng.normal((200, 140, 190), 12, (150, 210, 3)), 0, 255).astype(np.uint8)
    tifffile.imwrite(path, pixels, photometric="rgb", resolution=(20000, 20000), resolutionunit="CENTIMETER")
    return path


def cell_map(folder: Path, name: str = "cd3") -> np.ndarray:
    """Lossless, so that it tells equal from almost equal."""
    return tifffile.imread(folder / f"{name}.cells.ome.tiff").astype(int)


def test_same_seed_same_pixels_whatever_the_batches(server: TritonServer, tile: Path, tmp_path: Path) -> None:
    maps = {}
    images = {}
    for name, seed, batch, in_flight in (("a", 5, 8, 3), ("b", 5, 8, 3), ("c", 5, 3, 1), ("d", 6, 8, 3)):
        with StainClient(server.url, in_flight=in_flight) as client:
            options = StainingOptions(seed=seed, batch=batch, in_flight=in_flight)
            run = stain_slide(tile, tmp_path / name, client, options)
        maps[name] = np.stack([cell_map(tmp_path / name), cell_map(tmp_path / name, "ck818")])
        images[name] = tifffile.imread(tmp_path / name / "cd3.ome.tiff").astype(int)
    assert run.tiles.stained > 8
    np.testing.assert_array_equal(maps["a"], maps["b"])
    np.testing.assert_array_equal(images["a"], images["b"])
    assert np.abs(maps["a"] - maps["c"]).max() <= 1
    assert np.abs(images["a"] - images["c"]).mean() < 1, "JPEG may add to the one grey level"
    assert (images["a"] != images["d"]).mean() > 0.1, "the seed matters"


def test_the_pixels_are_the_tensors(server: TritonServer, tile: Path, tmp_path: Path) -> None:
    """Where only one tile contributes, the file holds what the server gave for it."""
    with StainClient(server.url) as client:
        run = stain_slide(tile, tmp_path / "out", client, StainingOptions(seed=9))
        side, margin = run.tiles.side, run.tiles.margin
        start = -(-margin // 16) * -16
        x = y = start + run.tiles.stride
        pixels = tifffile.imread(tile)[None, y : y + side, x : x + side]
        outputs = client.stain_tiles(np.ascontiguousarray(pixels), np.array([[x, y]]), 9)
    inner = slice(margin + 8, side - margin - 8)
    expected = outputs["CELLS_CD3"][0, inner, inner, 0].astype(int)
    found = cell_map(tmp_path / "out")[y : y + side, x : x + side][inner, inner]
    assert np.abs(found - expected).max() <= 1


def test_stains_that_are_not_asked_for_do_not_run(server: TritonServer, tile: Path, tmp_path: Path) -> None:
    def computed() -> dict[str, str]:
        time.sleep(2 * SECONDS)  # until the model has told
        with urllib.request.urlopen(server.metrics_url, timeout=10) as response:
            text = response.read().decode()
        return dict(re.findall(r'^staindiffuser_tiles_total\{.*output="(\w+)".*\} (\S+)$', text, re.MULTILINE))

    before = computed()
    with StainClient(server.url) as client:
        stain_slide(tile, tmp_path / "out", client, StainingOptions(stains=("cd3",), cells=False))
    assert {name for name, tiles in computed().items() if tiles != before.get(name)} == {"STAIN_CD3"}


def test_an_origin_off_the_lattice_is_refused(server: TritonServer) -> None:
    with StainClient(server.url) as client:
        side = client.contract.tile
        with pytest.raises(RefusedRequestError, match="16"):
            client.stain_tiles(np.zeros((1, side, side, 3), dtype=np.uint8), np.array([[8, 0]]), 0)
        client.stain_tiles(np.zeros((1, side, side, 3), dtype=np.uint8), np.array([[-16, 32]]), 0)


def big_tile(path: Path) -> Path:
    pixels = np.random.default_rng(1).normal((200, 140, 190), 12, (1500, 1500, 3))
    tifffile.imwrite(
        path, np.clip(pixels, 0, 255).astype(np.uint8), photometric="rgb", tile=(256, 256),
        resolution=(20000, 20000), resolutionunit="CENTIMETER",
    )  # fmt: skip
    return path


def launched(*arguments: object) -> subprocess.Popen[str]:
    command = [*COMMAND, *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "300", "TERM": "dumb"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def wait_for_tiles(url: str) -> None:
    with StainClient(url) as client:
        deadline = time.monotonic() + 60
        while client.execution_counts()["staindiffuser"] < 3 and time.monotonic() < deadline:
            time.sleep(0.05)


def test_a_server_that_is_killed_in_the_middle(repository: Path, tmp_path: Path) -> None:
    path = big_tile(tmp_path / "big.tif")
    with TritonServer(repository) as server:
        process = launched(path, "--server", server.url, "--output", tmp_path / "out", "--patience", 0)
        wait_for_tiles(server.url)
        os.kill(server.pid, signal.SIGKILL)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 3, stderr
    assert "Traceback" not in stderr
    assert [line for line in stderr.splitlines() if line.startswith("error: ")] == [stderr.splitlines()[-1]]
    assert not (tmp_path / "out/run.json").exists()


def descendants(pid: int) -> list[int]:
    """The process's children, and theirs."""
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()]
    return children + [below for child in children for below in descendants(child)]


def running(pid: int) -> bool:
    """Whether the process exists and is more than an entry that nobody has reaped yet."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except FileNotFoundError:
        return False


def test_a_repository_is_served_for_as_long_as_it_takes(repository: Path, tile: Path, tmp_path: Path) -> None:
    process = launched(tile, "--repository", repository, "--output", tmp_path / "out", "--json", "--preview")
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    run = json.loads(stdout)
    assert run["server"]["version"].startswith("triton")
    assert (tmp_path / "out/preview.png").exists()
    with pytest.raises(ServerUnreachableError):
        StainClient(run["server"]["url"])


def test_ctrl_c_ends_the_server_too(repository: Path, tmp_path: Path) -> None:
    path = big_tile(tmp_path / "big.tif")
    process = launched(path, "--repository", repository, "--output", tmp_path / "out")
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").glob(".unfinished/*.spool")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    time.sleep(1)
    started = descendants(process.pid)
    assert len(started) >= 2, "a server and its models"
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    deadline = time.monotonic() + 5  # a killed process takes a moment to go, and whoever reaps orphans another
    while any(running(pid) for pid in started) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in started if running(pid)]
    assert not (tmp_path / "out/run.json").exists()


def test_a_repository_that_was_tampered_with_is_not_served(repository: Path, tile: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(repository, copy)
    config = next(copy.glob("*/config.pbtxt"))
    config.write_text(config.read_text() + "\n# changed\n")
    process = launched(tile, "--repository", copy, "--output", tmp_path / "out")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 5, stderr
    assert not (tmp_path / "out").exists()
