"""``bench seams``: a frame that a network draws inside its tiles is seen without a margin, and gone with a wide one."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tifffile

from staindiffuser.benchmarks import seams

FRAME = 24
"""Of the tiles, pixels: wrong there, as with zero padding."""


def framed(network: object, he: np.ndarray, **options: Any) -> dict[str, np.ndarray]:
    image = he.copy()
    image[:, :FRAME] = image[:, -FRAME:] = image[:, :, :FRAME] = image[:, :, -FRAME:] = 0
    return {"STAIN_CD3": image, "CELLS_CD3": image[..., :1]}


def test_the_frame_shows_by_the_margin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(100, 255, (512, 640, 3), np.uint8)
    path = tmp_path / "slide.tif"
    options: dict[str, Any] = {
        "tile": (256, 256),
        "photometric": "rgb",
        "resolution": (20000, 20000),
        "resolutionunit": "CENTIMETER",
    }
    tifffile.imwrite(path, pixels, **options)
    config = SimpleNamespace(
        model=SimpleNamespace(stains=[SimpleNamespace(name="cd3")], mpp=0.5),
        sigmas={"1": (80.0,)}, steps=1, tile=128, margin=32, receptive_radius=30,
    )  # fmt: skip
    model = SimpleNamespace(config=config, network=None)
    monkeypatch.setattr("staindiffuser.training.checkpoint.Checkpoint.load", lambda folder: model)
    monkeypatch.setattr("staindiffuser.training.infer.stain_tiles", framed)
    report = seams.bench_seams(tmp_path, path, (0, 16, 32), corner=(170, 120), side=200)
    none, narrow, wide = report.rows
    assert report.region == (160, 112, 192)
    assert none.image_mean > narrow.image_mean > 1
    assert (wide.image_mean, wide.image_p999, wide.cells_mean, wide.cells_p999) == (0, 0, 0, 0)
    assert wide.work == pytest.approx(4)
    assert report.lines()[-1] == "| 32 (default) | 4.00 | 0.00, 0 | 0.00, 0 |"
