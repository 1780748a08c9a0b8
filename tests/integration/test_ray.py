"""``stain --ray`` on a cluster of three nodes on this machine, one of which is killed: all slides, the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile

from staindiffuser.client import StainClient
from staindiffuser.export.repository import build_repository
from staindiffuser.serving.server import TritonServer
from tests.synthetic_graphs import write_graphs

cluster_utils = pytest.importorskip("ray.cluster_utils", reason="pip install 'staindiffuser[ray]'")

SLIDES = 6
IMAGES = ("cd3.ome.tiff", "cd3.cells.ome.tiff", "ck818.ome.tiff", "ck818.cells.ome.tiff")
COMMAND = [sys.executable, "-c", "from staindiffuser.cli import main; main()", "stain"]


def write_slide(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).normal((200, 140, 190), 12, (320, 320, 3)).clip(0, 255).astype(np.uint8)
    tifffile.imwrite(path, pixels, photometric="rgb", resolution=(20000, 20000), resolutionunit="CENTIMETER")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_node_is_lost_and_no_slide(tmp_path: Path) -> None:
    write_graphs(tmp_path / "graphs", tile=64)
    repository = build_repository(tmp_path / "graphs", tmp_path / "models", max_batch=1, threads=1)
    slides = tmp_path / "slides"
    slides.mkdir()
    for number in range(SLIDES):
        write_slide(slides / f"{number}.tif", number)
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        nodes = [cluster.add_node(num_cpus=1, resources={"staindiffuser": 1}) for _ in range(3)]
        with TritonServer(repository) as server, StainClient(server.url) as client:
            options = ["--server", server.url, "--batch", "1", "--patience", "5"]
            spread = [*COMMAND, str(slides), "--output", str(tmp_path / "cluster"), *options]
            process = subprocess.Popen(
                [*spread, "--ray", cluster.address], stderr=subprocess.PIPE, text=True, env=dict(os.environ)
            )
            while client.execution_counts()["staindiffuser"] < 40:  # in the middle of the first slides
                assert process.poll() is None, process.communicate()[1]
                time.sleep(0.05)
            cluster.remove_node(nodes[0], allow_graceful=False)
            _, stderr = process.communicate(timeout=200)
            assert process.returncode == 0, stderr
            assert f"{SLIDES} slides on " in stderr
            assert ", 3 with a server" in stderr
            assert f"{SLIDES} stained" in stderr
            here = [*COMMAND, str(slides), "--output", str(tmp_path / "here"), *options]
            alone = subprocess.run(here, capture_output=True, text=True, check=False, timeout=200)
            assert alone.returncode == 0, alone.stderr
    finally:
        cluster.shutdown()
    for number in range(SLIDES):
        for name in IMAGES:
            found, wanted = (tmp_path / place / f"{number}-stained" / name for place in ("cluster", "here"))
            np.testing.assert_array_equal(tifffile.imread(found), tifffile.imread(wanted))
    assert (tmp_path / "cluster" / "summary.csv").is_file()
