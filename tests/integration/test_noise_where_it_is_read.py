"""Noise is made only where a graph reads it, by Triton's real server; the wire stays as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from staindiffuser.client import StainClient
from staindiffuser.client.errors import RefusedRequestError
from staindiffuser.export import triton_config, wire
from staindiffuser.export.repository import build_repository, prepare_build
from staindiffuser.serving.server import TritonServer
from tests.synthetic_graphs import write_graphs

TILE = 64
TILES = np.random.default_rng(0).integers(0, 256, (2, TILE, TILE, 3), dtype=np.uint8)
ORIGINS = np.array([[-32, 0], [160, 16]], dtype=np.int64)


def test_without_readers_there_is_no_noise_model(tmp_path: Path) -> None:
    graphs = write_graphs(tmp_path / "graphs", tile=TILE, steps=1, noisy=())
    answers = []
    for flavour in ("python", "single"):
        repository = build_repository(tmp_path / "graphs", tmp_path / flavour, flavour=flavour, max_batch=2, threads=1)
        assert not (repository / "noise").exists()
        with TritonServer(repository) as server, StainClient(server.url) as client:
            first = client.stain_tiles(TILES, ORIGINS, 7)
            again = client.stain_tiles(TILES, ORIGINS + 16, 8)
            for name, tensor in first.items():
                np.testing.assert_array_equal(tensor, again[name], "neither seed nor place changes anything")
            with pytest.raises(RefusedRequestError, match=r"ORIGIN \(-31, 1\) is not a multiple of 16"):
                client.stain_tiles(TILES, ORIGINS + 1, 7)
            assert client.stain_tiles(TILES, ORIGINS, 7)["STAIN_CD3"].tobytes() == first["STAIN_CD3"].tobytes()
            if flavour == "python":
                assert set(client.execution_counts()) == {"staindiffuser", *graphs.engines}
            answers.append(first)
    for name, tensor in answers[0].items():
        np.testing.assert_array_equal(tensor, answers[1][name])


def test_noise_of_cell_maps_alone(tmp_path: Path) -> None:
    write_graphs(tmp_path / "graphs", tile=TILE, steps=1, noisy=("cells",))
    repository = build_repository(tmp_path / "graphs", tmp_path / "models", flavour="python", max_batch=2, threads=1)
    config = triton_config.parse((repository / "noise" / "config.pbtxt").read_text())
    assert [output.name for output in config.output] == ["NOISE_CELLS"]
    with TritonServer(repository) as server, StainClient(server.url) as client:
        before = client.execution_counts()
        client.stain_tiles(TILES, ORIGINS, 7, cells=False)
        images = client.execution_counts()
        one, other = (client.stain_tiles(TILES, ORIGINS, seed) for seed in (7, 8))
        assert images["noise"] == before["noise"], "images alone read none"
        assert client.execution_counts()["noise"] == images["noise"] + 2
    np.testing.assert_array_equal(one["STAIN_CD3"], other["STAIN_CD3"])
    assert (one["CELLS_CD3"] != other["CELLS_CD3"]).any()


def test_a_sampler_of_several_steps_keeps_its_noise(tmp_path: Path) -> None:
    graphs = write_graphs(tmp_path / "graphs", tile=TILE, steps=2)
    assert [spec.name for spec in wire.noise_read(graphs)] == ["NOISE", "NOISE_CELLS"]
    assert "noise" in prepare_build(tmp_path / "graphs", flavour="python").configs
    less = write_graphs(tmp_path / "none", tile=TILE, steps=1, noisy=())
    assert triton_config.cuda_pool_bytes(graphs, 1) - triton_config.cuda_pool_bytes(less, 1) == (
        triton_config.IN_FLIGHT * 2 * TILE**2 * (2 * 3 + 1)
    )
