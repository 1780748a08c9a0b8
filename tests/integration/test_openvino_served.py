"""Engines in bfloat16 behind Triton: the same bytes as called directly, in both flavours, at any batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from staindiffuser.client import StainClient
from staindiffuser.export import builders
from staindiffuser.export.builders import BuildOptions
from staindiffuser.export.loading import load_engines
from staindiffuser.export.parity import run_pipeline
from staindiffuser.export.repository import build
from staindiffuser.serving.server import TritonServer
from tests.synthetic_graphs import write_graphs

pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install 'staindiffuser[openvino]'")
from staindiffuser.triton_models.engine import engine_openvino

TILES = np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), dtype=np.uint8)
ORIGINS = np.array([[0, 0], [64, 0], [0, 128]])
SEED = 7


@pytest.mark.parametrize("flavour", ["python", "single"])
def test_bytes_are_those_of_the_engines_called_directly(tmp_path: Path, flavour: str) -> None:
    precision = "bf16" if engine_openvino.computes("bf16") else "fp32"
    write_graphs(tmp_path / "graphs", tile=64)
    options = BuildOptions(max_batch=3, threads=1, precision=precision)
    report = build(tmp_path / "graphs", tmp_path / "repository", target="openvino", flavour=flavour, options=options)
    manifest, builder = report.manifest, builders.get("openvino")
    files = {name: report.repository / engine.file for name, engine in manifest.engines.items()}
    engines = load_engines(builder, files, threads=1, flavour=flavour)
    with TritonServer(report.repository) as server, StainClient(server.url) as client:
        assert client.contract.model_version == manifest.model_version
        for batch in (1, 3, 2):
            inputs = {"HE": TILES[:batch], "ORIGIN": ORIGINS[:batch], "SEED": np.full((batch, 1), SEED)}
            expected = run_pipeline(engines, manifest.engines, steps=manifest.steps, tile=manifest.tile, inputs=inputs)[
                1
            ]
            served = client.stain_tiles(TILES[:batch], ORIGINS[:batch], SEED)
            assert sorted(served) == sorted(expected)
            some = client.stain_tiles(TILES[:batch], ORIGINS[:batch], SEED, stains=["cd3"], cells=False)
            assert list(some) == ["STAIN_CD3"]
            for name, image in (*served.items(), *some.items()):
                np.testing.assert_array_equal(image, expected[name])
