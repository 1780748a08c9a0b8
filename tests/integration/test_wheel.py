"""The wheel, in a fresh environment outside the checkout, does what the README shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow  # installs everything that a client and a server need from the package index
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.version_info >= (3, 13), reason="the serve extra has no server for Python 3.13")
def test_the_wheel_in_a_fresh_environment_stains_a_tile(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["STAINDIFFUSER_CACHE"] = str(tmp_path / "cache")
    outside = tmp_path / "outside"
    outside.mkdir()

    def run(*command: str | Path) -> str:
        result = subprocess.run(
            command, cwd=outside, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout

    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist", ROOT)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    run(sys.executable, "-m", "venv", tmp_path / "env")
    scripts = tmp_path / "env" / "bin"
    run(scripts / "python", "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", f"{wheel}[client,serve]")
    where = run(scripts / "python", "-c", "import staindiffuser.client; print(staindiffuser.client.__file__)")
    assert Path(where.strip()).is_relative_to(tmp_path / "env")

    tile = np.random.default_rng(0).integers(150, 230, (256, 256, 3), dtype=np.uint8)
    Image.fromarray(tile).save(outside / "tile.png")
    run(scripts / "staindiffuser", "stain", "tile.png", "--mpp", "0.5", "--output", "stained")
    (record,) = (outside / "stained").rglob("run.json")
    outputs = json.loads(record.read_text(encoding="utf-8"))["outputs"]
    assert {"cd3.ome.tiff", "ck818.ome.tiff"} <= set(outputs)
    assert all((record.parent / name).stat().st_size > 0 for name in outputs)
