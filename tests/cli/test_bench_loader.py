"""``staindiffuser bench loader`` on a few small tiles: what it reports, not how fast this machine is."""

import json
from pathlib import Path

import typer
from typer.testing import CliRunner

from staindiffuser.benchmarks.loader import loader

app = typer.Typer()
app.command("loader")(loader)


def test_report(tiles_folder: Path, tmp_path: Path) -> None:
    options = ["--crop", "32", "--workers", "1", "--batch", "4", "--samples", "16"]
    result = CliRunner().invoke(app, ["--data", str(tiles_folder), *options, "--json", str(tmp_path / "r.json")])
    assert result.exit_code == 0, result.output
    assert "tiles/s" in result.output
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["tiles"], report["samples"], report["stains"], report["workers"]) == (8, 16, 2, 1)
    assert set(report["parts_ms"]) == {"decode", "augment", "jitter", "noise"}
    for side in ("cold", "warm"):
        assert report[side]["tiles_per_second"] > 0
        assert report[side]["cpu_ms_per_tile"] > 0
