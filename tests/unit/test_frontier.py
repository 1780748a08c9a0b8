"""``bench frontier``: every sampler on the same tiles, and a DDIM that is one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from staindiffuser.benchmarks.frontier import bench_frontier, ddim
from staindiffuser.cli import app
from staindiffuser.errors import UsageError
from staindiffuser.training.checkpoint import Checkpoint
from staindiffuser.training.config import StainConfig
from staindiffuser.training.model.network import DualDiffusion


def test_ddim_follows_the_flow_of_normally_distributed_data() -> None:
    """For data of variance 1 the denoiser is x / (1 + σ²), and what the flow keeps is x / √(1 + σ²)."""
    noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    span = {"sigma_max": 80.0, "sigma_min": 0.002}
    exact = 80.0 * noise / (1 + 80.0**2) ** 0.5
    errors = [
        float((ddim(lambda x, sigma: x / (1 + sigma**2), noise, steps=steps, **span) - exact).abs().max())
        for steps in (25, 50, 200)
    ]
    assert errors[1] < 0.6 * errors[0]  # of first order
    assert errors[2] < 0.05
    assert torch.equal(ddim(lambda x, sigma: torch.ones_like(x), noise, steps=5, **span), torch.ones_like(noise))


def test_report(tiny_checkpoint: Path, tiles_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("staindiffuser.benchmarks.frontier.DDIM_STEPS", 3)
    file = tmp_path / "frontier.json"
    options = ["--tiles", str(tiles_folder), "--student", str(tiny_checkpoint), "--teacher", str(tiny_checkpoint)]
    options += ["--baselines", str(Path(__file__).parents[2] / "benchmarks" / "results" / "baselines.json")]
    result = CliRunner().invoke(app, ["bench", "frontier", *options, "--most", "2", "--json", str(file)])
    assert result.exit_code == 0, result.output
    report = json.loads(file.read_text(encoding="utf-8"))
    points = [point for point in report["points"] if not point["scored"]]
    recorded = [point for point in report["points"] if point["scored"]]
    assert [point["model"] for point in recorded] == ["U-Net, regression", "U-Net, pix2pix"]
    assert all(point["cpu_ms"] > 0 and 0.5 < point["dab_dice"]["cd3"] < 0.6 for point in recorded)
    assert all("recorded on 500 other tiles; 10000 steps of 5 crops" in point["scored"] for point in recorded)
    assert [point["sampler"] for point in points[-2:]] == ["18 steps, Heun", "3 steps, DDIM"]
    assert [point["evaluations"] for point in points[-2:]] == [35, 3]
    assert points[report["gated"]]["sampler"].endswith(("step", "steps"))
    for point in points:
        assert point["cpu_ms"] > 0
        assert all(0 <= value <= 1 for value in point["dab_dice"].values())
    samplers = [(point["sampler"], point["dab_dice"]) for point in points[:-2]]
    half = len(samplers) // 2
    assert samplers[:half] == samplers[half:], "the same checkpoint twice, from the same noise"
    assert points[-2]["cpu_ms"] > points[0]["cpu_ms"]
    assert "18 steps, Heun: " in result.output


def test_a_teacher_of_fewer_stains_is_refused(tiny_checkpoint: Path, tiles_folder: Path, tmp_path: Path) -> None:
    config = Checkpoint.load(tiny_checkpoint).config
    stains = (*config.model.stains, StainConfig(name="cd20", label="CD20"), StainConfig(name="ki67", label="Ki-67"))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, stains=stains))
    Checkpoint(config=config, network=DualDiffusion(config.model)).save(tmp_path)
    with pytest.raises(UsageError, match=f"--teacher {tiny_checkpoint}: it lacks cd20, ki67 of {tmp_path}"):
        bench_frontier(tmp_path, tiny_checkpoint, tiles_folder)
