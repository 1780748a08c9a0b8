"""A slide whose client is killed at any moment, again and again, ends as if nothing had happened."""

import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile

from staindiffuser.client.result_folder import UNFINISHED
from staindiffuser.client.run_record import read_run
from staindiffuser.client.testing import FakeTriton

KILLS = 10


def command(slide: Path, url: str, output: Path) -> list[str]:
    program = "import sys; from staindiffuser.cli import main; sys.argv[0] = 'staindiffuser'; sys.exit(main())"
    options = ["--server", url, "--output", str(output), "--batch", "2"]
    return [sys.executable, "-c", program, "stain", str(slide), *options]


def tissue(path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.normal((215, 160, 200), 6, (5000, 1400, 3))
    for y, x in zip(rng.integers(10, 4990, 2500), rng.integers(10, 1390, 2500), strict=True):
        pixels[y - 6 : y + 6, x - 6 : x + 6] = (80, 60, 140)
    tifffile.imwrite(
        path, np.clip(pixels, 0, 255).astype(np.uint8), photometric="rgb", tile=(256, 256),
        resolution=(20000, 20000), resolutionunit="CENTIMETER",
    )  # fmt: skip


def rows_saved(output: Path) -> int:
    """Lines of an unfinished slide's journal but the first, which says what the slide is."""
    journal = output / UNFINISHED / "journal.jsonl"
    return max(0, journal.read_bytes().count(b"\n") - 1) if journal.exists() else 0


@pytest.mark.slow  # twelve runs, most of them cut short
@pytest.mark.timeout(1800)
def test_killed_at_ten_random_moments(tmp_path: Path) -> None:
    """SIGKILL, which nothing can catch: while the slide is opened, a row is written, or the files are completed."""
    slide, whole, output = tmp_path / "t.tif", tmp_path / "whole", tmp_path / "out"
    tissue(slide)
    moments = random.Random(7)
    with FakeTriton(delay=0.05) as fake:
        start = time.monotonic()
        subprocess.run(command(slide, fake.url, whole), check=True, capture_output=True)
        seconds = time.monotonic() - start
        saved: list[int] = []
        for turn in range(KILLS):
            process = subprocess.Popen(command(slide, fake.url, output), stderr=subprocess.PIPE)
            time.sleep(moments.uniform(0.1, 0.6) * seconds)
            if turn % 2:  # also on a machine that is slower now, and may not even have opened the slide
                before = rows_saved(output)
                while rows_saved(output) == before and process.poll() is None:
                    time.sleep(0.01)
            process.kill()
            process.communicate()
            if (output / "run.json").exists():  # it was quicker than the one that was not interrupted
                break
            assert not output.exists() or [path.name for path in output.iterdir()] == [UNFINISHED]
            saved.append(rows_saved(output))
        assert saved == sorted(saved), "saved rows are never lost"
        assert len(saved) >= 3, "too few were interrupted to prove anything"
        if not (output / "run.json").exists():
            subprocess.run(command(slide, fake.url, output), check=True, capture_output=True)
    names = sorted(path.name for path in whole.iterdir())
    assert sorted(path.name for path in output.iterdir()) == names, "leftovers"
    for name in names:
        if name.endswith(".tiff"):
            np.testing.assert_array_equal(tifffile.imread(output / name), tifffile.imread(whole / name))
        elif name != "run.json":
            assert (output / name).read_bytes() == (whole / name).read_bytes(), name
    assert read_run(output).scores == read_run(whole).scores
    assert read_run(output).resumed_rows > 0
