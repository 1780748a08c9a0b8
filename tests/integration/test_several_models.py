"""One server that holds several models: each answers as it does alone, and the client says which it wants."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from staindiffuser.benchmarks.certificates import Authority
from staindiffuser.client import StainClient
from staindiffuser.client.errors import ContractError, ModelChangedError
from staindiffuser.errors import ServerLostError, UsageError
from staindiffuser.export.description import ExportedStain
from staindiffuser.export.repository import build_repository
from staindiffuser.imaging.image_files import write_png
from staindiffuser.serving.rollout import promote
from staindiffuser.serving.server import TritonServer
from tests.running_proxy import address, running
from tests.synthetic_graphs import write_graphs

TILE = 64
TILES = np.random.default_rng(0).integers(0, 256, (2, TILE, TILE, 3), dtype=np.uint8)
ORIGINS = np.array([[-32, 0], [160, 16]], dtype=np.int64)
STAINS = {"new": "cd3 ck818", "breast": "her2", "old": "cd3 ck818"}
"""Of each repository, in the order in which they are served; the models of the first and the last have one name."""
Answers = Mapping[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("several")
    built = []
    for seed, (name, stains) in enumerate(STAINS.items()):
        graphs = write_graphs(
            folder / f"{name}-graphs",
            tile=TILE,
            seed=seed,
            stains=[ExportedStain(name=stain, label=stain.upper()) for stain in stains.split()],
        )
        dataclasses.replace(graphs, name="breast" if name == "breast" else "colon").save(folder / f"{name}-graphs")
        # Two ensembles, whose inner models have the same names, and a model that is one process.
        flavour = "single" if name == "old" else "python"
        built.append(
            build_repository(folder / f"{name}-graphs", folder / name, flavour=flavour, max_batch=2, threads=1)
        )
    return built


def answer(url: str, model: str = "") -> Answers:
    with StainClient(url, model=model) as client:
        return client.stain_tiles(TILES, ORIGINS, 7)


@pytest.fixture(scope="module")
def alone(repositories: list[Path]) -> dict[str, Answers]:
    """What each model answers in a server of its own, by ``NAME@VERSION``."""
    answers = {}
    for repository in repositories:
        with TritonServer(repository) as server:
            answers[f"{server.manifest.model_name}@{server.manifest.model_version[:12]}"] = answer(server.url)
    return answers


@pytest.fixture(scope="module")
def server(repositories: list[Path]) -> Iterator[TritonServer]:
    with TritonServer(*repositories) as server:
        yield server


def test_each_model_answers_as_it_does_alone(server: TritonServer, alone: dict[str, Answers]) -> None:
    for label, expected in alone.items():
        got = answer(server.url, label)
        assert got.keys() == expected.keys()
        for name, tensor in expected.items():
            np.testing.assert_array_equal(got[name], tensor)
    new, breast, old = alone.values()
    assert list(breast) == ["STAIN_HER2", "CELLS_HER2"]
    assert any((new[name] != old[name]).any() for name in new), "the versions can be told apart"


def test_only_the_chosen_models_engines_run(server: TritonServer) -> None:
    new, breast, old = server.models
    assert (new.ensemble, new.suffix) == ("staindiffuser", "")
    assert breast.ensemble == f"staindiffuser-breast-{breast.manifest.model_version[:8]}"
    with StainClient(server.url, model="breast") as client:
        before = client.execution_counts()
        client.stain_tiles(TILES, ORIGINS, 7, cells=False)
        after = client.execution_counts()
    ran = {name for name in after if after[name] > before[name]}
    assert ran == {f"{name}{breast.suffix}" for name in ("staindiffuser", "he_encoder", "noise", "stain_her2")}
    with urllib.request.urlopen(server.metrics_url, timeout=10) as response:
        metrics = response.read().decode()
    assert f'model="{breast.ensemble}"' in metrics
    assert f'model="{old.ensemble}"' in metrics
    assert f'model_version="{breast.manifest.model_version[:12]}",output="STAIN_HER2"' in metrics


def test_what_cannot_be_chosen_is_answered_with_a_list(server: TritonServer, alone: dict[str, Answers]) -> None:
    new, breast, old = alone
    everything = f"{new}, breast, {old}"
    with pytest.raises(UsageError, match=f"serves several models: choose one by --model {everything}"):
        StainClient(server.url)
    with pytest.raises(UsageError, match=f"serves several models: choose one by --model {everything}"):
        StainClient(server.url, model="colon")
    with pytest.raises(UsageError, match=f"serves the models {everything}, not lung"):
        StainClient(server.url, model="lung")
    with pytest.raises(UsageError, match="not breast@0000"):
        StainClient(server.url, model="breast@0000")
    with StainClient(server.url, model=breast) as client:
        assert client.contract.model_name == "breast"


def test_run_json_says_which_model_it_was(server: TritonServer, tmp_path: Path) -> None:
    write_png(tmp_path / "tile.png", np.full((TILE, TILE, 3), 150, np.uint8))
    command = [
        sys.executable,
        "-c",
        "from staindiffuser.cli import main; main()",
        "stain",
        tmp_path / "tile.png",
        "--mpp",
        "0.5",
        "--mask",
        "none",
    ]
    command += ["--server", server.url, "--output", tmp_path / "out"]
    refused = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "choose one by --model" in refused.stderr
    done = subprocess.run([*map(str, command), "--model", "breast"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["model"]["name"] == "breast"
    assert run["model"]["version"] == server.models[1].manifest.model_version


def test_a_restart_keeps_the_models_apart(repositories: list[Path], alone: dict[str, Answers]) -> None:
    """A client goes on with its model when the server returns with another one beside it, and only with that."""
    new, breast, old = repositories
    with TritonServer(new) as server:
        port = int(server.url.rpartition(":")[2])
        first, second = (StainClient(server.url) for _ in range(2))
    with TritonServer(breast, new, grpc_port=port) as server:
        np.testing.assert_array_equal(
            first.stain_tiles(TILES, ORIGINS, 7)["STAIN_CD3"], next(iter(alone.values()))["STAIN_CD3"]
        )
        server.restart()
        server.probe(60)
        assert first.stain_tiles(TILES, ORIGINS, 7)
        assert server.drain(30)
        for model in ("breast", "colon"):
            with pytest.raises(ServerLostError), StainClient(server.url, model=model, patience=0) as client:
                client.stain_tiles(TILES, ORIGINS, 7)
    with TritonServer(breast, old, grpc_port=port), pytest.raises(ModelChangedError, match="breast, colon"):
        second.stain_tiles(TILES, ORIGINS, 7)
    first.close()
    second.close()


def test_a_proxy_lets_all_ensembles_through(server: TritonServer, alone: dict[str, Answers], tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "pki")
    for name in ("server", "clinic"):
        authority.issue(name)
    with running(tmp_path / "pki" / "proxy", [address(server)], authority) as proxy:

        def connected(model: str) -> StainClient:
            return StainClient(proxy.url, credentials=proxy.credentials(), model=model)

        with pytest.raises(UsageError, match="choose one by --model"):
            connected("")
        with pytest.raises(ContractError, match="no model 'breast'"):
            connected("breast")  # as with pools: a name is known once its pool has been promoted
        promote(proxy.folder, "main")
        for label, expected in alone.items():
            with connected(label) as client:
                for name, tensor in client.stain_tiles(TILES, ORIGINS, 7).items():
                    np.testing.assert_array_equal(tensor, expected[name])
