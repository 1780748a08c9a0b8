"""``staindiffuser stain`` as a user meets it: exit codes, one line, nothing half-done.

The server is a stand-in that speaks gRPC; tests with a real Triton are in ``tests/integration``.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import tifffile

from staindiffuser.client.journal import JOURNAL
from staindiffuser.client.result_folder import UNFINISHED
from staindiffuser.client.testing import FakeTriton

COMMAND = [sys.executable, "-c", "from staindiffuser.cli import main; main()", "stain"]
CMU = "slides/CMU-1-Small-Region.svs"
NOWHERE = "127.0.0.1:9"


def environment() -> dict[str, str]:
    return {**os.environ, "COLUMNS": "300", "TERM": "dumb"}


def stain(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=120)


def refused(result: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    assert sum(line.startswith("error: ") for line in lines) == 1, result.stderr
    assert lines[-1].startswith("error: "), result.stderr
    for word in words:
        assert word in lines[-1]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with FakeTriton() as fake:
        yield fake.url


@pytest.fixture
def tile(tmp_path: Path) -> Path:
    y, x = np.mgrid[:300, :300]
    pixels = np.stack([170 + 30 * np.sin(x / 19), 90 + 30 * np.cos(y / 23), 160 + 0 * x], axis=-1).astype(np.uint8)
    path = tmp_path / "tile.tif"
    tifffile.imwrite(path, pixels, photometric="rgb", resolution=(20000, 20000), resolutionunit="CENTIMETER")
    return path


def test_a_slide_is_stained(real_data: Path, tmp_path: Path, server: str) -> None:
    result = stain(tmp_path, real_data / CMU, "--server", server, "--json", "--seed", 3)
    assert result.returncode == 0, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["CMU-1-Small-Region-stained"]
    run = json.loads(result.stdout)
    assert run["seed"] == 3
    assert {"cd3.ome.tiff", "ck818.cells.ome.tiff", "cells.geojson.gz"} <= run["outputs"].keys()
    assert "research use only" in result.stderr


def test_several_inputs_get_a_folder_each_and_one_may_fail(tile: Path, tmp_path: Path, server: str) -> None:
    other = tmp_path / "other.tif"
    other.write_bytes(tile.read_bytes())
    bad = tmp_path / "bad.tif"
    bad.write_bytes(b"II*\0nonsense")
    options = ("--output", "all", "--stains", "CD3", "--no-cells", "--keep-names")
    result = stain(tmp_path, tile, bad, other, "--server", server, *options)
    assert result.returncode == 1, result.stderr
    assert "error: " in result.stderr
    assert any(line.startswith("error: ") and "bad.tif" in line for line in result.stderr.splitlines())
    assert "2 stained, 1 failed" in result.stderr
    outputs = sorted(path.name for path in (tmp_path / "all").iterdir())
    assert outputs == ["other-stained", "summary.csv", "tile-stained"]
    assert sorted(path.name for path in (tmp_path / "all/tile-stained").iterdir()) == ["cd3.ome.tiff", "run.json"]


def test_a_result_is_not_overwritten_silently(tile: Path, tmp_path: Path, server: str) -> None:
    assert stain(tmp_path, tile, "--server", server, "--no-cells").returncode == 0
    refused(stain(tmp_path, tile, "--server", server), 2, "--overwrite", "--resume")
    resumed = stain(tmp_path, tile, "--server", server, "--no-cells", "--resume")
    assert resumed.returncode == 0
    assert "already complete" in resumed.stderr
    assert stain(tmp_path, tile, "--server", server, "--overwrite").returncode == 0


def bad_input(kind: str, real_data: Path, folder: Path) -> Path:
    whole = (real_data / CMU).read_bytes()
    contents = {
        "empty.svs": b"",
        "text.svs": b"Lorem ipsum dolor sit amet\n" * 50,
        "truncated.svs": whole[: len(whole) // 2],
        "random.tif": np.random.default_rng(0).bytes(50000),
    }
    path = folder / kind
    if kind in contents:
        path.write_bytes(contents[kind])
    return path


@pytest.mark.parametrize("kind", ["missing.svs", "empty.svs", "text.svs", "truncated.svs", "random.tif"])
def test_bad_inputs(kind: str, real_data: Path, tmp_path: Path) -> None:
    path = bad_input(kind, real_data, tmp_path)
    before = sorted(tmp_path.iterdir())
    # No server is there: a bad input is found before one is needed.
    refused(stain(tmp_path, path, "--server", NOWHERE, "--output", "out", "--keep-names"), 4, kind)
    nameless = "slide 1" if kind == "missing.svs" else "slide-"
    refused(stain(tmp_path, path, "--server", NOWHERE, "--output", "out"), 4, nameless)
    assert sorted(tmp_path.iterdir()) == before


def test_a_slide_without_mpp_is_refused_and_accepted_with_it(real_data: Path, tmp_path: Path, server: str) -> None:
    path = real_data / "slides/tcga-cr-7395-01a-01-ts1.svs"
    refused(stain(tmp_path, path, "--server", server, "--output", "out"), 4, "--mpp")
    assert list(tmp_path.iterdir()) == []
    # Not its real one: a coarse one makes the image small and the test short.
    result = stain(tmp_path, path, "--server", server, "--output", "out", "--mpp", 0.1, "--no-cells", "--stains", "cd3")
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "out/run.json").read_text())["input"]["mpp_from"] == "--mpp"


def test_a_name_that_is_not_utf8_is_refused_before_any_work(tile: Path, tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/b-\xe9.tif"
    os.replace(tile, name)  # noqa: PTH105 - pathlib has no bytes
    refused(stain(tmp_path, os.fsdecode(name), "--server", NOWHERE, "--output", "out"), 2, "UTF-8")
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["🧬 slide.tif", "new\nline.tif", "bell\x07.tif", "a" * 230 + ".tif", "<&>'\".tif"])
def test_odd_names_are_stained(tile: Path, tmp_path: Path, server: str, name: str) -> None:
    tile.rename(tmp_path / name)
    options = ("--no-cells", "--stains", "cd3", "--output", "out", "--keep-names")
    result = stain(tmp_path, name, "--server", server, *options)
    assert result.returncode == 0, result.stderr
    with tifffile.TiffFile(tmp_path / "out/cd3.ome.tiff") as tiff:
        assert "cd3" in ElementTree.fromstring(tiff.ome_metadata or "").find(".//{*}Image").get("Name", "").lower()  # type: ignore[union-attr]
    assert Path(json.loads((tmp_path / "out/run.json").read_text(encoding="utf-8"))["input"]["path"]).name == name


def test_a_name_too_long_for_its_result_is_refused(tile: Path, tmp_path: Path, server: str) -> None:
    name = "a" * 250 + ".tif"
    tile.rename(tmp_path / name)
    refused(stain(tmp_path, name, "--server", server), 2, "too long")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_unknown_stain(tile: Path, tmp_path: Path, server: str) -> None:
    refused(stain(tmp_path, tile, "--server", server, "--stains", "her2"), 2, "her2", "cd3, ck818")
    assert list(tmp_path.iterdir()) == [tile]


@pytest.mark.parametrize("output", ["tile.tif/out", "/proc/out", "tile.tif"])
def test_an_unwritable_output(tile: Path, tmp_path: Path, output: str) -> None:
    refused(stain(tmp_path, tile, "--server", NOWHERE, "--output", output), 2, "cannot be written")
    assert list(tmp_path.iterdir()) == [tile]


def test_an_unreachable_server(tile: Path, tmp_path: Path) -> None:
    refused(stain(tmp_path, tile, "--server", NOWHERE, "--output", "out"), 3, NOWHERE)
    assert list(tmp_path.iterdir()) == [tile]


@pytest.mark.parametrize(
    "arguments", [("--seed", -1), ("--mpp", 0), ("--batch", 0), ("--server", "nonsense"), ("--overwrite", "--resume")]
)
def test_impossible_options(tile: Path, tmp_path: Path, arguments: tuple[object, ...]) -> None:
    refused(stain(tmp_path, tile, *arguments), 2, str(arguments[0]).strip("-"))
    assert list(tmp_path.iterdir()) == [tile]


def started(folder: Path, server: FakeTriton, *arguments: object, requests: int = 4) -> subprocess.Popen[str]:
    """The command, once it has sent this many requests."""
    command = [*COMMAND, *map(str, arguments), "--server", server.url]
    process = subprocess.Popen(command, cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while server.requests < requests and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.requests >= requests
    return process


def ended(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    _, stderr = process.communicate(timeout=30)
    return subprocess.CompletedProcess([], process.returncode, "", stderr)


def unfinished_only(folder: Path) -> bool:
    """Nothing stands under a final name: there is no result yet, or the folder holds saved work alone."""
    return not folder.exists() or [path.name for path in folder.iterdir()] == [UNFINISHED]


def test_a_server_that_dies_in_the_middle(real_data: Path, tmp_path: Path) -> None:
    with FakeTriton(delay=0.3) as fake:
        process = started(tmp_path, fake, real_data / CMU, "--output", "a/out", "--patience", 0)
        fake.kill()
        refused(ended(process), 3, "lost")
    assert unfinished_only(tmp_path / "a/out")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(real_data: Path, tmp_path: Path, number: signal.Signals) -> None:
    with FakeTriton(delay=0.3) as fake:
        process = started(tmp_path, fake, real_data / CMU, "--output", "out", "--batch", 2, "--keep-names", requests=16)
        process.send_signal(number)
        result = ended(process)
    assert result.returncode == 130, result.stderr
    assert "Traceback" not in result.stderr
    assert unfinished_only(tmp_path / "out")
    if (tmp_path / "out").exists():
        assert "rows are saved; to continue, run the same command again: staindiffuser " in result.stderr


def saved_rows(folder: Path) -> int:
    journal = folder / UNFINISHED / JOURNAL
    return max(0, len(journal.read_bytes().splitlines()) - 1) if journal.exists() else 0


def test_killed_and_continued(real_data: Path, tmp_path: Path) -> None:
    """SIGKILL, which nothing can catch: the same command goes on (ten times: test_stain_killed.py)."""
    command = (real_data / CMU, "--batch", 2, "--stains", "cd3")
    with FakeTriton(delay=0.1) as fake:
        assert stain(tmp_path, *command, "--server", fake.url, "--output", "whole").returncode == 0
        process = started(tmp_path, fake, *command, "--output", "out")
        deadline = time.monotonic() + 60
        while saved_rows(tmp_path / "out") < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.kill()
        ended(process)
        assert unfinished_only(tmp_path / "out")
        result = stain(tmp_path, *command, "--server", fake.url, "--output", "out")
    assert result.returncode == 0, result.stderr
    assert "continuing interrupted work" in result.stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        p.name for p in (tmp_path / "whole").iterdir()
    )
    for name in ("cd3.ome.tiff", "cd3.cells.ome.tiff"):
        np.testing.assert_array_equal(
            tifffile.imread(tmp_path / "out" / name), tifffile.imread(tmp_path / "whole" / name)
        )
    cells = [(tmp_path / folder / "cells.geojson.gz").read_bytes() for folder in ("out", "whole")]
    assert cells[0] == cells[1]


def test_help_names_the_options(tmp_path: Path) -> None:
    result = stain(tmp_path, "--help")
    assert result.returncode == 0
    for word in ("--server", "--repository", "--mpp", "--stains", "--seed", "--resume"):
        assert word in result.stdout


def test_options_may_come_from_the_environment(
    tile: Path, tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAINDIFFUSER_STAIN_SERVER", server)
    monkeypatch.setenv("STAINDIFFUSER_STAIN_SEED", "5")
    result = stain(tmp_path, tile, "--no-cells", "--json", "--seed", 6)
    assert result.returncode == 0, result.stderr
    run = json.loads(result.stdout)
    assert (run["server"]["url"], run["seed"]) == (server, 6), "flags come first"


def test_info_and_check(tile: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.tif"
    bad.write_bytes(b"II*\0nonsense")

    def command(*arguments: object) -> subprocess.CompletedProcess[str]:
        whole = [*COMMAND[:-1], *map(str, arguments)]
        return subprocess.run(whole, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)

    assert "0.5 × 0.5" in command("info", tile).stdout
    assert json.loads(command("info", tile, "--json").stdout)["levels"] == ["300 × 300"]
    mixed = command("check", tile, bad)
    assert (mixed.returncode, mixed.stdout.count("ok, tiff"), mixed.stdout.count("error: ")) == (1, 1, 1), mixed
    refused(command("check", bad), 4, "bad.tif")


def test_the_command_line_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'tritonclient', 'tifffile', 'openslide', 'scipy', 'PIL', 'grpc'}"
    code = f"import sys, staindiffuser.client.cli; sys.exit(bool({heavy} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), timeout=60).returncode == 0


def test_the_client_never_loads_torch() -> None:
    code = (
        "import sys, pkgutil, importlib, staindiffuser.client as c\n"
        "for m in pkgutil.iter_modules(c.__path__): importlib.import_module(f'staindiffuser.client.{m.name}')\n"
        "sys.exit('torch' in sys.modules or any(n.startswith('staindiffuser.training') for n in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], env=environment(), timeout=60).returncode == 0
